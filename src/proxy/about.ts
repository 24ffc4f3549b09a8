/** What clients ask of the proxy itself: how it is, which instances there are, what became of requests; and that one is to be drained. */
import type { FastifyRequest } from 'fastify';
import { PdError } from '../errors.ts';
import { isLoopback } from '../net/address.ts';
import { modelNotFound, openAiError } from '../openai-error.ts';
import { packageVersion } from '../version.ts';
import { z } from '../zod.ts';
import type { Admission } from './admission.ts';
import type { PromptCaches } from './caches.ts';
import type { ModelDirectory } from './models.ts';
import { type Receipt, timelinesOf } from './receipts.ts';
import type { Instance, InstanceRegistry } from './registry.ts';
import type { Relays } from './relays.ts';
import { routeOf } from './route.ts';
import { bodyOf, type Serving } from './serving.ts';
import { MOST_UI_REQUESTS, type UiSnapshot, uiInstance, uiRequest } from './ui-state.ts';
import type { WholeAnswer } from './upstream.ts';

/** For a consumer to say what may be asked of it, and bytes of that. */
const OPENAPI_MS = 5_000;
const OPENAPI_BYTES = 4 * 1024 * 1024;

const VERSION = packageVersion();

/** Of the proxy that it is about. */
interface AboutParts {
  readonly registry: InstanceRegistry;
  readonly caches: PromptCaches;
  readonly admission: Admission;
  readonly serving: Serving;
  readonly models: ModelDirectory;
  readonly stop: AbortSignal;
  /** Of a proxy of several processes, once there are. */
  readonly relays: () => Relays | undefined;
  readonly draining: () => boolean;
}

export class AboutProxy {
  readonly #parts: AboutParts;
  readonly #registry: InstanceRegistry;
  readonly #serving: Serving;
  readonly #startedAt = Date.now();

  constructor(parts: AboutParts) {
    this.#parts = parts;
    this.#registry = parts.registry;
    this.#serving = parts.serving;
  }

