/** Every peer that we announce to, by its address; those of no more use are forgotten in time. */
import type { TransferContext } from '../context.ts';
import type { OpenPair } from '../pair-limit.ts';
import type { PairState } from '../types.ts';
import { OutgoingPeer, type OutgoingPeerEvents } from './peer.ts';

/** Fewer than this cost nothing worth a timer. */
const KEPT_ANYWAY = 64;
const FORGET_EVERY_MS = 10_000;

export class OutgoingPeers {
  readonly #context: TransferContext;
  readonly #events: OutgoingPeerEvents;
  readonly #peers = new Map<string, OutgoingPeer>();
  #forgetting = false;

  constructor(context: TransferContext, events: OutgoingPeerEvents) {
    this.#context = context;
    this.#events = events;
  }

  /** Throws ADDRESS_INVALID where `peer` is none, once something is sent to it. */
  of(peer: string): OutgoingPeer {
    const known = this.#peers.get(peer);
    if (known) return known;
    const made = new OutgoingPeer(this.#context, peer, this.#events);
    this.#peers.set(peer, made);
    this.#forget();
    return made;
  }

  known(peer: string): OutgoingPeer | undefined {
    return this.#peers.get(peer);
  }

  all(): OutgoingPeer[] {
    return [...this.#peers.values()];
  }

  open(): OpenPair[] {
    return this.all().flatMap(({ openLink }) => openLink ?? []);
  }

  /** Of those that have a link, or something to send. */
  states(): PairState[] {
    return this.all()
      .map((peer) => peer.state())
      .filter(({ state, queued }) => state !== 'over' || queued > 0);
  }

  #forget(): void {
    if (this.#forgetting || this.#peers.size < KEPT_ANYWAY) return;
    this.#forgetting = true;
    this.#context.deadlines.after(FORGET_EVERY_MS, () => {
      this.#forgetting = false;
      for (const [key, peer] of this.#peers) if (peer.idle) this.#peers.delete(key);
      this.#forget();
    });
  }
}
