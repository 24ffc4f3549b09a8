/**
 * Publishes what enters and leaves this worker's prefix cache (docs/protocol.md, "KV events"), from the main thread: readers never delay a
 * step. One that reads too slowly loses batches, which it notices by their sequence; it can ask for them again, or for all that is cached.
 */
import { Publisher, Router } from 'zeromq';
import { PdError } from '../errors.ts';
import { keyOf } from '../kv/block-hash.ts';
import { formatHostPort, type HostPort, zmqEndpoint } from '../net/address.ts';
import { AllowList } from '../net/allow-list.ts';
import { listenError } from '../net/port-holder.ts';
import { ZapGate } from '../net/zap.ts';
import type { Logger } from '../observability/log.ts';
import type { CacheChange } from '../scheduler/types.ts';
import {
  type BlockKey,
  decodeSequence,
  END_OF_REPLAY,
  encodeKvEvents,
  encodeSequence,
  encodeSnapshot,
  type KvEvent,
  type KvEventForm,
  type KvMedium,
  kvTopic,
} from '../wire/kv-events.ts';
import type { KvEventPorts } from '../wire/messages.ts';

export interface KvEventsOptions {
  /** Where to listen; its port and the two after it, or any three for 0. */
  readonly bind: HostPort;
  readonly model: string;
  /** Tokens per block. */
  readonly blockSize: number;
  readonly form: KvEventForm;
  readonly medium: KvMedium;
  /** Addresses and ranges that may read; absent: everyone. */
  readonly allow?: readonly string[];
  readonly log: Logger;
}

/** Batches that can be asked for again, as in vLLM, and their bytes. */
const REPLAY_BATCHES = 10_000;
const REPLAY_BYTES = 64 * 2 ** 20;
/** Batches queued for a reader; beyond that it loses some. */
const HIGH_WATER_MARK = 100_000;
/** Tokens of a batch; what comes from more of them goes in several. */
const BATCH_TOKENS = 131_072;
/** Of a question. Bytes. */
const MAX_QUESTION = 1_024;

interface Sockets {
  readonly publish: Publisher;
  readonly replay: Router;
  readonly snapshot: Router;
}

interface Batch {
  readonly sequence: number;
  readonly bytes: Uint8Array;
}

/** Close it. */
export class KvEventPublisher {
  readonly ports: KvEventPorts;
  readonly #options: KvEventsOptions;
  readonly #gate: ZapGate | undefined;
  readonly #sockets: Sockets;
  readonly #cached = new Set<BlockKey>();
  readonly #batches: Batch[] = [];
  #batchBytes = 0;
  #sequence = 0;
  #topic = '';
  /** Of the batches before. */
  #sending: Promise<void> = Promise.resolve();
  #closed = false;
  readonly #answering: Promise<unknown>;

