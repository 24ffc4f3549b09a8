/**
 * One peer that talks to our ROUTER, from one NEW to the next. Its announcements are answered in order, each before the next is looked
 * at, except GETs that carry a `seq`. A session that has been replaced answers nothing any more: its DEALER is gone, and an answer
 * would reach the peer's next one and shift every answer after it.
 */
import type { PdError } from '../../errors.ts';
import type { Pair } from '../../transport/transport.ts';
import { CLOSE_FEATURE, type PeerHello } from '../../wire/messages.ts';
import type { PairState } from '../types.ts';

export class Session {
  readonly identity: Buffer;
  /** The routing id as text: `host:port`. */
  readonly peer: string;
  readonly since: number;
  /** What the peer said of itself, where it is ours. */
  readonly hello: PeerHello | undefined;
  /** It sent NEW, and was not refused. */
  readonly paired: boolean;
  #pair: Pair | undefined;
  #opening: Promise<Pair | undefined> | undefined;
  #chain: Promise<void> = Promise.resolve();
  #queued = 0;
  #ended: PdError | undefined;
  #replaced = false;
  #receiving = 0;
  #quiet: (() => void)[] = [];
  #lastUsedAt: number;
  #askedAt = Number.NEGATIVE_INFINITY;

  constructor(fields: {
    readonly identity: Buffer;
    readonly peer: string;
    readonly since: number;
    readonly hello?: PeerHello | undefined;
    readonly paired: boolean;
  }) {
    this.identity = fields.identity;
    this.peer = fields.peer;
    this.since = fields.since;
    this.#lastUsedAt = fields.since;
    this.hello = fields.hello;
    this.paired = fields.paired;
  }

  get lastUsedAt(): number {
    return this.#lastUsedAt;
  }

  /** A message of it has come. */
  used(now: number): void {
    this.#lastUsedAt = now;
  }

  /** Open, of a peer that knows how to close, and nothing is under way. */
  get closable(): boolean {
    const knows = this.hello?.features.includes(CLOSE_FEATURE) ?? false;
    return this.open && knows && this.#queued === 0 && this.#receiving === 0 && this.#pair?.pending === 0;
  }

  /** False where it has been asked to close less than `pauseMs` ago. */
  mayAskToClose(now: number, pauseMs: number): boolean {
    if (now - this.#askedAt < pauseMs) return false;
    this.#askedAt = now;
    return true;
  }

  /** Data is under way on the pair until `moved` settles. */
  async busy(moved: Promise<void>): Promise<void> {
    this.#receiving++;
    await moved;
    if (--this.#receiving > 0) return;
    for (const resolve of this.#quiet.splice(0)) resolve();
  }

  /** Resolves when no data is under way. Each operation has a deadline, so this has one too. */
  quiet(): Promise<void> {
    if (this.#receiving === 0) return Promise.resolve();
    return new Promise((resolve) => this.#quiet.push(resolve));
  }

  /** Why it is over, once it is. */
  get ended(): PdError | undefined {
    return this.#ended;
  }

  /** The peer has sent NEW anew: nothing of this session is answered any more. */
  get replaced(): boolean {
    return this.#replaced;
  }

  get open(): boolean {
    return this.#pair !== undefined && this.#ended === undefined;
  }

  get openPair(): Pair | undefined {
    return this.#ended ? undefined : this.#pair;
  }

  /** Messages that wait for their turn. */
  get queued(): number {
    return this.#queued;
  }

  /** The pair, when it is open; undefined where there is none or it could not be opened. */
  async pair(): Promise<Pair | undefined> {
    const pair = this.#pair ?? (await this.#opening);
    return this.#ended ? undefined : pair;
  }

  opening(pair: Promise<Pair | undefined>, whenOpen: () => void): void {
    this.#opening = pair.then((opened) => {
      this.#pair = opened;
      whenOpen();
      return opened;
    });
  }

  /** Runs `task` after those before it. */
  enqueue(task: () => Promise<void> | void): void {
    this.#queued++;
    this.#chain = this.#chain.then(async () => {
      this.#queued--;
      if (!this.#replaced) await task();
    });
  }

  /** The pair is over. Messages are still answered: whoever sent them may be alive, and vLLM waits for an answer for ever. Idempotent. */
  end(reason: PdError): void {
    if (this.#ended) return;
    this.#ended = reason;
    this.#pair?.abort(reason);
  }

  /** As `end`, and nothing is answered any more. */
  replace(reason: PdError): void {
    this.#replaced = true;
    this.end(reason);
  }

  state(now: number): PairState {
    return {
      peer: this.peer,
      direction: 'incoming',
      state: this.#ended ? 'over' : this.#pair ? 'open' : 'opening',
      ours: this.hello !== undefined,
      queued: this.#queued,
      outstanding: this.#pair?.pending ?? 0,
      sinceMs: Math.round(now - this.since),
    };
  }
}
