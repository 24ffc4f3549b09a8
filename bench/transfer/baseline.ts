/**
 * vLLM's own P2P NCCL engine on two H200s (NVLink, NCCL 2.28.9): 32 layers of Llama-3-8B KV, first send to last tensor received, 16
 * channels, a buffer from which nothing spills, contiguous tensors without gather and scatter, best of 3 warm rounds. Milliseconds.
 */
import type { SendType } from '../../src/wire/messages.ts';

const VLLM_MS: Readonly<Record<SendType, Readonly<Record<number, number>>>> = {
  PUT_ASYNC: { 16: 6.5, 256: 7.9, 1024: 8.0, 4096: 13.3, 16384: 20.3 },
  PUT: { 16: 6.1, 256: 10.1, 1024: 8.5, 4096: 11.1, 16384: 25.8 },
  GET: { 16: 4.4, 256: 5.2, 1024: 6.1, 4096: 8.3, 16384: 18.8 },
};

export const BASELINE_MODEL = 'llama-3-8b';
export const BASELINE_GPU = /\bH200\b/;

export function vllmMs(sendType: SendType, tokens: number): number | undefined {
  return VLLM_MS[sendType][tokens];
}
