/** The peers that we send to (PUT) or ask (GET): of each the queue towards it, and the link that is alive now. */
import { PdError } from '../../errors.ts';
import type { Pair } from '../../transport/transport.ts';
import { countFailure, type TransferContext } from '../context.ts';
import { Sweep } from '../deadlines.ts';
import type { PairState } from '../types.ts';
import { type Announcement, Link, type LinkEnd } from './link.ts';

/** A peer that is dead or does not fit fails what comes meanwhile at once, instead of costing each request a deadline. */
const REMEMBER_FAILURE_MS = 1_000;
/** Links that one announcement is tried on; ends that do not name it (the pair died before its turn) count too. */
const MOST_TRIES = 2;
/** Peers that are kept anyway: fewer cost nothing worth a timer. */
const KEPT_ANYWAY = 64;
const FORGET_EVERY_MS = 10_000;

export interface OutgoingPeerEvents {
  /** A pair was opened or is over. */
  pairsChanged(): void;
  /** The pair that a peer which is not ours has opened to us after `since`, if it is open. */
  newerPair(peer: string, since: number): Pair | undefined;
}

export class OutgoingPeer {
  readonly peer: string;
  readonly #context: TransferContext;
  readonly #events: OutgoingPeerEvents;
  #queue: Announcement[] = [];
  #link: Link | undefined;
  #failure: { readonly error: PdError; readonly until: number } | undefined;
  #reopened = 0;
  #warned = false;
  #pumping = false;
  #closed: PdError | undefined;

  constructor(context: TransferContext, peer: string, events: OutgoingPeerEvents) {
    this.#context = context;
    this.peer = peer;
    this.#events = events;
  }

  /** Nothing is queued, alive or remembered: the peer may be forgotten. */
  get idle(): boolean {
    return !this.#link && this.#queue.length === 0 && !this.#recentFailure();
  }

  /** Known to be ours: its last link has said so. */
  get native(): boolean {
    return this.#link?.native ?? false;
  }

  /** The pair of a link to a peer that is not ours. */
  get frozenPair(): Pair | undefined {
    return this.#link && !this.#link.native ? this.#link.pair : undefined;
  }

  /** As `frozenPair`, of a link that was begun after `since`, once it is open. */
  async newerPair(since: number): Promise<Pair | undefined> {
    const link = this.#link;
    if (!link || link.native || link.state === 'connecting' || link.since <= since) return undefined;
    const pair = await link.opened;
    return link.native ? undefined : pair;
  }

  get queued(): number {
    return this.#queue.length + (this.#link?.outstanding ?? 0);
  }

  /** Queues an announcement. It leaves in its turn, once it is ready. */
  submit(announcement: Announcement): void {
    const { limits } = this.#context.options;
    const refusal = this.#closed ?? this.#recentFailure();
    if (refusal) {
      announcement.fail(refusal);
      return;
    }
    if (this.queued >= limits.maxQueuePerPeer) {
      announcement.fail(
        new PdError('KV_BUFFER_FULL', `${this.queued} announcements to ${this.peer} are waiting already`, {
          peer: this.peer,
          tensorId: announcement.tensorId,
        }),
      );
      return;
    }
    this.#queue.push(announcement);
    if (this.open) announcement.pairOpened();
    announcement.onReady(() => this.#schedule());
    this.#schedule();
  }

  /** An announcement that failed or was cancelled before its turn. */
  withdraw(announcement: Announcement): void {
    const at = this.#queue.indexOf(announcement);
    if (at < 0) return;
    this.#queue.splice(at, 1);
    this.#schedule();
  }

  /** Opens a link where there is none: to a peer whose listener must replace its pair. */
  connect(): void {
    if (this.#link || this.#closed || this.#recentFailure()) return;
    this.#open();
  }

  /** Its pair is open. */
  get open(): boolean {
    return this.#link?.state === 'open';
  }

  state(): PairState {
    const link = this.#link;
    return {
      peer: this.peer,
      direction: 'outgoing',
      state: link?.state ?? 'over',
      native: link?.native ?? false,
      queued: this.#queue.length,
      outstanding: link?.outstanding ?? 0,
      sinceMs: link ? Math.round(this.#context.deadlines.now() - link.since) : 0,
    };
  }

  /** Fails everything. */
  close(reason: PdError): void {
    this.#closed = reason;
    this.#link?.end(reason);
    this.#failQueue(reason);
  }

  /** Nobody can tell from here whether its requests will find what they are sent. */
  #warnOfIds(): void {
    if (this.#warned) return;
    this.#warned = true;
    this.#context.log.warn(
      { peer: this.peer },
      `${this.peer} is no worker of ours: if it is vLLM 0.14 or later, its requests find KV that is sent to them only where it runs ` +
        'with VLLM_DISABLE_REQUEST_ID_RANDOMIZATION=1 (told once)',
    );
  }

  #recentFailure(): PdError | undefined {
    if (this.#failure && this.#failure.until <= this.#context.deadlines.now()) this.#failure = undefined;
    return this.#failure?.error;
  }

  #open(): void {
    try {
      this.#link = new Link(this.#context, this.peer, {
        onOpen: () => {
          for (const announcement of this.#queue) announcement.pairOpened();
          this.#events.pairsChanged();
          this.#schedule();
        },
        newerPair: (since) => this.#events.newerPair(this.peer, since),
        onFrozenPut: () => this.#warnOfIds(),
        onGreeted: () => this.#schedule(),
        onAnswered: () => {
          this.#reopened = 0;
          this.#schedule();
        },
        onEnd: (end) => this.#ended(end),
      });
    } catch (error) {
      this.#failQueue(PdError.from(error, 'INTERNAL', { peer: this.peer }));
    }
  }

