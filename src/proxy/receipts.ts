/**
 * A receipt for each of the latest requests: where it went and why, when it passed which stage, how it ended. What only the workers know
 * of it is asked of them when somebody wants to see it (route.ts). Plain data: relay processes hand theirs to the owner.
 */
import { randomFillSync } from 'node:crypto';
import type { ErrorCode } from '../errors.ts';
import { monotonicMs, type Timeline, type TimelineStage } from '../observability/timelines.ts';
import type { TraceContext } from '../observability/tracing.ts';
import type { Placement } from './coordinator.ts';
import type { InstanceRole } from './registry.ts';

/**
 * Of an attempt with one pair: sent to the producer (`prefill`) and to the consumer (`decode`), whose whole answer (`prefilled`) and head
 * (`answered`) have come, its first event `relayed`, and its `end`.
 */
export type AttemptStage = 'prefill' | 'decode' | 'prefilled' | 'answered' | 'relayed' | 'end';

/** Ids of the spans that instances are asked under. */
export type AttemptSpans = Readonly<Record<InstanceRole, string>>;

export interface AttemptReceipt {
  /** `X-Request-Id`, as both workers and the client get it. */
  readonly requestId: string;
  readonly placement: Placement;
  /** Both ends were told to hand KV over natively. */
  readonly native: boolean;
  /** The consumer was asked while the producer was at work. */
  overlapped: boolean;
  /** `monotonicMs` of each stage, 0 where it has not been reached. */
  readonly at: Record<AttemptStage, number>;
  /** Which of the pair did not take it, so that another pair was tried or the client was told. */
  refusedBy: InstanceRole | undefined;
  /** Why it did not end well, as the log has it. */
  failure: string | undefined;
  /** Where the request has a trace. */
  readonly spans: AttemptSpans | undefined;
}

export interface Receipt {
  /** 32 hexadecimal digits, at the end of every id that the request has anywhere. */
  readonly id: string;
  readonly route: string;
  /** Name of the client's key; absent where none is needed. */
  readonly holder: string | undefined;
  /** Milliseconds since 1970. */
  readonly receivedEpochMs: number;
  /** These are `monotonicMs`; 0 where it has not come to that. */
  readonly receivedAt: number;
  readAt: number;
  /** It has had its turn and a pair. */
  placedAt: number;
  endedAt: number;
  /** For its turn, ms. */
  queuedMs: number;
  model: string | undefined;
  /** About how many the prompts have together. */
  promptTokens: number;
  /** They were counted, not guessed from the length of the body. */
  tokensKnown: boolean;
  prompts: number;
  /** The answer is to come as a stream of events. */
  streamed: boolean;
  readonly attempts: AttemptReceipt[];
  /** Of the answer; 499: the client went away. 0 while it is under way. */
  status: number;
  /** Of the proxy's own answer. */
  code: ErrorCode | undefined;
  /** Where traces are made, and its client wants one. */
  trace: TraceContext | undefined;
}

const ID_DIGITS = 32;
const ID = /[0-9a-f]{32}/g;

/** The id of a receipt that an id of its request ends with. */
export function receiptIdOf(requestId: string): string {
  return requestId.slice(-ID_DIGITS);
}

/** Requests that are remembered. */
const MOST_RECEIPTS = 512;

export class Receipts {
  readonly #ring: (Receipt | undefined)[] = Array.from({ length: MOST_RECEIPTS });
  /** How many there have been. */
  #count = 0;

  begin(route: string, holder: string | undefined): Receipt {
    const receipt: Receipt = {
      id: randomHex(),
      route,
      holder,
      receivedEpochMs: Date.now(),
      receivedAt: monotonicMs(),
      readAt: 0,
      placedAt: 0,
      endedAt: 0,
      queuedMs: 0,
      model: undefined,
      promptTokens: 0,
      tokensKnown: false,
      prompts: 0,
      streamed: false,
      attempts: [],
      status: 0,
      code: undefined,
      trace: undefined,
    };
    this.#ring[this.#count++ % MOST_RECEIPTS] = receipt;
    return receipt;
  }

  /** An attempt begins. */
  attempt(
    receipt: Receipt,
    begun: Pick<AttemptReceipt, 'requestId' | 'placement' | 'native' | 'spans'>,
  ): AttemptReceipt {
    const { requestId, placement, native, spans } = begun;
    const attempt: AttemptReceipt = {
      requestId,
      placement,
      native,
      spans,
      overlapped: false,
      at: { prefill: 0, decode: 0, prefilled: 0, answered: 0, relayed: 0, end: 0 },
      refusedBy: undefined,
      failure: undefined,
    };
    receipt.attempts.push(attempt);
    return attempt;
  }

  end(receipt: Receipt, status: number, code: ErrorCode | undefined): void {
    receipt.endedAt = receipt.attempts.at(-1)?.at.end || monotonicMs();
    receipt.status = status;
    receipt.code = code;
  }

  /** By any id that the request has. */
  get(anyId: string): Receipt | undefined {
    const id = anyId.match(ID)?.at(-1);
    if (id === undefined) return undefined;
    // Asked for each request that brings an id of its own: the latest first, and without a copy of the ring.
    for (let at = this.#count - 1; at >= Math.max(0, this.#count - MOST_RECEIPTS); at--) {
      const receipt = this.#ring[at % MOST_RECEIPTS];
      if (receipt?.id === id) return receipt;
    }
    return undefined;
  }

  /** The latest request last. */
  recent(): readonly Receipt[] {
    const oldest = this.#count % MOST_RECEIPTS;
    return [...this.#ring.slice(oldest), ...this.#ring.slice(0, oldest)].filter((one) => one !== undefined);
  }
}

/** Of each attempt, in the form of the workers' own. */
export function timelinesOf({ attempts, receivedAt, readAt }: Receipt): readonly Timeline[] {
  return attempts.map(({ requestId, at }) => {
    const stages: TimelineStage[] = [
      { stage: 'received', at: receivedAt },
      { stage: 'read', at: readAt },
    ];
    const own = Object.entries(at).filter(([, ms]) => ms > 0);
    for (const [stage, ms] of own.sort(([, a], [, b]) => a - b)) stages.push({ stage, at: ms });
    return { id: requestId, stages };
  });
}

/** Random bytes are drawn for many requests at a time: to draw them takes longer than to write them. */
const RANDOM_BYTES = ID_DIGITS / 2;
const drawn = Buffer.alloc(RANDOM_BYTES * 256);
let drawnAt = drawn.length;

function randomHex(): string {
  if (drawnAt === drawn.length) {
    randomFillSync(drawn);
    drawnAt = 0;
  }
  drawnAt += RANDOM_BYTES;
  return drawn.toString('hex', drawnAt - RANDOM_BYTES, drawnAt);
}
