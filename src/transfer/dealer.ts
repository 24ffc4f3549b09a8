/**
 * One connection to a peer's ROUTER: bodies out in order, answers in as they come. A new one for each pair, closed with it: `linger: 0`
 * and `immediate`, because a NEW that waits for a dead port would be delivered to whoever binds there later.
 */
import { isIP } from 'node:net';
import * as zmq from 'zeromq';
import { PdError } from '../errors.ts';
import { asDestination, type HostPort, parseHostPort, zmqEndpoint } from '../net/address.ts';
import { reachable } from '../net/knock.ts';
import { MAX_BODY_BYTES } from '../wire/limits.ts';

/** Whom nobody listens for is told from who is slow: a port that refuses this long is dead, and need not cost the whole deadline. */
const REFUSED_MS = 1_000;

export interface DealerOptions {
  /** Our routing id. */
  readonly self: string;
  /** `host:port` of the peer's ROUTER. */
  readonly peer: string;
  /** For the first message to find a connection, and for each later one. */
  readonly connectTimeoutMs: number;
  /** Of an answer, bytes; what the frozen wire allows where nothing is said. */
  readonly maxMessageSize?: number;
  onAnswer(body: Uint8Array): void;
  /** Once; the dealer is closed then. */
  onLost(error: PdError): void;
}

export class Dealer {
  readonly #options: DealerOptions;
  readonly #socket: zmq.Dealer;
  #sending: Promise<void> = Promise.resolve();
  #connected = false;
  #closed = false;

  constructor(options: DealerOptions) {
    this.#options = options;
    const address = asDestination(parseHostPort(options.peer, 'peer address'));
    this.#socket = new zmq.Dealer({
      routingId: options.self,
      linger: 0,
      immediate: true,
      ipv6: true,
      sendTimeout: options.connectTimeoutMs,
      maxMessageSize: options.maxMessageSize ?? MAX_BODY_BYTES,
      reconnectInterval: 50,
    });
    this.#socket.events.on('disconnect', () => {
      if (this.#connected) this.#lost('PEER_LOST', 'the peer closed the control connection');
    });
    const begun = performance.now();
    this.#socket.events.on('connect:retry', () => {
      const ms = Math.round(performance.now() - begun);
      if (!this.#connected && ms >= REFUSED_MS) {
        this.#lost('PEER_UNREACHABLE', `its port has refused connections for ${ms} ms`);
      }
    });
    if (isIP(address.host) !== 0) this.#socket.connect(zmqEndpoint(address));
    else void this.#connectByName(address);
    void this.#receive();
  }

  /** ZeroMQ would try one address of a name, and ask for it in its own way. */
  async #connectByName(address: HostPort): Promise<void> {
    try {
      const found = await reachable(address, this.#options.connectTimeoutMs);
      if (!this.#closed) this.#socket.connect(zmqEndpoint(found));
    } catch (error) {
      this.#lost('PEER_UNREACHABLE', PdError.from(error).message);
    }
  }

  /** Resolves once the body has left, false where the connection was lost before (`onLost` has said so). Order is kept. */
  send(body: Uint8Array): Promise<boolean> {
    const sent = this.#sending.then(async () => {
      if (this.#closed) return false;
      try {
        await this.#socket.send(body);
        this.#connected = true;
        return true;
      } catch (error) {
        const { connectTimeoutMs } = this.#options;
        const why =
          (error as NodeJS.ErrnoException).code === 'EAGAIN'
            ? `no connection within ${connectTimeoutMs} ms`
            : PdError.from(error).message;
        this.#lost(this.#connected ? 'PEER_LOST' : 'PEER_UNREACHABLE', why);
        return false;
      }
    });
    this.#sending = sent.then(() => undefined);
    return sent;
  }

  /** Idempotent. What has not left is dropped. */
  close(): void {
    if (this.#closed) return;
    this.#closed = true;
    this.#socket.close();
  }

  async #receive(): Promise<void> {
    try {
      for await (const frames of this.#socket) {
        if (this.#closed) return;
        const [body] = frames;
        if (body && frames.length === 1) this.#options.onAnswer(body);
        else return this.#lost('MESSAGE_INVALID', `an answer of ${frames.length} frames`);
      }
    } catch (error) {
      this.#lost('PEER_LOST', PdError.from(error).message);
    }
  }

  #lost(code: 'PEER_LOST' | 'PEER_UNREACHABLE' | 'MESSAGE_INVALID', why: string): void {
    if (this.#closed) return;
    this.close();
    const { peer } = this.#options;
    this.#options.onLost(new PdError(code, `peer ${peer}: ${why}`, { peer }));
  }
}
