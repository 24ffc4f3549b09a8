/**
 * A worker: one process (or part of one) that serves a model. Main thread here, core thread behind `CoreClient`, reader thread behind
 * `RequestBodyReader`.
 *
 *   start: environment, port, core + tokenizer, HTTP, then the first ping
 *   close: no pings, 503 for what is new, what runs may end, HTTP, core
 */
import { setTimeout } from 'node:timers/promises';
import type { FastifyInstance } from 'fastify';
import { Guard } from '../access/guard.ts';
import type { WorkerConfig } from '../config/worker-config.ts';
import { deferred } from '../deferred.ts';
import { prepareNativeEnvironment } from '../device/native-env.ts';
import type { PdError } from '../errors.ts';
import { formatHostPort, type HostPort, httpUrl } from '../net/address.ts';
import { AllowList } from '../net/allow-list.ts';
import { assertBindable, listenError } from '../net/port-holder.ts';
import { createLogger, type Logger, RateLimitedLog } from '../observability/log.ts';
import { MetricsPage } from '../observability/metrics.ts';
import { packageVersion } from '../version.ts';
import { CoreClient } from './core-client.ts';
import type { CoreInfo, CoreState } from './core-messages.ts';
import type { KvEventPublisher } from './kv-events.ts';
import { RequestBodyReader } from './request-body-reader.ts';
import type { WorkerTraces } from './request-trace.ts';
import { InFlight } from './server/in-flight.ts';
import { createServer } from './server/server.ts';

/**
 * What starting needs of the rest: a test puts its own in place.
 * @internal
 */
export interface WorkerParts {
  readonly startCore: typeof CoreClient.start;
  readonly startReader: (
    modelDir: string,
    log: Logger,
  ) => Promise<Pick<RequestBodyReader, 'read' | 'model' | 'close'>>;
}

const LAST_ANSWERS_MS = 1_000;
/** Between two looks at what a draining producer still holds. */
const HAND_OVER_POLL_MS = 25;
/** For what has been sent, and is in the system's buffers, to be read at the other end. */
const LAST_BYTES_MS = 1_000;

const PARTS: WorkerParts = {
  startCore: (init) => CoreClient.start(init),
  startReader: (modelDir, log) => RequestBodyReader.start(modelDir, log),
};

interface RunningParts {
  readonly core: CoreClient;
  readonly reader: Pick<RequestBodyReader, 'close'>;
  readonly server: FastifyInstance;
  readonly guard: Guard;
  readonly inFlight: InFlight;
  readonly events: KvEventPublisher | undefined;
  readonly traces: WorkerTraces | undefined;
  readonly log: Logger;
}

/** A worker that serves: close it, its threads and its server keep the process alive. */
export class PdWorker {
  readonly config: WorkerConfig;
  /** `host:port` that HTTP is reached at, as told to others. */
  readonly httpAddress: HostPort;
  readonly info: CoreInfo;
  /** What its threads count: for `readMetric` and `readHistogram`. GET /metrics shows the same. */
  readonly metrics: readonly MetricsPage[];
  /** Resolves when the worker can serve no more: with the error where nobody closed it. Never rejects. */
  readonly ended: Promise<PdError | undefined>;
  /** Resolves once `close` has let go of every request: nothing but ending threads and pairs is left. */
  readonly drained: Promise<void>;
  readonly #parts: RunningParts;
  #closing: Promise<void> | undefined;
  /** Ends a drain that is under way. */
  #hurry: () => void = () => {};
  readonly #drained = deferred<void>();

  private constructor(
    config: WorkerConfig,
    httpAddress: HostPort,
    metrics: readonly MetricsPage[],
    parts: RunningParts,
  ) {
    const { core, log } = parts;
    this.config = config;
    this.httpAddress = httpAddress;
    this.info = core.info;
    this.metrics = metrics;
    this.#parts = parts;
    this.drained = this.#drained.promise;
    this.ended = core.ended.then((error) => {
      if (error) log.fatal({ code: error.code }, `the worker cannot go on: ${error.message}`);
      return error;
    });
  }

