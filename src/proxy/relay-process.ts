/** The entry of a relay process (relays.ts): an HTTP server for connections that its owner hands to it. */
import { request as ask } from 'node:http';
import { Socket } from 'node:net';
import { join } from 'node:path';
import { pipeline } from 'node:stream';
import type { FastifyReply, FastifyRequest } from 'fastify';
import type { Guard } from '../access/guard.ts';
import { PdError, unreachable } from '../errors.ts';
import { createLogger } from '../observability/log.ts';
import type { ProxyContext } from './attempt.ts';
import { BodyReader } from './body-reader.ts';
import { Channel } from './channel.ts';
import { createProxyMetrics } from './metrics.ts';
import { Receipts } from './receipts.ts';
import type { FromRelay, ToRelay } from './relay-messages.ts';
import { ownerPath } from './relays.ts';
import { RemoteCoordinator } from './remote-coordinator.ts';
import { proxyGuard, Serving } from './serving.ts';
import { UI_EVENTS_ROUTE, UI_PAGE_ROUTES } from './ui.ts';
import { Upstream } from './upstream.ts';

/** For the owner to begin an answer. */
const OWNER_MS = 30_000;

type Start = Extract<ToRelay, { type: 'start' }>;

class RelayProcess {
  readonly #channel: Channel<FromRelay, ToRelay>;
  readonly #coordinator: RemoteCoordinator;
  readonly #metrics = createProxyMetrics();
  readonly #receipts = new Receipts();
  readonly #guard: Guard;
  readonly #upstream: Upstream;
  readonly #bodies: BodyReader;
  readonly #context: ProxyContext;
  readonly #serving: Serving;
  #draining = false;

  constructor({ config, folder, number }: Start, channel: Channel<FromRelay, ToRelay>) {
    const log = createLogger(config.log, 'proxy');
    this.#channel = channel;
    this.#coordinator = new RemoteCoordinator((message) => channel.send(message), config.queueTimeoutMs);
    this.#guard = proxyGuard(config, log, this.#metrics);
    this.#upstream = new Upstream({ access: config.upstream ?? {}, keyed: this.#guard.keyed, log });
    this.#bodies = new BodyReader(log, {
      tokenizer: config.tokenizer,
      onTokenized: (result) => this.#metrics.tokenized.inc({ result }),
    });
    this.#context = {
      config,
      coordinator: this.#coordinator,
      upstream: this.#upstream,
      metrics: this.#metrics,
      receipts: this.#receipts,
      log,
      bodies: this.#bodies,
    };
    this.#serving = new Serving(this.#context, this.#guard);
    // By name those that need no key, or an admin's.
    for (const route of ['/health', '/ready', '/metrics', ...UI_PAGE_ROUTES, UI_EVENTS_ROUTE, '/*']) {
      this.#serving.app.all(route, (request, reply) => passToOwner(ownerPath(folder), request, reply));
    }
    void this.#start(join(folder, `relay-${number}.sock`));
  }

  receive(message: Exclude<ToRelay, Start>): void {
    switch (message.type) {
      case 'instance':
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
      const { config, log } = this.#context;
      if (config.otlpEndpoint !== undefined) {
        const { RequestTraces } = await import('./request-trace.ts');
        this.#context.traces = RequestTraces.open(config, this.#metrics, log);
      }
      await this.#serving.app.listen({ path });
      const { server } = this.#serving.app;
      process.on('message', (_message, socket) => {
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
    const metrics = await this.#metrics.registry.getMetricsAsJSON();
    this.#channel.send({ type: 'metrics', metrics });
  }

  #tellReceipts({ seq, of, most = Number.POSITIVE_INFINITY }: Extract<ToRelay, { type: 'receipts' }>): void {
    const one = of === undefined ? undefined : this.#receipts.get(of);
    const receipts = of === undefined ? this.#receipts.recent().slice(-most) : one ? [one] : [];
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
    await this.#context.traces?.close();
    await this.#tellMetrics();
    this.#guard.close();
    await Promise.all([this.#upstream.close(), this.#bodies.close()]);
    await this.#channel.close();
    process.exit(0);
  }
}

/** Everything but requests to instances: what there is, how it is, what is to be changed. */
async function passToOwner(path: string, request: FastifyRequest, reply: FastifyReply): Promise<void> {
  reply.hijack();
  const out = reply.raw;
  const { connection: _, expect: __, ...headers } = request.headers;
  const asked = ask(
    {
      socketPath: path,
      method: request.method,
      path: request.url,
      // The owner believes it: nobody else connects there.
      headers: { ...headers, 'x-forwarded-for': request.ip },
      timeout: OWNER_MS,
    },
    (response) => {
      out.writeHead(response.statusCode!, response.headers);
      pipeline(response, out, () => {}); // where one breaks off, so does the other
    },
  );
  asked.once('timeout', () => asked.destroy());
  asked.once('error', () => out.destroy());
  out.once('close', () => asked.destroy());
  asked.end(request.body instanceof Uint8Array ? request.body : undefined);
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
