/** The sockets behind kv-feed.ts: one subscription for each instance that says what it has cached, and its snapshots. */
import { Dealer, Subscriber } from 'zeromq';
import { PdError } from '../errors.ts';
import { zmqEndpoint } from '../net/address.ts';
import { type Logger, RateLimitedLog } from '../observability/log.ts';
import {
  decodeKvEvents,
  decodeSequence,
  decodeSnapshot,
  MAX_KV_EVENTS_BYTES,
  MAX_SNAPSHOT_BYTES,
} from '../wire/kv-events.ts';
import type { KvEventPorts } from '../wire/messages.ts';
import { type CachedBlocks, KvFeed } from './kv-feed.ts';
import { type Instance, instanceLabel } from './registry.ts';

/** Batches that wait to be read: with their largest size, what one worker can fill. */
const HIGH_WATER_MARK = 64;
/** Of what one worker publishes in a second; one that says more is not listened to any more. A prompt's tokens are some 5 bytes each. */
const BYTES_PER_SECOND = 64 * 2 ** 20;
/** Between two questions for a snapshot that is not answered. */
const ASK_AGAIN_MS = 2_000;
/** After one that was, so many times as long as it took to take in, up to a second for a million blocks: streams wait meanwhile. */
const REST = 20;

export class KvFeeds {
  readonly #log: Logger;
  readonly #blocksOf: (instance: Instance) => CachedBlocks;
  readonly #onLost: (reason: 'gap' | 'invalid' | 'flood') => void;
  readonly #feeds = new Map<string, Subscription>();
  #blockSizes: readonly number[] | undefined;

  /** `onLost`: told of each time that what an instance says could not be followed. */
  constructor(
    log: Logger,
    blocksOf: (instance: Instance) => CachedBlocks,
    onLost: (reason: 'gap' | 'invalid' | 'flood') => void,
  ) {
    this.#log = log;
    this.#blocksOf = blocksOf;
    this.#onLost = onLost;
  }

  add(instance: Instance): void {
    this.remove(instance.httpAddress);
    if (!instance.events) return;
    const feed = new KvFeed(this.#blocksOf(instance));
    const subscription = new Subscription({
      instance,
      ports: instance.events,
      feed,
      log: this.#log,
      onLost: this.#onLost,
      onBlockSize: () => {
        this.#blockSizes = undefined;
      },
    });
    this.#feeds.set(instance.httpAddress, subscription);
  }

  remove(httpAddress: string): void {
    this.#feeds.get(httpAddress)?.close();
    this.#feeds.delete(httpAddress);
    this.#blockSizes = undefined;
  }

  /** Tokens per block of an instance whose cache is known; undefined where it is not. */
  blockSizeOf(httpAddress: string): number | undefined {
    const feed = this.#feeds.get(httpAddress)?.feed;
    return feed?.following ? feed.blockSize : undefined;
  }

  /** All that are known; the same list until they change. */
  get blockSizes(): readonly number[] {
    this.#blockSizes ??= [...new Set([...this.#feeds.values()].flatMap(({ feed }) => feed.blockSize ?? []))];
    return this.#blockSizes;
  }

  close(): void {
    for (const address of [...this.#feeds.keys()]) this.remove(address);
  }
}

interface SubscriptionOptions {
  readonly instance: Instance;
  readonly ports: KvEventPorts;
  readonly feed: KvFeed;
  readonly log: Logger;
  readonly onLost: (reason: 'gap' | 'invalid' | 'flood') => void;
  /** That of the feed is known now, or another. */
  readonly onBlockSize: () => void;
}

class Subscription {
  readonly feed: KvFeed;
  readonly #options: SubscriptionOptions;
  readonly #events: Subscriber;
  readonly #snapshots: Dealer;
  readonly #limited = new RateLimitedLog();
  /** Until it may be asked again. */
  #asked: NodeJS.Timeout | undefined;
  /** A question has not been answered. */
  #awaited = false;
  #second = 0;
  #bytes = 0;
  #closed = false;

  constructor(options: SubscriptionOptions) {
    const { instance, ports, feed } = options;
    this.#options = options;
    this.feed = feed;
    const { host } = instance.zmq;
    const socket = { linger: 0, ipv6: true, receiveHighWaterMark: HIGH_WATER_MARK };
    this.#events = new Subscriber({ ...socket, maxMessageSize: MAX_KV_EVENTS_BYTES });
    this.#snapshots = new Dealer({
      ...socket,
      receiveHighWaterMark: 2,
      sendHighWaterMark: 2,
      sendTimeout: 0,
      maxMessageSize: MAX_SNAPSHOT_BYTES,
    });
    // What was published while there was no connection is missing.
    this.#events.events.on('handshake', () => {
      feed.restart();
      if (this.#awaited) {
        clearTimeout(this.#asked);
        this.#asked = undefined;
      }
      this.#ask();
    });
    this.#events.subscribe();
    this.#events.connect(zmqEndpoint({ host, port: ports.publish }));
    this.#snapshots.connect(zmqEndpoint({ host, port: ports.snapshot }));
    void this.#read(this.#events, (frames) => this.#batch(frames));
    void this.#read(this.#snapshots, (frames) => this.#snapshot(frames));
  }

