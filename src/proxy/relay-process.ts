/** The entry of a relay process (relays.ts): an HTTP server for connections that its owner hands to it. */
import { rm } from 'node:fs/promises';
import { request as ask, type IncomingHttpHeaders } from 'node:http';
import { Socket } from 'node:net';
import { join } from 'node:path';
import { pipeline } from 'node:stream';
import type { FastifyReply, FastifyRequest } from 'fastify';
import { type Deferred, deferred, type Signal } from '../deferred.ts';
import { PdError, unreachable } from '../errors.ts';
import { HOP_HEADERS } from '../net/hop-headers.ts';
import { createLogger } from '../observability/log.ts';
import { NO_KEYS, type WantedKeys } from './body.ts';
import { Channel, type FromRelay, type SentPlacement, type ToRelay } from './channel.ts';
import type { Coordinator, Placement, Visit, Wish } from './coordinator.ts';
import { createProxyMetrics } from './metrics.ts';
import type { Instance, InstanceRole } from './registry.ts';
import { ownerPath } from './relays.ts';
import { Serving } from './serving.ts';
import { UI_EVENTS_ROUTE, UI_PAGE_ROUTES } from './ui.ts';

/** For the owner to begin an answer. */
const OWNER_MS = 30_000;

/** Beyond what a request may wait for its turn: an owner that is this late hangs. */
const ANSWER_MS = 10_000;
const CHECK_MS = 1_000;

type Start = Extract<ToRelay, { type: 'start' }>;

class RelayProcess {
  readonly #channel: Channel<FromRelay, ToRelay>;
  readonly #coordinator: RemoteCoordinator;
  readonly #serving: Serving;
  #draining = false;

  constructor({ config, pseudonym, folder, number }: Start, channel: Channel<FromRelay, ToRelay>) {
    this.#channel = channel;
    const coordinator = new RemoteCoordinator((message) => channel.send(message), config.queueTimeoutMs);
    this.#coordinator = coordinator;
    const log = createLogger(config.log, 'proxy');
    const elsewhere = (request: FastifyRequest, reply: FastifyReply) =>
      passToOwner(ownerPath(folder), request, reply);
    const metrics = createProxyMetrics();
    this.#serving = new Serving({ config, log, metrics, coordinator, pseudonym, elsewhere });
    // By name those that need no key, or an admin's.
    const { app } = this.#serving;
    for (const route of ['/health', '/ready', '/metrics']) app.get(route, elsewhere);
    if (config.ui !== 'off') {
      for (const route of UI_PAGE_ROUTES) app.get(route, elsewhere);
      app.get(UI_EVENTS_ROUTE, { exposeHeadRoute: false }, elsewhere);
    }
    void this.#start(join(folder, `relay-${number}.sock`));
  }

  receive(message: Exclude<ToRelay, Start>): void {
    switch (message.type) {
      case 'instance':
      case 'gone':
      case 'wanted':
      case 'placed':
      case 'refused':
        this.#coordinator.receive(message);
        break;
      case 'metrics':
        void this.#tellMetrics();
        break;
      case 'receipts':
        this.#tellReceipts(message);
        break;
      case 'drain':
        void this.#drain(message.ms);
        break;
      default:
        unreachable(message, 'message of the owner');
    }
  }

  /** Nobody connects to `path`; but a server that listens keeps its timeouts. */
  async #start(path: string): Promise<void> {
    try {
      await this.#serving.openTraces();
      // Where the process before this one was killed, its socket is still there.
      await rm(path, { force: true });
      await this.#serving.app.listen({ path });
      const { server } = this.#serving.app;
      process.on('message', (_message, socket) => {
        this.#channel.send({ type: 'taken' });
        if (!(socket instanceof Socket)) return; // it broke on its way
        socket.allowHalfOpen = true;
        socket.setNoDelay(true);
        server.emit('connection', socket);
      });
      this.#channel.send({ type: 'ready' });
    } catch (error) {
      this.#channel.send({ type: 'failed', error: PdError.from(error).toData() });
      await this.#channel.close();
      process.exit(1);
    }
  }

  async #tellMetrics(): Promise<void> {
    const metrics = await this.#serving.metrics.registry.getMetricsAsJSON();
    this.#channel.send({ type: 'metrics', metrics });
  }

  #tellReceipts({ seq, of, most = Number.POSITIVE_INFINITY }: Extract<ToRelay, { type: 'receipts' }>): void {
    const kept = this.#serving.receipts;
    const one = of === undefined ? undefined : kept.get(of);
    const receipts = of === undefined ? kept.recent().slice(-most) : one ? [one] : [];
    this.#channel.send({ type: 'receipts', seq, receipts });
  }

  async #drain(ms: number): Promise<void> {
    if (this.#draining) {
      if (ms === 0) this.#serving.break();
      return;
    }
    this.#draining = true;
    await this.#serving.drain(ms);
    await this.#serving.close();
    await this.#tellMetrics();
    await this.#channel.close();
    process.exit(0);
  }
}

interface Answer {
  readonly count: number;
  readonly queuedMs: number;
  readonly placement: Placement;
}

interface Waiting extends Deferred<Answer | undefined> {
  readonly untilMs: number;
}

/** This process's side of what all requests share: it asks the owner. */
class RemoteCoordinator implements Coordinator {
  wanted: WantedKeys = NO_KEYS;
  readonly #send: (message: FromRelay) => void;
  readonly #queueMs: number;
  readonly #instances = new Map<string, Instance>();
  readonly #waiting = new Map<number, Waiting>();
  #ids = 0;

