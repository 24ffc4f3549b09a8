/**
 * Rank 0's side of opening pairs: one listening port for all of them. A connection shows which pair it is for; one that shows nothing
 * valid in time is closed.
 */
import { createServer, type Server, type Socket } from 'node:net';
import { hostMemory, hostView } from '../../device/memory.ts';
import { PdError } from '../../errors.ts';
import { formatHostPort } from '../../net/address.ts';
import { type AllowList, plainAddress } from '../../net/allow-list.ts';
import { type Logger, RateLimitedLog } from '../../observability/log.ts';
import { DataSocket } from './data-socket.ts';
import { decodeHandshake, encodeHandshake, HANDSHAKE_BYTES, tokenKey } from './handshake.ts';
import { RegionCursor } from './region-cursor.ts';

/** Connections that have not shown a token yet; further ones are closed. */
const MAX_STRANGERS = 256;
/** Ids that were made and never opened; the oldest are forgotten. */
const MAX_EXPECTED = 4096;

/** Milliseconds. */
export interface AcceptorTimeouts {
  /** A connection shows its token within this. */
  readonly handshake: number;
  /** A connection that shows its token before this end's `open` waits this long for it. */
  readonly parked: number;
}

/** Who may connect; others are closed before a byte of theirs is read. */
export interface Guard {
  readonly allow: AllowList;
  readonly log: Logger;
  readonly onRefused: () => void;
}

interface Expected {
  readonly token: Uint8Array;
  /** Came before its `open`. */
  parked?: { readonly socket: DataSocket; readonly timer: NodeJS.Timeout };
  claim?: (socket: DataSocket) => void;
}

export class Acceptor {
  readonly #server: Server;
  readonly #timeouts: AcceptorTimeouts;
  readonly #guard: Guard | undefined;
  readonly #limited = new RateLimitedLog();
  readonly #expected = new Map<string, Expected>();
  readonly #strangers = new Set<DataSocket>();

  private constructor(server: Server, timeouts: AcceptorTimeouts, guard: Guard | undefined) {
    this.#server = server;
    this.#guard = guard;
    this.#timeouts = timeouts;
    server.on('connection', (socket) => this.#accept(socket));
    // Failures of accept (no file descriptors left) concern one connection; its peer sees its own deadline.
    server.on('error', () => {});
  }

  /** On a port of `host` that the system chooses. */
  static listen(host: string, timeouts: AcceptorTimeouts, guard?: Guard): Promise<Acceptor> {
    const server = createServer({ pauseOnConnect: true });
    return new Promise((resolve, reject) => {
      const fail = (cause: Error) => {
        const where = formatHostPort({ host, port: 0 });
        reject(PdError.because('ADDRESS_INVALID', `data port on ${where}`, cause));
      };
      server.once('error', fail);
      server.listen({ host, port: 0 }, () => {
        server.off('error', fail);
        resolve(new Acceptor(server, timeouts, guard));
      });
    });
  }

  get port(): number {
    const address = this.#server.address();
    return typeof address === 'object' && address ? address.port : 0;
  }

  /** From now on a connection may show this token. */
  expect(token: Uint8Array): void {
    if (this.#expected.size >= MAX_EXPECTED) {
      const oldest = [...this.#expected].find(([, expected]) => !expected.claim);
      if (oldest) this.forget(oldest[1].token);
    }
    this.#expected.set(tokenKey(token, 'first'), { token });
  }

  /** Calls `claim`, once, with the connection that shows the token; false where the token is not expected. */
  claim(token: Uint8Array, claim: (socket: DataSocket) => void): boolean {
    const expected = this.#expected.get(tokenKey(token, 'first'));
    if (!expected || expected.claim) return false;
    expected.claim = claim;
    if (expected.parked) this.#handOver(expected, expected.parked.socket);
    return true;
  }

  /** A connection that shows the token from now on is closed. */
  forget(token: Uint8Array): void {
    const parked = this.#take(token)?.parked;
    parked?.socket.destroy();
  }

  /** Idempotent. Connections handed over are their owners'. */
  async close(): Promise<void> {
    const listening = new Promise<void>((resolve) => this.#server.close(() => resolve()));
    for (const { token } of this.#expected.values()) this.forget(token);
    const closed = [...this.#strangers].map((socket) => socket.closed);
    for (const socket of this.#strangers) socket.destroy();
    await Promise.all([listening, ...closed]);
  }

  #accept(accepted: Socket): void {
    if (!this.#admits(accepted.remoteAddress ?? '')) {
      accepted.destroy();
      return;
    }
    if (this.#strangers.size >= MAX_STRANGERS) {
      accepted.destroy();
      return;
    }
    const socket = DataSocket.adopt(accepted);
    this.#strangers.add(socket);
    const timer = setTimeout(() => socket.destroy(), this.#timeouts.handshake);
    void socket.closed.then(() => {
      clearTimeout(timer);
      this.#strangers.delete(socket);
    });
    const handshake = hostMemory(HANDSHAKE_BYTES);
    socket.read(new RegionCursor([handshake]), () => {
      clearTimeout(timer);
      const expected = this.#expected.get(decodeHandshake(hostView(handshake)) ?? '');
      if (!expected || expected.parked) {
        socket.destroy();
        return;
      }
      if (expected.claim) {
        this.#handOver(expected, socket);
        return;
      }
      expected.parked = {
        socket,
        timer: setTimeout(() => this.forget(expected.token), this.#timeouts.parked),
      };
    });
  }

  #admits(address: string): boolean {
    const guard = this.#guard;
    if (!guard || guard.allow.allows(address)) return true;
    guard.onRefused();
    const plain = plainAddress(address);
    this.#limited.log(plain, (suppressed) =>
      guard.log.warn(
        { address: plain, suppressed },
        `data connection from ${plain} refused, it is not in --allow-peers (${guard.allow})`,
      ),
    );
    return false;
  }

  #handOver(expected: Expected, socket: DataSocket): void {
    this.#strangers.delete(socket);
    this.#take(expected.token);
    socket.write([encodeHandshake(expected.token, 'second')], () => {});
    expected.claim?.(socket);
  }

  #take(token: Uint8Array): Expected | undefined {
    const key = tokenKey(token, 'first');
    const expected = this.#expected.get(key);
    this.#expected.delete(key);
    clearTimeout(expected?.parked?.timer);
    return expected;
  }
}
