/** The transport for a machine without a GPU: each pair is a TCP connection between memory of two processes, or of one. */
import { isIPv4 } from 'node:net';
import { hostMemory, hostView } from '../../device/memory.ts';
import { PdError } from '../../errors.ts';
import { formatHostPort } from '../../net/address.ts';
import { hostAddress } from '../../net/local.ts';
import type { UniqueId } from '../../wire/messages.ts';
import type { OpenOptions, Pair, Transport } from '../transport.ts';
import { Acceptor, type AcceptorTimeouts, type Guard } from './acceptor.ts';
import { DataSocket } from './data-socket.ts';
import { decodeHandshake, encodeHandshake, HANDSHAKE_BYTES, tokenKey } from './handshake.ts';
import { HostPair } from './pair.ts';
import { RegionCursor } from './region-cursor.ts';
import { type DataAddress, decodeUniqueId, encodeUniqueId } from './unique-id.ts';

export interface HostTransportOptions {
  /** Where data connections are taken: an address, or `0.0.0.0` and `::` for every interface. */
  readonly bindHost: string;
  /** The host that peers connect to; a name is resolved once, here. */
  readonly announceHost: string;
  readonly acceptor?: AcceptorTimeouts;
  readonly guard?: Guard;
}

const ACCEPTOR_TIMEOUTS: AcceptorTimeouts = { handshake: 5_000, parked: 30_000 };

export class HostTransport implements Transport {
  readonly kind = 'host';
  readonly #acceptor: Acceptor;
  readonly #announceHost: string;
  readonly #pairs = new Set<HostPair>();
  /** Ends each `open` that has not settled. */
  readonly #opening = new Set<(reason: PdError) => void>();
  #disposed: Promise<void> | undefined;

  private constructor(acceptor: Acceptor, announceHost: string) {
    this.#acceptor = acceptor;
    this.#announceHost = announceHost;
  }

  static async create(options: HostTransportOptions): Promise<HostTransport> {
    // `localhost` may mean ::1 as well; what is told has to be what is bound. A bound `::` takes both families.
    const family = isIPv4(options.bindHost) ? 4 : 0;
    const announceHost = await hostAddress(options.announceHost, family);
    const acceptor = await Acceptor.listen(
      options.bindHost,
      options.acceptor ?? ACCEPTOR_TIMEOUTS,
      options.guard,
    );
    return new HostTransport(acceptor, announceHost);
  }

  createUniqueId(): UniqueId {
    if (this.#disposed) throw closed();
    const id = encodeUniqueId({ host: this.#announceHost, port: this.#acceptor.port });
    this.#acceptor.expect(decodeUniqueId(id, 'this end').token);
    return id;
  }

  async open(options: OpenOptions): Promise<Pair> {
    if (this.#disposed) throw closed();
    const data = decodeUniqueId(options.uniqueId, options.peer);
    const socket = await (options.rank === 0
      ? this.#waitForPeer(options, data)
      : this.#connectToPeer(options, data));
    if (this.#disposed) {
      socket.destroy();
      throw closed();
    }
    const pair = new HostPair(socket, options.rank, options.peer);
    this.#pairs.add(pair);
    void pair.over.then(() => this.#pairs.delete(pair));
    return pair;
  }

  dispose(): Promise<void> {
    this.#disposed ??= this.#close();
    return this.#disposed;
  }

  async #close(): Promise<void> {
    const reason = closed();
    for (const end of [...this.#opening]) end(reason);
    const over = [...this.#pairs].map((pair) => pair.over);
    for (const pair of this.#pairs) pair.abort(reason);
    await Promise.all([this.#acceptor.close(), ...over]);
  }

  #waitForPeer(options: OpenOptions, { token }: DataAddress): Promise<DataSocket> {
    return this.#bounded(options, (settle, fail) => {
      const known = this.#acceptor.claim(token, settle);
      if (!known)
        fail(new PdError('INTERNAL', `pair with ${options.peer}: rank 0 did not make this unique id`));
      return () => this.#acceptor.forget(token);
    });
  }

  #connectToPeer(options: OpenOptions, { address, token }: DataAddress): Promise<DataSocket> {
    const { peer } = options;
    const where = formatHostPort(address);
    const fault = (code: 'PEER_UNREACHABLE' | 'PEER_LOST' | 'MESSAGE_INVALID', what: string, cause?: Error) =>
      new PdError(
        code,
        `pair with ${peer}: ${what}`,
        { peer, address: where, stage: 'pair-init' },
        { cause },
      );
    return this.#bounded(options, (settle, fail) => {
      const socket = DataSocket.connect(address);
      let connected = false;
      socket.onLost = (error) =>
        fail(
          connected
            ? fault(
                'PEER_LOST',
                `${where} closed the connection in the handshake: it waits for this pair no more`,
              )
            : fault('PEER_UNREACHABLE', `${where} does not take data connections: ${error?.message}`, error),
        );
      socket.connected(() => {
        connected = true;
        socket.write([encodeHandshake(token, 'first')], () => {});
        const answer = hostMemory(HANDSHAKE_BYTES);
        socket.read(new RegionCursor([answer]), () => {
          if (decodeHandshake(hostView(answer)) === tokenKey(token, 'second')) settle(socket);
          else fail(fault('MESSAGE_INVALID', `${where} answered the handshake with something else`));
        });
      });
      return () => socket.destroy();
    });
  }

  /** Runs `start` under the deadline of `open` and under `dispose`. Where it fails, what `start` returned undoes it. */
  #bounded(
    { peer, rank, timeoutMs }: OpenOptions,
    start: (settle: (socket: DataSocket) => void, fail: (error: PdError) => void) => () => void,
  ): Promise<DataSocket> {
    return new Promise((resolve, reject) => {
      let settled = false;
      let undo: (() => void) | undefined;
      const end = () => {
        settled = true;
        clearTimeout(timer);
        this.#opening.delete(fail);
      };
      const settle = (socket: DataSocket) => {
        if (settled) return;
        end();
        resolve(socket);
      };
      const fail = (error: PdError) => {
        if (settled) return;
        end();
        undo?.();
        reject(error);
      };
      const timer = setTimeout(() => {
        fail(
          new PdError(
            'PAIR_INIT_TIMEOUT',
            `pair with ${peer}, rank ${rank}: the peer did not join within ${timeoutMs} ms`,
            { peer, stage: 'pair-init' },
          ),
        );
      }, timeoutMs);
      this.#opening.add(fail);
      undo = start(settle, fail);
    });
  }
}

function closed(): PdError {
  return new PdError('ENGINE_CLOSED', 'the transport has been disposed');
}
