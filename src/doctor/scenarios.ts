/**
 * The runbook's four ways to hang, told apart by what an error carries: the innermost cause that is conclusive, and what a consumer
 * knew when its deadline passed. Never by the wording of a message.
 */
import type { KvKey } from '../config/transfer-options.ts';
import { ERROR_TABLE, type ErrorCode } from '../errors.ts';
import { type Finding, fail } from './finding.ts';

export type Scenario = 1 | 2 | 3 | 4;

export interface Diagnosis {
  readonly scenario: Scenario;
  /** Begins with the scenario. */
  readonly fix: string;
}

/** An error as read from an answer, perhaps of another version, so its fields are not guaranteed. */
export interface ReadError {
  readonly code: string;
  readonly message: string;
  readonly context: Readonly<Record<string, unknown>>;
  readonly cause?: ReadError | undefined;
}

/** An error with more causes than this is not ours. */
const MOST_CAUSES = 16;

/** Undefined if it is an error neither in our form nor in OpenAI's. */
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

/** Undefined if it is none of them, or if the error does not say. */
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

/** Nothing failed: the KV just did not arrive in time. */
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
      // Open, and nothing under a similar id: the producer has not sent it, and knows why.
      return undefined;
  }
}

export const PAIR_INIT: Diagnosis = diagnosis(
  1,
  'communicator init: let all TCP pass between the two ends (data uses ports that the system chooses, at the address set by ' +
    '--kv-announce-host or --kv-host), and compare rank, NCCL version and NCCL_* in both logs',
);

export const NO_ROOM: Diagnosis = transfer(
  'raise --kv-buffer-size or --mem-pool-size-gb on the end that has no room (pd_kv_buffer_used_bytes, pd_kv_refused_total), or lower the load',
);

/** `peer`: the KV address that could not be reached, if known. */
export function unreached(peer?: unknown): Diagnosis {
  const address = typeof peer === 'string' ? peer : 'ADDRESS';
  return diagnosis(
    2,
    `ZeroMQ: each end must be reachable at the KV address that it announces (zmq_address in its log; --kv-announce-host, --kv-host ` +
      `and --kv-port set it): pd-doctor --peer ${address} on the other end's machine tests it`,
  );
}

export function transfer(fix: string): Diagnosis {
  return diagnosis(3, `transfer: ${fix}`);
}

/** `peerIsOurs`: undefined if unknown. */
export function idsDiffer(kvKey: KvKey, peerIsOurs: boolean | undefined): Diagnosis {
  const ours = '--kv-key transfer (the default; --kv-key engine matches only ids without a random suffix)';
  const vllm = 'VLLM_DISABLE_REQUEST_ID_RANDOMIZATION=1';
  const fixes =
    kvKey === 'engine'
      ? `start this consumer with ${ours}`
      : peerIsOurs === true
        ? `start the producer with ${ours}`
        : peerIsOurs === false
          ? `start the vLLM producer with ${vllm}`
          : `a pd-worker needs ${ours}, a vLLM worker ${vllm}`;
  return diagnosis(4, `ids differ, compare them in both logs: ${fixes}`);
}

function diagnosis(scenario: Scenario, fix: string): Diagnosis {
  return { scenario, fix: `hang scenario ${scenario} of the runbook, ${fix}` };
}

const INCONCLUSIVE =
  'the error does not say why: pd-doctor --worker with the HTTP address of each worker does (--debug-state). If the producer has ' +
  `sent the KV, it is ${idsDiffer('transfer', undefined).fix}`;

export interface BadAnswer {
  readonly finding: Finding;
  /** What would say more: the workers themselves, or whether their KV addresses are reachable. */
  readonly ask: 'workers' | 'kv-addresses' | undefined;
}

/** For an answer of the proxy that is not a completion. */
export function diagnose(status: number, body: string): BadAnswer {
  const error = bodyError(body);
  if (!error) {
    const what = `a completion fails with ${status}: ${body.slice(0, 500)}`;
    const fix = 'look for this request in the logs of the proxy and of both instances';
    return { finding: fail(what, fix), ask: undefined };
  }
  const what = `a completion fails with ${status} ${error.code}: ${error.message.slice(0, 500)}`;
  const found = scenarioOf(error);
  if (found) {
    return { finding: fail(what, found.fix), ask: found.scenario === 2 ? 'kv-addresses' : undefined };
  }
  if (error.code === 'KV_LOAD_TIMEOUT' || error.code === 'KV_LOAD_FAILED') {
    return { finding: fail(what, INCONCLUSIVE), ask: 'workers' };
  }
  const hint = error.code in ERROR_TABLE ? ERROR_TABLE[error.code as ErrorCode].hint : undefined;
  const fix = hint ?? 'look for this request in the logs of the proxy and of both instances';
  return { finding: fail(what, fix), ask: undefined };
}

/** In OpenAI's form. */
function bodyError(body: string): ReadError | undefined {
  try {
    return readError((JSON.parse(body) as { error?: unknown }).error);
  } catch {
    return undefined;
  }
}
