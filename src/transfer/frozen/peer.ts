/** A peer that we send to (PUT) or ask (GET): the queue towards it, and the link that is alive now. */
import { PdError } from '../../errors.ts';
import type { Pair } from '../../transport/transport.ts';
import { countFailure, type TransferContext } from '../context.ts';
import type { PairState } from '../types.ts';
import type { Announcement } from './announcement.ts';
import { takeUnit } from './bundling.ts';
import { Link } from './link.ts';
import type { LinkEnd } from './link-events.ts';

/** A peer that is dead or does not fit fails what comes meanwhile at once, instead of costing each request a deadline. */
const REMEMBER_FAILURE_MS = 1_000;
/** Links that one announcement is tried on; ends that do not name it (the pair died before its turn) count too. */
const MOST_TRIES = 2;

export interface OutgoingPeerEvents {
  onOpen(): void;
  onEnd(): void;
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
  get ours(): boolean {
    return this.#link?.ours ?? false;
  }

  /** The pair of a link to a peer that is not ours. */
  get foreignPair(): Pair | undefined {
    return this.#link && !this.#link.ours ? this.#link.pair : undefined;
  }

  /** As `foreignPair`, of a link that was begun after `since`, once it is open. */
  async newerPair(since: number): Promise<Pair | undefined> {
    const link = this.#link;
    if (!link || link.ours || link.state === 'connecting' || link.since <= since) return undefined;
    const pair = await link.opened;
    return link.ours ? undefined : pair;
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
    if (this.openLink) announcement.pairOpened();
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

  /** The link, where its pair is open: what may be closed when there are too many. */
  get openLink(): Link | undefined {
    return this.#link?.state === 'open' ? this.#link : undefined;
  }

  state(): PairState {
    const link = this.#link;
    return {
      peer: this.peer,
      direction: 'outgoing',
      state: link?.state ?? 'over',
      ours: link?.ours ?? false,
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
    let opened = false;
    try {
      this.#link = new Link(this.#context, this.peer, {
        onOpen: () => {
          opened = true;
          for (const announcement of this.#queue) announcement.pairOpened();
          this.#events.onOpen();
          this.#schedule();
        },
        newerPair: (since) => this.#events.newerPair(this.peer, since),
        onForeignPut: () => this.#warnOfIds(),
        onGreeted: () => this.#schedule(),
        onSpace: (again) => {
          this.#reopened = 0;
          this.#queue.unshift(...again);
          this.#schedule();
        },
        onEnd: (end) => this.#ended(end, opened),
      });
    } catch (error) {
      this.#failQueue(PdError.from(error, 'INTERNAL', { peer: this.peer }));
    }
  }

  /** Announces after this turn of the event loop: what gets ready in one turn travels together. */
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
      if (first.cancelled) {
        this.#queue.shift();
        first.fail(new PdError('REQUEST_ABORTED', 'given up'));
      } else if (this.#link.mayAnnounce(first.direction)) {
        this.#link.announce(takeUnit(this.#context, this.#queue, this.#link.bundles));
      } else return;
    }
  }

  #ended({ error, unanswered, noPair, idle }: LinkEnd, opened: boolean): void {
    this.#link = undefined;
    this.#events.onEnd();
    const { log, deadlines, limited } = this.#context;
    if (idle) log.info({ peer: this.peer }, `link to ${this.peer} closed: ${error.message}`);
    else if (!this.#closed) {
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
    if (opened && (idle || ++this.#reopened <= MOST_TRIES)) {
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
