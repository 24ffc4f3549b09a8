/**
 * One peer that talks to our ROUTER, from one NEW to the next. Its announcements are answered in order, each before the next is looked
 * at. A session that has been replaced answers nothing any more: its DEALER is gone, and an answer would reach the peer's next one and
 * shift every answer after it.
 */
import type { PdError } from '../../errors.ts';
import { remember } from '../../memories.ts';
import type { Pair } from '../../transport/transport.ts';
import type { PeerHello } from '../../wire/messages.ts';
import type { Deadlines } from '../deadlines.ts';
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

  constructor(identity: Buffer, since: number, paired: boolean, hello?: PeerHello) {
    this.identity = identity;
    this.peer = identity.toString();
    this.since = since;
    this.paired = paired;
    this.hello = hello;
  }

  /** Why it is over, once it is. */
  get ended(): PdError | undefined {
    return this.#ended;
  }

  /** The peer has sent NEW anew: nothing of this session is answered any more. */
  get replaced(): boolean {
    return this.#replaced;
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
      native: this.hello !== undefined,
      queued: this.#queued,
      outstanding: this.#pair?.pending ?? 0,
      sinceMs: Math.round(now - this.since),
    };
  }
}

/** Routing ids cost little, but anyone can make them up. */
const MOST = 4_096;

/** The peers that have talked to our ROUTER, by routing id; a bounded number. */
export class Sessions {
  readonly #clock: Deadlines;
  /** Oldest first. Routing ids are bytes; latin1 keeps every one apart. */
  readonly #byIdentity = new Map<string, Session>();
  /** Peers whose last pair died, until they send NEW again. */
  readonly #lost = new Map<string, PdError>();

  constructor(clock: Deadlines) {
    this.#clock = clock;
  }

  get(identity: Buffer): Session | undefined {
    return this.#byIdentity.get(keyOf(identity));
  }

  all(): Session[] {
    return [...this.#byIdentity.values()];
  }

  /** The session of a peer; one that never sent NEW gets one without a pair. */
  of(identity: Buffer): Session {
    const known = this.get(identity);
    if (known) return known;
    const session = new Session(identity, this.#clock.now(), false);
    this.enter(session);
    return session;
  }

  /** In place of the one before, which the caller has ended. */
  enter(session: Session): void {
    if (session.paired) this.#lost.delete(session.peer);
    this.#byIdentity.delete(keyOf(session.identity));
    this.#evict();
    this.#byIdentity.set(keyOf(session.identity), session);
  }

  /** Why the last pair that a peer had with us is over, if it is and it has not sent NEW since. */
  lostPair(peer: string): PdError | undefined {
    return this.#lost.get(peer);
  }

  lose(peer: string, reason: PdError): void {
    remember(this.#lost, peer, reason, MOST);
  }

  /** Makes place by forgetting peers that have neither a pair nor a message waiting. */
  #evict(): void {
    if (this.#byIdentity.size < MOST) return;
    for (const [key, session] of this.#byIdentity) {
      if ((session.ended || !session.paired) && session.queued === 0) this.#byIdentity.delete(key);
      if (this.#byIdentity.size < MOST) return;
    }
  }
}

function keyOf(identity: Buffer): string {
  return identity.toString('latin1');
}
