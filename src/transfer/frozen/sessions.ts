/** The peers that have talked to our ROUTER, by routing id. Bounded: a peer costs little, but anyone can make routing ids up. */
import type { PdError } from '../../errors.ts';
import type { Deadlines } from '../deadlines.ts';
import { Session } from './session.ts';

const MOST = 4_096;

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
    const session = new Session({
      identity,
      peer: identity.toString(),
      since: this.#clock.now(),
      paired: false,
    });
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
    this.#lost.delete(peer);
    this.#lost.set(peer, reason);
    if (this.#lost.size > MOST) this.#lost.delete(this.#lost.keys().next().value!);
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
