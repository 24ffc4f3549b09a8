/**
 * The runbook's four ways to hang, told apart by what an error carries: the innermost cause that says something, and what a consumer knew
 * when its deadline passed. Never by the words of a message.
 */

import type { KvKey } from '../config/transfer-options.ts';
import { ERROR_TABLE, type ErrorCode } from '../errors.ts';
import { type Finding, fail } from './finding.ts';

export type Scenario = 1 | 2 | 3 | 4;

export interface Diagnosis {
  readonly scenario: Scenario;
  /** Begins with the scenario. */
  readonly mend: string;
}

/** An error as it was read from an answer: of this version or of another, so that nothing of it is sure. */
export interface ReadError {
  readonly code: string;
  readonly message: string;
  readonly context: Readonly<Record<string, unknown>>;
  readonly cause?: ReadError | undefined;
}

/** More causes than this are no error of ours. */
const MOST_CAUSES = 16;

/** Undefined where it is no error in our form, or in OpenAI's. */
function readError(value: unknown, most = MOST_CAUSES): ReadError | undefined {
  if (typeof value !== 'object' || value === null || most === 0) return undefined;
  const { code, message, context, cause } = value as Record<string, unknown>;
  if (typeof code !== 'string') return undefined;
  return {
    code,
    message: String(message ?? ''),
    context: typeof context === 'object' && context !== null ? { ...context } : {},
    cause: readError(cause, most - 1),
  };
}

/** Which scenario it is; undefined where it is none of them, or where the error does not tell. */
export function scenarioOf(error: ReadError): Diagnosis | undefined {
  return (error.cause && scenarioOf(error.cause)) ?? diagnosisOf(error);
}

/** Of the error alone, whatever led to it. */
function diagnosisOf({ code, context }: ReadError): Diagnosis | undefined {
  switch (code as ErrorCode) {
    case 'PAIR_INIT_TIMEOUT':
    case 'NCCL_ERROR':
      return PAIR_INIT;
    case 'PEER_UNREACHABLE':
    case 'PEER_LOST':
    case 'PEER_ANSWER_TIMEOUT':
      return context['stage'] === 'pair-init' ? PAIR_INIT : unreached(context['peer']);
    case 'MESSAGE_INVALID':
      return context['stage'] === 'pair-init' ? PAIR_INIT : undefined;
    case 'KV_BUFFER_FULL':
      return NO_ROOM;
    case 'SEND_TYPE_MISMATCH':
      return transfer('start both ends with the same --send-type');
    case 'FINGERPRINT_MISMATCH':
    case 'KV_SHAPE_MISMATCH':
      return transfer('start both ends with the same --model, KV dtype and --block-size');
    case 'OUT_OF_DEVICE_MEMORY':
      return transfer('lower --num-blocks, --kv-buffer-size or --gpu-memory-utilization');
    case 'TRANSFER_TIMEOUT':
    case 'PAIR_CLOSED':
    case 'KV_SEND_FAILED':
      return transfer('look at the logs of both ends for this tensor');
    case 'KV_LOAD_TIMEOUT':
      return late(context);
    default:
      return undefined;
  }
}

/** Nothing failed: the KV just did not arrive. */
function late(context: ReadError['context']): Diagnosis | undefined {
  const { nearMiss, pair, kvKey, peerIsOurs } = context;
  if (nearMiss !== undefined) {
    return idsDiffer(
      kvKey === 'engine' ? 'engine' : 'transfer',
      typeof peerIsOurs === 'boolean' ? peerIsOurs : undefined,
    );
  }
  switch (pair) {
    case 'opening':
      return PAIR_INIT;
    case 'none':
    case 'lost':
    case 'connecting':
      return unreached(context['announced'] ?? context['peer']);
    default:
      // Open, and nothing of a similar id: the producer has not sent it, and knows why.
      return undefined;
  }
}

export const PAIR_INIT: Diagnosis = diagnosis(
  1,
  'communicator init: let all TCP pass between the two ends (data goes to ports that the system chooses, at the address that ' +
    '--kv-announce-host or --kv-host tells), and compare rank, NCCL version (both logs) and NCCL_* of both',
);

export const NO_ROOM: Diagnosis = transfer(
  'raise --kv-buffer-size or --mem-pool-size-gb on the end that has no room (pd_kv_buffer_used_bytes, pd_kv_refused_total), or lower the load',
);

/** `peer`: the KV address that could not be reached, where it is known. */
export function unreached(peer?: unknown): Diagnosis {
  const address = typeof peer === 'string' ? peer : 'ADDRESS';
  return diagnosis(
    2,
    `ZeroMQ: each end must be reached at the KV address that it tells (zmq_address in its log; --kv-announce-host, --kv-host and ` +
      `--kv-port set it): pd-doctor --peer ${address} on the machine of the other end tries it`,
  );
}

export function transfer(mend: string): Diagnosis {
  return diagnosis(3, `transfer: ${mend}`);
}

/** `peerIsOurs`: undefined where nobody knows. */
export function idsDiffer(kvKey: KvKey, peerIsOurs: boolean | undefined): Diagnosis {
  const ours = '--kv-key transfer (the default; --kv-key engine matches only ids without a random suffix)';
  const vllm = 'VLLM_DISABLE_REQUEST_ID_RANDOMIZATION=1';
  const mends =
    kvKey === 'engine'
      ? `start this consumer with ${ours}`
      : peerIsOurs === true
        ? `start the producer with ${ours}`
        : peerIsOurs === false
          ? `start the vLLM producer with ${vllm}`
          : `a worker of ours needs ${ours}, one of vLLM ${vllm}`;
  return diagnosis(4, `ids differ, compare those in both logs: ${mends}`);
}

function diagnosis(scenario: Scenario, mend: string): Diagnosis {
  return { scenario, mend: `hang scenario ${scenario} of the runbook, ${mend}` };
}

const UNTOLD =
  'the error does not say why: pd-doctor --worker with the HTTP address of each worker does (--debug-state). Where the producer has ' +
  `sent it, it is ${idsDiffer('transfer', undefined).mend}`;

export interface BadAnswer {
  readonly finding: Finding;
  /** What tells more: the workers themselves, or whether their KV addresses are reached. */
  readonly ask: 'workers' | 'kv-addresses' | undefined;
}

/** For an answer of the proxy that is no completion. */
export function diagnose(status: number, body: string): BadAnswer {
  const error = bodyError(body);
  if (!error) {
    const what = `a completion fails with ${status}: ${body.slice(0, 500)}`;
    const mend = 'look at the logs of the proxy and of both instances for this request';
    return { finding: fail(what, mend), ask: undefined };
  }
  const what = `a completion fails with ${status} ${error.code}: ${error.message.slice(0, 500)}`;
  const found = scenarioOf(error);
  if (found) {
    return { finding: fail(what, found.mend), ask: found.scenario === 2 ? 'kv-addresses' : undefined };
  }
  if (error.code === 'KV_LOAD_TIMEOUT' || error.code === 'KV_LOAD_FAILED') {
    return { finding: fail(what, UNTOLD), ask: 'workers' };
  }
  const hint = error.code in ERROR_TABLE ? ERROR_TABLE[error.code as ErrorCode].hint : undefined;
  const mend = hint ?? 'look at the logs of the proxy and of both instances for this request';
  return { finding: fail(what, mend), ask: undefined };
}

/** In OpenAI's form. */
function bodyError(body: string): ReadError | undefined {
  try {
    return readError((JSON.parse(body) as { error?: unknown }).error);
  } catch {
    return undefined;
  }
}