  /** Announces after this turn of the event loop. */
  #schedule(): void {
    if (this.#pumping) return;
    this.#pumping = true;
    setImmediate(() => {
      this.#pumping = false;
      this.#pump();
    });
  }

  #pump(): void {
    if (this.#closed || this.#queue.length === 0) return;
    if (!this.#link) {
      this.#open();
      return;
    }
    for (;;) {
      const [first] = this.#queue;
      // One that was given up never gets ready, and must not hold up what stands behind it.
      if (!this.#link || !first || !(first.ready || first.cancelled)) return;
      if (!first.cancelled && !this.#link.mayAnnounce) return;
      this.#queue.shift();
      if (first.cancelled) first.fail(new PdError('REQUEST_ABORTED', 'given up'));
      else this.#link.announce(first);
    }
  }

  #ended({ error, unanswered, noPair, opened }: LinkEnd): void {
    this.#link = undefined;
    this.#events.pairsChanged();
    const { log, deadlines, limited } = this.#context;
    if (!this.#closed) {
      const fields = {
        peer: this.peer,
        code: error.code,
        unanswered: unanswered.length,
        queued: this.#queue.length,
      };
      const text = `link to ${this.peer} ended: ${error.message}`;
      // A peer that leaves while nothing is asked of it has ended, not failed.
      if (error.code === 'PEER_LOST' && fields.unanswered + fields.queued === 0) log.info(fields, text);
      else {
        countFailure(this.#context, this.peer, error);
        limited.log(`link ${this.peer} ${error.code}`, (suppressed) =>
          log.warn({ ...fields, suppressed }, text),
        );
      }
    }
    const again: Announcement[] = [];
    // Unanswered means not accepted, or accepted on a pair that is gone: once, it is worth a new pair.
    const worthAnother = noPair || (opened && error.code === 'PEER_LOST');
    for (const announcement of unanswered) {
      if (worthAnother && !announcement.renewed && !announcement.cancelled) {
        announcement.renewed = true;
        again.push(announcement);
      } else {
        announcement.fail(error);
      }
    }
    this.#queue = [...again, ...this.#queue];
    // What was not announced is tried on a new link, unless this one never came to be, or dies again and again.
    if (opened && ++this.#reopened <= MOST_TRIES) {
      this.#schedule();
      return;
    }
    this.#reopened = 0;
    if (!this.#closed) this.#failure = { error, until: deadlines.now() + REMEMBER_FAILURE_MS };
    this.#failQueue(error);
  }

  #failQueue(error: PdError): void {
    const queue = this.#queue;
    this.#queue = [];
    for (const announcement of queue) announcement.fail(error);
  }
}

/** All of them, by address; those of no more use are forgotten in time. */
export class OutgoingPeers {
  readonly #context: TransferContext;
  readonly #events: OutgoingPeerEvents;
  readonly #peers = new Map<string, OutgoingPeer>();
  readonly #sweep: Sweep;

  constructor(context: TransferContext, events: OutgoingPeerEvents) {
    this.#context = context;
    this.#events = events;
    this.#sweep = new Sweep(context.deadlines, FORGET_EVERY_MS, () => this.#forgetIdle());
  }

  /** Throws ADDRESS_INVALID where `peer` is none, once something is sent to it. */
  of(peer: string): OutgoingPeer {
    const known = this.#peers.get(peer);
    if (known) return known;
    const made = new OutgoingPeer(this.#context, peer, this.#events);
    this.#peers.set(peer, made);
    if (this.#peers.size >= KEPT_ANYWAY) this.#sweep.arm();
    return made;
  }

  known(peer: string): OutgoingPeer | undefined {
    return this.#peers.get(peer);
  }

  get openPairs(): number {
    return [...this.#peers.values()].filter(({ open }) => open).length;
  }

  /** Of those that have a link, or something to send. */
  states(): PairState[] {
    return [...this.#peers.values()]
      .map((peer) => peer.state())
      .filter(({ state, queued }) => state !== 'over' || queued > 0);
  }

  /** Fails everything. */
  close(reason: PdError): void {
    for (const peer of this.#peers.values()) peer.close(reason);
  }

  #forgetIdle(): boolean {
    for (const [key, peer] of this.#peers) if (peer.idle) this.#peers.delete(key);
    return this.#peers.size >= KEPT_ANYWAY;
  }
}
