/** The runbook's four ways to hang, told apart by the code that a request failed with. */
import { ERROR_TABLE, type ErrorCode } from '../errors.ts';
import { type Finding, fail } from './finding.ts';

/** In the order of the runbook. */
export const SCENARIOS: readonly { readonly codes: readonly ErrorCode[]; readonly text: string }[] = [
  {
    codes: ['PAIR_INIT_TIMEOUT', 'NCCL_ERROR'],
    text: 'communicator init: compare rank, NCCL version (both logs) and NCCL_* on both ends; let all TCP pass between them',
  },
  {
    codes: ['PEER_UNREACHABLE', 'PEER_ANSWER_TIMEOUT', 'PEER_LOST'],
    text: 'ZeroMQ: run pd-doctor --peer with the KV address of each end on the machine of the other',
  },
  {
    codes: [
      'TRANSFER_TIMEOUT',
      'KV_BUFFER_FULL',
      'KV_SHAPE_MISMATCH',
      'KV_SEND_FAILED',
      'OUT_OF_DEVICE_MEMORY',
      'PAIR_CLOSED',
      'SEND_TYPE_MISMATCH',
      'FINGERPRINT_MISMATCH',
    ],
    text: 'transfer: see pd_kv_buffer_used_bytes and pd_kv_refused_total of the consumer, and compare --send-type and the model of both ends',
  },
  {
    codes: ['KV_LOAD_TIMEOUT', 'KV_LOAD_FAILED'],
    text: 'the KV never came under this id: compare the ids in both logs; where a vLLM worker is involved that randomizes ids: VLLM_DISABLE_REQUEST_ID_RANDOMIZATION=1',
  },
];

/** For an answer of the proxy that is no completion. */
export function diagnose(status: number, body: string): Finding {
  const { code, message } = readError(body);
  const what = `a completion fails with ${status}${code === undefined ? '' : ` ${code}`}: ${message}`;
  const at = SCENARIOS.findIndex(({ codes }) => codes.some((known) => known === code));
  if (at >= 0) return fail(what, `hang scenario ${at + 1} of the runbook, ${SCENARIOS[at]!.text}`);
  const hint = code !== undefined && code in ERROR_TABLE ? ERROR_TABLE[code as ErrorCode].hint : undefined;
  return fail(what, hint ?? 'look at the logs of the proxy and of both instances for this request');
}

/** OpenAI's form of an error, or whatever it is. */
function readError(body: string): { readonly code?: string; readonly message: string } {
  try {
    const { error } = JSON.parse(body) as { error?: { code?: unknown; message?: unknown } };
    const message = String(error?.message ?? body).slice(0, 500);
    return typeof error?.code === 'string' ? { code: error.code, message } : { message };
  } catch {
    return { message: body.slice(0, 500) };
  }
}