  private constructor(options: KvEventsOptions, gate: ZapGate | undefined, sockets: Sockets) {
    this.#options = options;
    this.#gate = gate;
    this.#sockets = sockets;
    this.ports = {
      publish: portOf(sockets.publish),
      replay: portOf(sockets.replay),
      snapshot: portOf(sockets.snapshot),
    };
    this.#answering = Promise.all([
      this.#answer(sockets.replay, (question) => this.#replayed(question)),
      this.#answer(sockets.snapshot, () => [this.#snapshotFrames()]),
    ]);
  }

  /** Listens. Throws PORT_IN_USE, or ADDRESS_INVALID. */
  static async open(options: KvEventsOptions): Promise<KvEventPublisher> {
    const { allow, log, bind } = options;
    const gate =
      allow &&
      (await ZapGate.open({ allow: AllowList.parse(allow, '--allow-peers'), what: 'KV events', log }));
    const socket = { ...gate?.socketOptions, linger: 0, ipv6: bind.host.includes(':') };
    const asked = { ...socket, maxMessageSize: MAX_QUESTION, sendTimeout: 0 };
    const sockets: Sockets = {
      publish: new Publisher({ ...socket, sendHighWaterMark: HIGH_WATER_MARK }),
      replay: new Router(asked),
      snapshot: new Router(asked),
    };
    let address = bind;
    try {
      for (const [offset, one] of [sockets.publish, sockets.replay, sockets.snapshot].entries()) {
        address = { host: bind.host, port: bind.port === 0 ? 0 : bind.port + offset };
        await one.bind(zmqEndpoint(address).replace(/:0$/, ':*'));
      }
      return new KvEventPublisher(options, gate, sockets);
    } catch (cause) {
      for (const one of Object.values(sockets)) one.close();
      await gate?.close();
      throw await listenError(cause, address, `KV events at ${formatHostPort(address)}`);
    }
  }

  /** Batches are published under the name of this HTTP address, which must be announced before the first. */
  announce(httpAddress: string): void {
    const { model, bind, log } = this.#options;
    this.#topic = kvTopic(httpAddress, model);
    const { publish, replay, snapshot } = this.ports;
    const address = formatHostPort({ host: bind.host, port: publish });
    log.info(
      `KV events on tcp://${address} as ${this.#topic}; replay on port ${replay}, snapshot on port ${snapshot}`,
    );
  }

  /** What has happened to the cache, in order. */
  publish(changes: readonly CacheChange[]): void {
    let events: KvEvent[] = [];
    let tokens = 0;
    for (const event of this.#eventsOf(changes)) {
      events.push(event);
      tokens += event.type === 'stored' ? event.tokens.length : 1;
      if (tokens < BATCH_TOKENS) continue;
      this.#send(events);
      events = [];
      tokens = 0;
    }
    if (events.length > 0) this.#send(events);
  }

  async close(): Promise<void> {
    if (!this.#closed) {
      this.#closed = true;
      for (const socket of Object.values(this.#sockets)) socket.close();
    }
    await Promise.all([this.#sending, this.#answering]);
    await this.#gate?.close();
  }

  *#eventsOf(changes: readonly CacheChange[]): Generator<KvEvent> {
    const { blockSize } = this.#options;
    let removed: BlockKey[] = [];
    for (const change of changes) {
      if (change.type === 'removed') {
        const key = keyOf(change.hash);
        this.#cached.delete(key);
        removed.push(key);
        continue;
      }
      if (removed.length > 0) yield { type: 'removed', keys: removed };
      removed = [];
      const keys = change.hashes.map(keyOf);
      for (const key of keys) this.#cached.add(key);
      const { parent } = change;
      yield {
        type: 'stored',
        keys,
        ...(parent !== undefined && { parent: keyOf(parent) }),
        tokens: Array.from(change.tokens),
        blockSize,
      };
    }
    if (removed.length > 0) yield { type: 'removed', keys: removed };
  }

  #send(events: readonly KvEvent[]): void {
    const { form, medium, log } = this.#options;
    const bytes = encodeKvEvents({ time: Date.now() / 1_000, events }, form, medium);
    const sequence = this.#sequence++;
    this.#batches.push({ sequence, bytes });
    this.#batchBytes += bytes.length;
    while (this.#batches.length > REPLAY_BATCHES || this.#batchBytes > REPLAY_BYTES) {
      this.#batchBytes -= this.#batches.shift()!.bytes.length;
    }
    this.#sending = this.#sending
      .then(() =>
        this.#closed ? undefined : this.#sockets.publish.send([this.#topic, encodeSequence(sequence), bytes]),
      )
      .catch((error: unknown) => {
        if (!this.#closed)
          log.warn({ err: PdError.from(error) }, `KV events of sequence ${sequence} were not published`);
      });
  }

  #replayed(question: Uint8Array): (readonly Uint8Array[])[] {
    const from = decodeSequence(question);
    const known = this.#batches.filter(({ sequence }) => sequence >= from);
    const frames = known.map(({ sequence, bytes }) => [encodeSequence(sequence), bytes]);
    return [...frames, [encodeSequence(END_OF_REPLAY), new Uint8Array()]];
  }

  #snapshotFrames(): readonly Uint8Array[] {
    const { blockSize } = this.#options;
    return encodeSnapshot({ sequence: this.#sequence - 1, blockSize, keys: [...this.#cached] });
  }

  /** Answers questions one by one. As a REQ sends them, or a DEALER with an empty frame before. */
  async #answer(
    router: Router,
    answersTo: (question: Uint8Array) => (readonly Uint8Array[])[],
  ): Promise<void> {
    const { log } = this.#options;
    try {
      for await (const [identity, delimiter, question] of router) {
        if (!identity || delimiter?.length !== 0 || !question) continue;
        try {
          for (const frames of answersTo(question)) await router.send([identity, delimiter, ...frames]);
        } catch (error) {
          if (!this.#closed)
            log.debug({ err: PdError.from(error) }, 'a question about KV events was not answered');
        }
      }
    } catch (error) {
      if (!this.#closed)
        log.error({ err: PdError.from(error) }, 'questions about KV events are not answered any more');
    }
  }
}

function portOf({ lastEndpoint }: Publisher | Router): number {
  return Number(/:(\d+)$/.exec(lastEndpoint ?? '')![1]);
}