  /** Adds the routes. */
  attach(): void {
    const { app, config } = this.#serving;
    app.post('/admin/drain', async (request) => this.#drainInstance(request));
    app.get<{ Params: { '*': string } }>('/v1/requests/*', async (request, reply) => {
      const id = /^(.+)\/route$/.exec(request.params['*'])?.[1];
      const receipt = id === undefined ? undefined : await this.#receiptOf(id);
      if (receipt && this.#mayRead(request, receipt)) return await routeOf(receipt, this.#serving.upstream);
      // The same where it is another's, so that nobody learns of it.
      const text =
        'there is no such request: GET /v1/requests/ID/route, with the x-pd-request-id of a recent one';
      return reply.code(404).send(openAiError(new PdError('REQUEST_INVALID', text)));
    });
    app.get('/health', async () => this.#health());
    if (config.debugState) app.get('/debug/state', async (request) => this.#debugState(request));
    app.get('/ready', async (_request, reply) => {
      const ready = !this.#parts.draining() && this.#registry.paired;
      return reply.code(ready ? 200 : 503).send({ ready });
    });
    app.get('/v1/models', async () => ({ object: 'list', data: await this.#parts.models.list() }));
    app.get<{ Params: { '*': string } }>('/v1/models/*', async ({ params: { '*': name } }) => {
      const models = await this.#parts.models.list();
      const model = models.find(({ id }) => id === name);
      if (model) return model;
      const ids = models.map(({ id }) => id);
      throw modelNotFound(name, ids);
    });
    app.get('/openapi.json', async (request, reply) => {
      const { response, body } = await this.#openApi(request);
      reply.code(response.statusCode).type(String(response.headers['content-type'] ?? 'application/json'));
      return reply.send(body);
    });
    app.get('/metrics', async (_request, reply) => {
      const { registry } = this.#serving.metrics;
      const relays = this.#parts.relays();
      const text = await (relays ? relays.metrics(() => registry.getMetricsAsJSON()) : registry.metrics());
      return reply.type(registry.contentType).send(text);
    });
  }

  /**
   * `{"instance": "host:port", "drain": false}`, of holders of an admin key, or without keys of clients on this machine: what that instance
   * has goes on, and it gets nothing new.
   */
  #drainInstance(request: FastifyRequest) {
    // Whatever page a browser here has open may send this, too; only it says where it comes from.
    if (!this.#serving.guard.keyed && (!isLoopback(request.ip) || request.headers.origin !== undefined)) {
      throw new PdError('REQUEST_INVALID', 'POST /admin/drain is for clients on this machine, not for pages');
    }
    const { instance: address, drain } = readDrain(bodyOf(request));
    if (!this.#registry.drain(address, drain)) {
      throw new PdError('REQUEST_INVALID', `no instance ${address} pings this proxy`, { param: 'instance' });
    }
    this.#serving.log.info(`${address} ${drain ? 'gets no new requests: it drains' : 'gets requests again'}`);
    const instance = this.#registry.list().find(({ httpAddress }) => httpAddress === address);
    const underWay = instance && this.#registry.standing(instance)?.work.own;
    return { instance: address, draining: drain, requests_under_way: underWay ?? 0 };
  }

  /** Ids of other people's requests are for clients on this machine. */
  async #debugState(request: FastifyRequest) {
    if (!isLoopback(request.ip)) {
      throw new PdError('REQUEST_INVALID', 'GET /debug/state is for clients on this machine');
    }
    const receipts = (await this.#parts.relays()?.receipts()) ?? this.#serving.receipts.recent();
    return {
      requests: this.#parts.relays()?.running ?? this.#serving.running,
      recentRequests: receipts.flatMap(timelinesOf),
    };
  }

  async #receiptOf(id: string): Promise<Receipt | undefined> {
    const relays = this.#parts.relays();
    return relays ? (await relays.receipts({ of: id }))[0] : this.#serving.receipts.get(id);
  }

  /** The holder of the key that it came with, and admins. Without keys whoever knows its id, which cannot be guessed. */
  #mayRead(request: FastifyRequest, receipt: Receipt): boolean {
    const holder = this.#serving.guard.holder(request);
    return !holder || holder.admin || holder.name === receipt.holder;
  }

  /** As the proxy takes it to be: what the instance tells, and what it has been given since. */
  #loadOf(instance: Instance) {
    const work = this.#registry.standing(instance)?.work;
    if (!work) return null;
    return { requests: work.requests, queued_tokens: work.queuedTokens, kv_cache_usage: work.kvUse };
  }

  /** What a consumer says may be asked: the answer is its own. Throws NO_INSTANCE, or that it cannot be reached. */
  async #openApi({ headers }: FastifyRequest): Promise<WholeAnswer> {
    const via = this.#serving.via(headers);
    const [instance] = this.#registry.list('consumer');
    if (!instance)
      throw new PdError('NO_INSTANCE', 'no consumer pings this proxy, so nothing is known of what it takes');
    const asked = { most: OPENAPI_BYTES, stop: this.#parts.stop, headers: { via } };
    return await this.#serving.upstream.inquire(instance, '/openapi.json', OPENAPI_MS, asked);
  }

  /** For the page. */
  async snapshot(): Promise<UiSnapshot> {
    const most = Math.ceil(MOST_UI_REQUESTS / this.#serving.config.workers);
    const receipts = (await this.#parts.relays()?.receipts({ most })) ?? this.#serving.receipts.recent();
    return {
      proxy: {
        status: this.#parts.draining() ? 'draining' : 'ok',
        version: VERSION,
        startedAt: this.#startedAt,
        running: this.#parts.relays()?.running ?? this.#serving.running,
        queued: this.#parts.admission.queued,
        paired: this.#registry.paired,
        kept: MOST_UI_REQUESTS,
      },
      instances: this.#registry
        .list()
        .map((instance) => uiInstance(instance, this.#registry, this.#parts.caches)),
      requests: receipts.slice(-MOST_UI_REQUESTS).map(uiRequest),
    };
  }

  #health() {
    const instances = this.#registry.list();
    const count = (role: string) => instances.filter((instance) => instance.role === role).length;
    return {
      status: this.#parts.draining() ? 'draining' : 'ok',
      counts: { producer: count('producer'), consumer: count('consumer') },
      instances: instances.map((instance) => ({
        role: instance.role,
        http_address: instance.httpAddress,
        zmq_address: instance.zmqAddress,
        /** Its HTTP server takes TLS alone. */
        tls: instance.tls ?? false,
        model: instance.fingerprint?.model ?? null,
        fingerprint: instance.fingerprint?.digest ?? null,
        send_type: instance.sendType ?? null,
        models: instance.models ?? null,
        /** Since its last ping. */
        age_seconds: Math.round(this.#registry.age(instance)) / 1_000,
        refused_connection: this.#registry.quarantined(instance),
        draining: this.#registry.standing(instance)?.draining ?? false,
        breaker: this.#registry.standing(instance)?.breaker.state ?? null,
        load: this.#loadOf(instance),
      })),
    };
  }
}

const DRAIN = z.strictObject({ instance: z.string(), drain: z.boolean().default(true) });

/** Throws REQUEST_INVALID. */
function readDrain(body: Uint8Array): z.infer<typeof DRAIN> {
  try {
    return DRAIN.parse(JSON.parse(Buffer.from(body).toString('utf8')));
  } catch (cause) {
    const form = 'the body must be {"instance": "host:port"}, with "drain": false to undo it';
    throw new PdError('REQUEST_INVALID', form, {}, { cause });
  }
}