  /**
   * Resolves once HTTP answers. Throws PORT_IN_USE before a model is loaded, CHECKPOINT_INVALID and others while it is.
   */
  static start(config: WorkerConfig): Promise<PdWorker>;
  /**
   * When `signal` fires, whatever has been made is closed and its reason is thrown, before anyone is told of the worker.
   * @internal
   */
  static start(config: WorkerConfig, parts?: WorkerParts, signal?: AbortSignal): Promise<PdWorker>;
  static async start(
    config: WorkerConfig,
    parts: WorkerParts = PARTS,
    signal?: AbortSignal,
  ): Promise<PdWorker> {
    prepareNativeEnvironment(config.transfer);
    const log = createLogger(config.transfer.log, 'main');
    logKvConfig(config, log);
    await assertBindable(config.http, 'HTTP server');
    signal?.throwIfAborted();
    const guard = new Guard({ config: config.access, log });
    const metrics = new MetricsPage();
    const pages = { core: new MetricsPage(), transfer: new MetricsPage() };
    const [core, reader] = await bothOrNone(
      parts.startCore({ config, metrics: { core: pages.core.buffer, transfer: pages.transfer.buffer } }),
      parts.startReader(config.modelDir, log),
    ).catch((error: unknown) => {
      guard.close();
      throw error;
    });
    let events: KvEventPublisher | undefined;
    let traces: WorkerTraces | undefined;
    try {
      signal?.throwIfAborted();
      events = await publisherOf(config, core.info, log);
      const inFlight = new InFlight();
      if (config.otlpEndpoint !== undefined) {
        const { WorkerTraces } = await import('./request-trace.ts');
        traces = WorkerTraces.open(config, core, metrics, log);
      }
      const all = [metrics, pages.core, pages.transfer];
      const server = createServer({
        config,
        core,
        reader,
        model: reader.model,
        guard,
        inFlight,
        metrics,
        traces,
        pages: all,
        version: packageVersion(),
        log,
        limited: new RateLimitedLog(),
        promptIdsFrom: config.promptIdsFrom && AllowList.parse(config.promptIdsFrom, '--prompt-ids-from'),
      });
      const port = await listen(server, config.http);
      const httpAddress = { host: config.httpAnnounceHost, port };
      const parts = { core, reader, server, guard, inFlight, events, traces, log };
      const worker = new PdWorker(config, httpAddress, all, parts);
      const { numBlocks, blockSize, maxModelLen } = core.info;
      log.info(
        `Serving ${config.servedModelNames.join(', ')} as ${config.role} on ${config.transfer.device}` +
          `: ${numBlocks} KV blocks of ${blockSize} tokens, up to ${maxModelLen} tokens a sequence`,
      );
      log.info(`Running on ${httpUrl(httpAddress, guard.https !== null)}`);
      events?.announce(formatHostPort(httpAddress));
      core.onCacheChange((changes) => events?.publish(changes));
      core.tell({
        type: 'serve',
        httpAddress: formatHostPort(httpAddress),
        tokenizer: reader.model.digest,
        ...(events && { events: events.ports }),
      });
      return worker;
    } catch (error) {
      guard.close();
      await Promise.all([core.close(), reader.close(), events?.close(), traces?.close()]);
      throw error;
    }
  }

  /** What the core says of itself: queues, blocks, the transfer engine. */
  state(): Promise<CoreState> {
    return this.#parts.core.inspect();
  }

  /**
   * Drains and ends: at once no pings and 503 for new requests; those under way have `drainTimeoutMs`; then everything is closed.
   * Idempotent; a later call with a shorter time shortens the wait.
   */
  close(drainTimeoutMs: number = this.config.drainTimeoutMs): Promise<void> {
    this.#closing ??= this.#close(drainTimeoutMs);
    if (drainTimeoutMs === 0) this.#hurry();
    return this.#closing;
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }

