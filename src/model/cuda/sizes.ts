/** How many KV blocks fit: what is left of --gpu-memory-utilization once everything else has its memory. Pure. */
import { PdError } from '../../errors.ts';
import { binarySize } from '../../observability/bytes.ts';

export interface MemoryBudget {
  /** Bytes of the GPU, and those free now, with weights and activations in place. */
  readonly total: number;
  readonly free: number;
  /** Share of `total` that may be filled, other programs' part included, and the workers that divide it. */
  readonly utilization: number;
  readonly sharers: number;
  /** Taken later: received KV, communicators, graphs. */
  readonly reserved: number;
  /** Of one block in all layers. */
  readonly blockBytes: number;
  /** Blocks of one sequence of full length. */
  readonly perSequence: number;
  readonly model: string;
  readonly device: string;
}

/** An allowance for NCCL's buffers of a few pairs, not a measurement. */
export const PAIR_BYTES = 768 * 2 ** 20;
/** An allowance for graphs of decode steps and what cuBLAS loads at its first use, not a measurement. */
export const GRAPH_BYTES = 256 * 2 ** 20;

/** An allowance for what a process holds without asking for it: its context, modules, libraries. Not a measurement. */
export const CONTEXT_BYTES = 768 * 2 ** 20;

/** Throws OUT_OF_DEVICE_MEMORY where not even one sequence fits, saying by how much. */
export function blocksThatFit(budget: MemoryBudget): number {
  const { total, free, utilization, sharers, reserved, blockBytes, perSequence } = budget;
  const left = Math.floor((total * utilization) / sharers) - (total - free) - reserved;
  const blocks = Math.floor(left / blockBytes);
  if (blocks >= perSequence) return blocks;
  const wanted = perSequence * blockBytes;
  throw new PdError(
    'OUT_OF_DEVICE_MEMORY',
    `${budget.model} does not fit: one sequence of full length takes ${binarySize(wanted)} of KV, ${binarySize(Math.max(0, left))} of ${budget.device} are left ` +
      `(${binarySize(total)}, ${binarySize(free)} free beside weights and activations, ${binarySize(reserved)} kept for received KV and communication, ` +
      `--gpu-memory-utilization ${utilization}${sharers > 1 ? ` for ${sharers} workers` : ''}): ${binarySize(wanted - left)} too little. Lower --max-model-len, --max-num-batched-tokens or --kv-buffer-size, or raise --gpu-memory-utilization`,
    { wanted, left, total, free },
  );
}