  /** Idempotent. */
  close(): void {
    if (this.#closed) return;
    this.#closed = true;
    clearTimeout(this.#asked);
    this.#events.close();
    this.#snapshots.close();
  }

  async #read(socket: Subscriber | Dealer, take: (frames: readonly Buffer[]) => void): Promise<void> {
    try {
      for await (const frames of socket) {
        if (this.#closed) return;
        const { blockSize } = this.feed;
        try {
          take(frames as readonly Buffer[]);
        } catch (error) {
          this.#lost('invalid', PdError.from(error).message);
        }
        if (this.feed.blockSize !== blockSize) this.#options.onBlockSize();
      }
    } catch (error) {
      if (!this.#closed) this.#lost('invalid', PdError.from(error).message);
    }
  }

  #batch([, sequence, body]: readonly Buffer[]): void {
    if (!sequence || !body) throw new PdError('MESSAGE_INVALID', 'KV events: not topic, sequence and batch');
    if (this.#floods(body.length)) return;
    if (!this.feed.batch(decodeSequence(sequence), decodeKvEvents(body))) return;
    this.#lost('gap', 'some of its KV events are missing');
  }

  #snapshot([, header, keys]: readonly Buffer[]): void {
    if (!header || !keys) throw new PdError('MESSAGE_INVALID', 'snapshot: not header and keys');
    if (this.#floods(keys.length) || !this.#awaited) return;
    const startedMs = performance.now();
    const snapshot = decodeSnapshot(header, keys);
    this.#awaited = false;
    const missing = this.feed.snapshot(snapshot);
    clearTimeout(this.#asked);
    this.#asked = this.#askAfter(REST * (performance.now() - startedMs));
    if (missing) this.#lost('gap', 'some of its KV events are missing');
  }

  #floods(bytes: number): boolean {
    const second = Math.floor(performance.now() / 1_000);
    if (second !== this.#second) {
      this.#second = second;
      this.#bytes = 0;
    }
    this.#bytes += bytes;
    if (this.#bytes <= BYTES_PER_SECOND) return false;
    this.#lost(
      'flood',
      `more than ${BYTES_PER_SECOND} bytes of KV events and snapshots in a second: they are not read any more`,
    );
    this.feed.restart();
    this.close();
    return true;
  }

  #lost(reason: 'gap' | 'invalid' | 'flood', what: string): void {
    const { instance, log, onLost } = this.#options;
    onLost(reason);
    this.#limited.log(reason, (suppressed) =>
      log.warn({ suppressed, reason }, `what ${instanceLabel(instance)} has cached: ${what}`),
    );
    if (reason === 'flood') return;
    this.feed.restart();
    this.#ask();
  }

  /** Until it is answered. */
  #ask(): void {
    if (this.#asked || this.#closed) return;
    this.#awaited = true;
    this.#asked = this.#askAfter(ASK_AGAIN_MS);
    this.#snapshots.send(['', 'snapshot']).catch((error: unknown) => {
      this.#options.log.debug({ err: PdError.from(error) }, 'a snapshot could not be asked for');
    });
  }

  /** If it is needed then. */
  #askAfter(ms: number): NodeJS.Timeout {
    return setTimeout(() => {
      this.#asked = undefined;
      if (!this.feed.following) this.#ask();
    }, ms).unref();
  }
}