  /** `queueMs`: how long a request may wait for its turn. */
  constructor(send: (message: FromRelay) => void, queueMs: number) {
    this.#send = send;
    this.#queueMs = queueMs;
    setInterval(() => this.#expire(), CHECK_MS).unref();
  }

  async enter(wish: Wish, signal: Signal): Promise<Visit> {
    const id = this.#ids++;
    const { model, prompts, tokens, tokenized, textKeys, blockKeys } = wish.prompt;
    const prompt = { model, prompts, tokens, tokenized, textKeys, blockKeys: [...blockKeys] };
    const placed = this.#answer(id);
    const leave = () => this.#waiting.get(id)?.reject(signal.reason);
    signal.addEventListener('abort', leave, { once: true });
    this.#send({ type: 'enter', id, wish: { ...wish, prompt } });
    try {
      return new RemoteVisit(id, (await placed)!, this.#send, () => this.#answer(id));
    } catch (error) {
      this.#send({ type: 'end', id });
      throw error;
    } finally {
      signal.removeEventListener('abort', leave);
    }
  }

  receive(message: Extract<ToRelay, { type: 'instance' | 'gone' | 'wanted' | 'placed' | 'refused' }>): void {
    if (message.type === 'instance') {
      this.#instances.set(message.instance.httpAddress, message.instance);
    } else if (message.type === 'gone') {
      this.#instances.delete(message.httpAddress);
    } else if (message.type === 'wanted') {
      this.wanted = message.wanted;
    } else {
      const waiting = this.#waiting.get(message.id);
      if (!waiting) return;
      if (message.type === 'placed')
        waiting.resolve({ ...message, placement: this.#placement(message.placement) });
      else if (message.error) waiting.reject(PdError.fromData(message.error));
      else waiting.resolve(undefined);
    }
  }

  #answer(id: number): Promise<Answer | undefined> {
    const waiting = {
      ...deferred<Answer | undefined>(),
      untilMs: performance.now() + this.#queueMs + ANSWER_MS,
    };
    this.#waiting.set(id, waiting);
    return waiting.promise.finally(() => this.#waiting.delete(id));
  }

  /** One that an instance has been told of before, in the same order. */
  #placement({ pair, ...placement }: SentPlacement): Placement {
    const producer = this.#instances.get(pair.producer)!;
    const consumer = this.#instances.get(pair.consumer)!;
    return { ...placement, pair: { producer, consumer } };
  }

  #expire(): void {
    const now = performance.now();
    for (const { untilMs, reject } of this.#waiting.values())
      if (untilMs < now) reject(new PdError('INTERNAL', 'the process that places requests does not answer'));
  }
}

class RemoteVisit implements Visit {
  readonly count: number;
  readonly queuedMs: number;
  placement: Placement;
  readonly #id: number;
  readonly #send: (message: FromRelay) => void;
  readonly #answer: () => Promise<Answer | undefined>;
  readonly #placements: Placement[];

  constructor(
    id: number,
    { count, queuedMs, placement }: Answer,
    send: (message: FromRelay) => void,
    answer: () => Promise<Answer | undefined>,
  ) {
    this.count = count;
    this.queuedMs = queuedMs;
    this.placement = placement;
    this.#id = id;
    this.#send = send;
    this.#answer = answer;
    this.#placements = [placement];
  }

  prefilled(placement: Placement, tookMs?: number): void {
    this.#send({ type: 'prefilled', id: this.#id, at: this.#placements.indexOf(placement), tookMs });
  }

  judge(placement: Placement, role: InstanceRole, ok: boolean, firstEventMs?: number): void {
    const at = this.#placements.indexOf(placement);
    this.#send({ type: 'judge', id: this.#id, at, role, ok, firstEventMs });
  }

  async retry(refused: InstanceRole): Promise<Placement | undefined> {
    const answer = this.#answer();
    this.#send({ type: 'retry', id: this.#id, refused });
    const placement = (await answer)?.placement;
    if (!placement) return undefined;
    this.placement = placement;
    this.#placements.push(placement);
    return placement;
  }

  end(): void {
    this.#send({ type: 'end', id: this.#id });
  }
}

/** Everything but requests to instances: what there is, how it is, what is to be changed. */
function passToOwner(path: string, request: FastifyRequest, reply: FastifyReply): void {
  reply.hijack();
  const out = reply.raw;
  const asked = ask(
    {
      socketPath: path,
      method: request.method,
      path: request.url,
      // The owner believes it: nobody else connects there. Requests of all clients share connections to it, so a body is announced only where
      // one is sent: else the next request is taken for it.
      headers: { ...without(request.headers, HOP_AND_BODY_HEADERS), 'x-forwarded-for': request.ip },
      timeout: OWNER_MS,
    },
    (response) => {
      // Whether the client's connection goes on is between the two.
      out.writeHead(response.statusCode!, without(response.headers, HOP_HEADERS));
      pipeline(response, out, () => {}); // where one breaks off, so does the other
    },
  );
  asked.once('timeout', () => asked.destroy());
  asked.once('error', () => out.destroy());
  out.once('close', () => asked.destroy());
  asked.end(request.body instanceof Uint8Array ? request.body : undefined);
}

/** Of a request: also how its body comes. */
const HOP_AND_BODY_HEADERS = new Set([...HOP_HEADERS, 'content-length', 'expect']);

function without(headers: IncomingHttpHeaders, names: ReadonlySet<string>): IncomingHttpHeaders {
  return Object.fromEntries(Object.entries(headers).filter(([name]) => !names.has(name)));
}

// Its owner says when it ends; a terminal tells all of its processes.
process.on('SIGTERM', () => {}).on('SIGINT', () => {});
let relay: RelayProcess | undefined;
const channel = new Channel<FromRelay, ToRelay>(
  new Socket({ fd: 4, readable: true, writable: true }),
  (message) => {
    if (message.type === 'start') relay = new RelayProcess(message, channel);
    else relay!.receive(message);
  },
  () => process.exit(1),
);