  async #close(drainTimeoutMs: number): Promise<void> {
    const { core, reader, server, guard, inFlight, events, traces, log } = this.#parts;
    core.tell({ type: 'drain' });
    const running = inFlight.size;
    if (running > 0) log.info({ running }, `Draining: ${running} requests under way`);
    const hurried = new Promise<boolean>((resolve) => {
      this.#hurry = () => resolve(false);
    });
    const ended = core.ended.then(() => false);
    const done = await Promise.race([inFlight.drain(drainTimeoutMs), hurried, ended]);
    if (!done && inFlight.size > 0) {
      log.warn(`Gave up ${inFlight.size} requests under way`);
    }
    if (done) await this.#handOver(performance.now() + drainTimeoutMs, Promise.race([hurried, ended]));
    this.#drained.resolve();
    await traces?.close();
    await Promise.all([core.close(), reader.close(), events?.close()]);
    // Requests that this has failed still get their answers.
    await inFlight.drain(LAST_ANSWERS_MS);
    await server.close();
    guard.close();
    log.info('Stopped');
  }

  /** A producer has answered its requests before their KV is fetched (GET) or has left (PUT_ASYNC): that belongs to them too. */
  async #handOver(deadline: number, cut: Promise<unknown>): Promise<void> {
    if (this.config.role !== 'producer') return;
    let told = false;
    let frozen = false;
    let over = false;
    void cut.then(() => {
      over = true;
    });
    while (!over) {
      const { transfer, handOver } = await this.#parts.core.state().catch((): Partial<CoreState> => ({}));
      const bytes = transfer ? transfer.buffer.usedBytes + transfer.pool.usedBytes : 0;
      const prompts = handOver?.grants.requests ?? 0;
      frozen ||= bytes > 0;
      if (bytes + prompts === 0) {
        // Nothing acknowledges the last bytes of the frozen wire: a busy consumer may still have to read them.
        if (frozen) await Promise.race([setTimeout(LAST_BYTES_MS), cut]);
        return;
      }
      const what = prompts > 0 ? `KV of ${prompts} prompts` : `${bytes} bytes of KV`;
      if (performance.now() >= deadline) {
        this.#parts.log.warn({ bytes, prompts }, `Gave up ${what} that no consumer has fetched`);
        return;
      }
      if (!told) this.#parts.log.info({ bytes, prompts }, `Draining: ${what} are still to leave`);
      told = true;
      await Promise.race([setTimeout(HAND_OVER_POLL_MS), cut]);
    }
  }
}

/** The publisher of KV events, if they are wanted. In an undivided worker nothing else loads ZeroMQ. */
async function publisherOf(
  config: WorkerConfig,
  { blockSize }: CoreInfo,
  log: Logger,
): Promise<KvEventPublisher | undefined> {
  const { kvEventsPort: port, kvEventsForm: form, transfer, servedModelNames } = config;
  if (port === undefined) return undefined;
  const { KvEventPublisher } = await import('./kv-events.ts');
  return await KvEventPublisher.open({
    bind: { host: transfer.bind.host, port },
    model: servedModelNames[0]!,
    blockSize,
    form,
    medium: transfer.device === 'host' ? 'CPU' : 'GPU',
    ...(transfer.allowPeers && { allow: transfer.allowPeers }),
    log,
  });
}

/** Logs the settings of KV transfer, however they were configured, under the names that vLLM's users know. */
function logKvConfig(config: WorkerConfig, log: Logger): void {
  const { role, transfer } = config;
  if (role === 'both') {
    log.info('KV transfer: none, role both is an undivided worker');
    return;
  }
  const { bind, announceHost, rank, sendType, kvBufferSize } = transfer;
  const fields = {
    kv_role: `kv_${role}`,
    kv_rank: role === 'producer' ? 0 : 1,
    kv_parallel_size: 2,
    rank,
    host: bind.host,
    announce_host: announceHost,
    port: bind.port === 0 ? 'any' : bind.port + rank,
    send_type: sendType,
    kv_buffer_size: kvBufferSize,
  };
  const told = announceHost === bind.host ? '' : ` (told to others as ${announceHost})`;
  log.info(
    fields,
    `KV transfer: kv_role ${fields.kv_role}, kv_rank ${fields.kv_rank} of kv_parallel_size 2, rank ${rank} in this instance, ` +
      `host ${bind.host}${told}, port ${fields.port}, send_type ${sendType}, threshold kv_buffer_size ${kvBufferSize} bytes`,
  );
}

interface Closable {
  close(): Promise<void>;
}

/** Where one of two fails to start, the other is closed. */
async function bothOrNone<A extends Closable, B extends Closable>(
  first: Promise<A>,
  second: Promise<B>,
): Promise<readonly [A, B]> {
  const [a, b] = await Promise.allSettled([first, second]);
  if (a.status === 'fulfilled' && b.status === 'fulfilled') return [a.value, b.value];
  if (a.status === 'fulfilled') await a.value.close();
  if (b.status === 'fulfilled') await b.value.close();
  throw a.status === 'rejected' ? a.reason : (b as PromiseRejectedResult).reason;
}

/** Listens; `::` takes IPv4 too. Returns the port, which the system chooses for 0. */
async function listen(server: FastifyInstance, address: HostPort): Promise<number> {
  try {
    await server.listen({ host: address.host, port: address.port, ipv6Only: false });
  } catch (error) {
    throw await listenError(error, address, 'HTTP server');
  }
  const bound = server.server.address();
  return typeof bound === 'object' && bound !== null ? bound.port : address.port;
}
