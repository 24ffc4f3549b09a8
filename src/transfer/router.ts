/**
 * The ROUTER that peers talk to: bound once, messages in, answers out in the order they were given. `handover`, because otherwise a
 * restarted peer of the same routing id would be dropped in silence; `mandatory`, because otherwise an answer to nobody is lost so.
 */
import * as zmq from 'zeromq';
import { PdError } from '../errors.ts';
import { formatHostPort, type HostPort, zmqEndpoint } from '../net/address.ts';
import { listenError } from '../net/port-holder.ts';
import type { ZapGate } from '../net/zap.ts';
import type { Logger } from '../observability/log.ts';
import { MAX_BODY_BYTES } from '../wire/limits.ts';

/** Messages waiting per peer, either way; beyond it zeromq stops reading the peer's connection. */
const HIGH_WATER_MARK = 16_384;

/** For zeromq to give the port back. */
const CLOSE_MS = 1_000;

export interface RouterEvents {
  /** One message of the right number of frames. Must not throw. */
  onMessage(identity: Buffer, body: Buffer): void;
  onBadFrames(frames: number): void;
  /** An answer could not be delivered. */
  onUndelivered(identity: Buffer, error: PdError): void;
}

interface Outgoing {
  readonly identity: Buffer;
  readonly body: Uint8Array;
}

export class Router {
  readonly port: number;
  readonly #socket: zmq.Router;
  readonly #log: Logger;
  #events: RouterEvents | undefined;
  #outgoing: Outgoing[] = [];
  #sending = false;
  #closed = false;
  #closing: Promise<void> | undefined;
  #ended: Promise<void> = Promise.resolve();

  private constructor(socket: zmq.Router, port: number, log: Logger) {
    this.#socket = socket;
    this.port = port;
    this.#log = log;
  }

  /**
   * Throws PORT_IN_USE with the holder where that can be known. Port 0 lets the system choose. `gate` is the caller's to close, later.
   * `maxMessageSize`: bytes.
   */
  static async bind(
    address: HostPort,
    log: Logger,
    gate?: ZapGate,
    maxMessageSize = MAX_BODY_BYTES,
  ): Promise<Router> {
    const socket = new zmq.Router({
      ...gate?.socketOptions,
      handover: true,
      mandatory: true,
      linger: 0,
      ipv6: true,
      maxMessageSize,
      sendHighWaterMark: HIGH_WATER_MARK,
      receiveHighWaterMark: HIGH_WATER_MARK,
      sendTimeout: 0,
    });
    try {
      await socket.bind(zmqEndpoint(address));
    } catch (error) {
      socket.close();
      throw await listenError(error, address, `KV listener at ${formatHostPort(address)}`);
    }
    const port = Number(/:(\d+)$/.exec(socket.lastEndpoint ?? '')?.[1] ?? address.port);
    return new Router(socket, port, log);
  }

  /** Starts listening to messages. */
  start(events: RouterEvents): void {
    this.#events = events;
    this.#ended = this.#receive(events);
  }

  answer(identity: Buffer, body: Uint8Array): void {
    if (this.#closed) return;
    this.#outgoing.push({ identity, body });
    if (!this.#sending) void this.#drain();
  }

  /** Idempotent. Answers that have not left are dropped. Resolves when the port is free again. */
  close(): Promise<void> {
    this.#closing ??= this.#close();
    return this.#closing;
  }

  async #close(): Promise<void> {
    this.#closed = true;
    this.#outgoing = [];
    // zeromq gives the port back on a thread of its own, some time after `close` has returned.
    let timer: NodeJS.Timeout | undefined;
    const freed = new Promise<void>((resolve) => {
      timer = setTimeout(resolve, CLOSE_MS);
      this.#socket.events.on('end', () => resolve());
    });
    this.#socket.close();
    await Promise.all([freed, this.#ended]);
    clearTimeout(timer);
  }

  /** zeromq sends one message at a time. */
  async #drain(): Promise<void> {
    this.#sending = true;
    for (let next = this.#outgoing.shift(); next && !this.#closed; next = this.#outgoing.shift()) {
      const { identity, body } = next;
      try {
        await this.#socket.send([identity, body]);
      } catch (cause) {
        if (this.#closed) break;
        const peer = identity.toString();
        const why = PdError.from(cause).message;
        this.#events?.onUndelivered(
          identity,
          new PdError(
            'PEER_LOST',
            `an answer to ${peer} could not be delivered: ${why}`,
            { peer },
            { cause },
          ),
        );
      }
    }
    this.#sending = false;
  }

  async #receive(events: RouterEvents): Promise<void> {
    try {
      for await (const frames of this.#socket) {
        if (this.#closed) return;
        const [identity, body] = frames;
        if (identity && body && frames.length === 2) events.onMessage(identity, body);
        else events.onBadFrames(frames.length);
      }
    } catch (error) {
      if (!this.#closed) this.#log.error({ err: PdError.from(error) }, 'the KV listener stopped');
    }
  }
}
