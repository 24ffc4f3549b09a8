/** Peers made of bare sockets: one that speaks vLLM's wire and nothing else, and listeners that misbehave. */
import { Encoder } from '@msgpack/msgpack';
import * as zmq from 'zeromq';
import { formatHostPort, type HostPort, zmqEndpoint } from '../../src/net/address.ts';
import { HostTransport } from '../../src/transport/host/transport.ts';
import type { Pair } from '../../src/transport/transport.ts';
import type { UniqueId } from '../../src/wire/messages.ts';

const encoder = new Encoder();

/** Sends what it is told from a DEALER with the routing id of `self`, and keeps each answer. */
export class RawPeer {
  readonly self: string;
  readonly answers: Buffer[] = [];
  readonly socket: zmq.Dealer;
  #transport: HostTransport | undefined;
  #waiting: (() => void)[] = [];

  constructor(to: HostPort, self = '127.0.0.1:1') {
    this.self = self;
    const socket = new zmq.Dealer({ routingId: self, linger: 0, ipv6: true });
    this.socket = socket;
    socket.connect(zmqEndpoint(to));
    void (async () => {
      for await (const [body] of socket) {
        this.answers.push(body!);
        for (const wake of this.#waiting.splice(0)) wake();
      }
      // A socket that is closed while it is read ends so.
    })().catch(() => {});
  }

  async say(fields: object | Uint8Array): Promise<void> {
    await this.socket.send(fields instanceof Uint8Array ? fields : encoder.encode(fields));
  }

  /** The n-th answer, from 1, as text. */
  async answer(n: number): Promise<string> {
    while (this.answers.length < n) await new Promise<void>((resolve) => this.#waiting.push(resolve));
    return this.answers[n - 1]!.toString('latin1');
  }

  /** NEW as vLLM sends it, and the pair. */
  async pair(timeoutMs = 60_000): Promise<Pair> {
    const transport = await this.transport();
    const uniqueId = transport.createUniqueId();
    await this.say({ cmd: 'NEW', unique_id: uniqueId });
    return transport.open({ uniqueId, rank: 0, peer: 'engine', timeoutMs });
  }

  async transport(): Promise<HostTransport> {
    this.#transport ??= await HostTransport.create({ bindHost: '127.0.0.1', announceHost: '127.0.0.1' });
    return this.#transport;
  }

  async dispose(): Promise<void> {
    this.socket.close();
    await this.#transport?.dispose();
  }
}

/** A ROUTER that does with each message what the test says. */
export class RawListener {
  readonly address: HostPort;
  readonly messages: Buffer[] = [];
  readonly transport: HostTransport;
  readonly #socket: zmq.Router;

  private constructor(socket: zmq.Router, port: number, transport: HostTransport) {
    this.#socket = socket;
    this.address = { host: '127.0.0.1', port };
    this.transport = transport;
  }

  static async listen(
    onMessage: (body: Buffer, answer: (bytes: Uint8Array | string) => void, listener: RawListener) => void,
    port = 0,
  ): Promise<RawListener> {
    const socket = new zmq.Router({ linger: 0, handover: true });
    await socket.bind(`tcp://127.0.0.1:${port === 0 ? '*' : port}`);
    const bound = Number(/:(\d+)$/.exec(socket.lastEndpoint!)![1]);
    const transport = await HostTransport.create({ bindHost: '127.0.0.1', announceHost: '127.0.0.1' });
    const listener = new RawListener(socket, bound, transport);
    void (async () => {
      for await (const [identity, body] of socket) {
        listener.messages.push(body!);
        const answer = async (bytes: Uint8Array | string) => {
          if (!socket.closed)
            await socket
              .send([identity!, bytes])
              .catch((error: unknown) => socket.closed || Promise.reject(error));
        };
        onMessage(body!, (bytes) => void answer(bytes), listener);
      }
    })();
    return listener;
  }

  /** Joins the pair that a NEW offers. */
  join(uniqueId: UniqueId, timeoutMs = 60_000): Promise<Pair> {
    return this.transport.open({ uniqueId, rank: 1, peer: formatHostPort(this.address), timeoutMs });
  }

  async dispose(): Promise<void> {
    this.#socket.close();
    await this.transport.dispose();
  }
}
