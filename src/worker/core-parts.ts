/** Puts the core together: device, model, transfer engine, connectors, scheduler, loop; and takes it apart again. */
import { randomBytes } from 'node:crypto';
import type { WorkerConfig } from '../config/worker-config.ts';
import { P2pSchedulerConnector } from '../connector/scheduler-connector.ts';
import { P2pWorkerConnector } from '../connector/worker-connector.ts';
import { createDevice } from '../device/create-device.ts';
import type { Device } from '../device/device.ts';
import { PdError } from '../errors.ts';
import { blockBytes } from '../kv/layout.ts';
import { createExecutor } from '../model/create-executor.ts';
import type { Executor } from '../model/executor.ts';
import { formatHostPort } from '../net/address.ts';
import type { Logger } from '../observability/log.ts';
import { MetricsPage } from '../observability/metrics.ts';
import { Timelines } from '../observability/timelines.ts';
import { maxSequenceLength, Scheduler, type SchedulerOptions } from '../scheduler/scheduler.ts';
import type { TransferEngine } from '../transfer/engine.ts';
import type { NativeInit } from '../transfer/native/channel.ts';
import type { DirectWays, SharedCache } from '../transfer/native/direct.ts';
import type { HandOver } from '../transfer/native/hand-over.ts';
import type { Nonce } from '../transfer/native/messages.ts';
import type { Fingerprint } from '../wire/fingerprint.ts';
import { CoreLoop, type CoreLoopOptions } from './core.ts';
import { CoreGrammars } from './core-grammars.ts';
import type { CoreInfo, CoreInit, CoreStage } from './core-messages.ts';

export interface CoreParts {
  readonly loop: CoreLoop;
  readonly info: CoreInfo;
  /** Absent for role `both`. */
  readonly engine?: TransferEngine;
  /** Absent where the frozen wire alone is spoken. */
  readonly handOver?: HandOver;
  /** Once the loop has ended. Idempotent. The engine goes first: it writes into what the device holds. */
  dispose(): Promise<void>;
}

/** Throws what any part throws; whatever had been made is given back then. */
export async function createCore(
  init: CoreInit,
  log: Logger,
  told: Pick<CoreLoopOptions, 'post' | 'kvSaved' | 'cacheChanged'>,
): Promise<CoreParts> {
  const { config } = init;
  const undo: (() => void | Promise<void>)[] = [];
  const dispose = async () => {
    for (let last = undo.pop(); last; last = undo.pop()) await last();
  };
  try {
    const device = await createDevice(config.transfer.device);
    undo.push(() => device.dispose());
    const shared = await createSharedCache(config, device, log);
    if (shared) undo.push(() => shared.dispose());
    const { executor, fingerprint, maxModelLen, numBlocks } = await createExecutor({
      config,
      device,
      log,
      ...(shared && { allocateCache: shared.allocate }),
    });
    undo.push(() => executor.dispose());
    const nonce = randomBytes(16).toString('hex') as Nonce;
    const direct = await openDirect(config, {
      device,
      layers: executor.layers,
      exported: shared?.exported(),
      nonce,
      log,
    });
    if (direct) undo.push(() => direct.close());
    const native = nativeInit(config, executor, nonce, direct);
    const engine = await createEngine(config, fingerprint, init.metrics.transfer, native);
    if (engine) undo.push(() => engine.dispose());
    const timelines = new Timelines<CoreStage>();
    const handOver = await createHandOver(init, engine, native, direct, log, timelines);
    if (handOver) undo.push(() => handOver.close());
    const limits = { numBlocks, blockSize: config.blockSize, maxModelLen };
    return {
      loop: createLoop(init, limits, executor, engine, handOver, { log, timelines, ...told }),
      info: {
        ...(engine && { kvAddress: formatHostPort(engine.address) }),
        maxModelLen: maxSequenceLength(limits),
        numBlocks,
        blockSize: config.blockSize,
        vocabSize: executor.vocabSize,
        fingerprint,
      },
      ...(engine && { engine }),
      ...(handOver && { handOver }),
      dispose,
    };
  } catch (error) {
    await dispose();
    throw error;
  }
}

function createLoop(
  init: CoreInit,
  limits: Pick<SchedulerOptions, 'numBlocks' | 'blockSize' | 'maxModelLen'>,
  executor: Executor,
  engine: TransferEngine | undefined,
  handOver: HandOver | undefined,
  reporting: Pick<CoreLoopOptions, 'post' | 'kvSaved' | 'cacheChanged' | 'log' | 'timelines'>,
): CoreLoop {
  const { config } = init;
  const { log } = reporting;
  const { role, blockSize, maxNumSeqs, maxNumBatchedTokens, enablePrefixCaching, kvEventsPort } = config;
  const metrics = new MetricsPage(init.metrics.core);
  const split = role !== 'both' && engine ? { role, engine } : undefined;
  const grammars = new CoreGrammars(executor.vocabSize);
  const scheduler = new Scheduler(
    {
      ...limits,
      maxNumSeqs,
      maxNumBatchedTokens,
      enablePrefixCaching,
      logCacheChanges: kvEventsPort !== undefined,
      isLastToken: (grammar, history, token) => grammars.isLastToken(grammar, history, token),
    },
    split && new P2pSchedulerConnector({ role: split.role, blockSize, native: handOver !== undefined }),
  );
  const connector =
    split &&
    new P2pWorkerConnector({
      ...split,
      sendType: config.transfer.sendType,
      rank: config.transfer.rank,
      layers: executor.layers,
      log,
      metrics,
      ...(handOver && {
        native: { handOver, blocks: scheduler.blockManager, loadMs: config.transfer.timeouts.load },
      }),
    });
  return new CoreLoop({
    executor,
    scheduler,
    grammars,
    ...(connector && { connector }),
    loadFailure: config.loadFailure,
    metrics,
    ...(engine && { reportLoad: (load) => engine.reportLoad(load) }),
    ...reporting,
  });
}

async function createEngine(
  config: WorkerConfig,
  fingerprint: Fingerprint,
  metrics: SharedArrayBuffer,
  native: NativeInit | undefined,
): Promise<TransferEngine | undefined> {
  if (config.role === 'both') return undefined;
  // An undivided worker needs neither ZeroMQ nor a transport.
  const { TransferEngine } = await import('../transfer/engine.ts');
  const { transfer, http, httpAnnounceHost, proxy } = config;
  return TransferEngine.open(
    {
      ...transfer,
      fingerprint,
      // A port that the system chooses is not known yet: HTTP listens once there is something to serve.
      ...(http.port === 0
        ? {}
        : { httpAddress: formatHostPort({ host: httpAnnounceHost, port: http.port }) }),
      ...(proxy.length > 0 && { proxyAddress: proxy.map(formatHostPort).join(', ') }),
    },
    { metrics, ...(native && { native }) },
  );
}

/** With `--kv-key engine` each end has an id of its own for a request, and nothing that is wanted would be found. */
function speaksNative({ role, wire, transfer }: WorkerConfig): boolean {
  return role !== 'both' && wire !== 'frozen' && transfer.kvKey === 'transfer';
}

/** Between GPUs of one host, where the settings allow it. */
function wantsDirect(config: WorkerConfig, device: Device): boolean {
  const allowed = config.transport === 'auto' || config.transport === 'direct';
  return speaksNative(config) && allowed && device.kind === 'cuda';
}

/** Of a consumer whose cache others may write into. */
async function createSharedCache(
  config: WorkerConfig,
  device: Device,
  log: Logger,
): Promise<SharedCache | undefined> {
  if (config.role !== 'consumer' || !wantsDirect(config, device)) return undefined;
  const { sharedCache } = await import('../transfer/native/direct.ts');
  return sharedCache(log);
}

/** Undefined where it is not wanted, or `auto` and not possible here. */
async function openDirect(
  config: WorkerConfig,
  options: Parameters<typeof DirectWays.open>[0],
): Promise<DirectWays | undefined> {
  if (!wantsDirect(config, options.device)) return undefined;
  try {
    const { DirectWays } = await import('../transfer/native/direct.ts');
    return await DirectWays.open(options);
  } catch (error) {
    if (config.transport === 'direct') throw error;
    const { code, message } = PdError.from(error);
    options.log.warn({ code }, `direct writes are not possible here, KV goes by nccl: ${message}`);
    return undefined;
  }
}

function nativeInit(
  config: WorkerConfig,
  { layers }: Executor,
  nonce: Nonce,
  direct: DirectWays | undefined,
): NativeInit | undefined {
  const [first] = layers;
  if (!speaksNative(config) || !first) return undefined;
  const { layout, memory } = first.cache;
  const { numBlocks: blocks, blockSize, family } = layout;
  const pairs =
    memory.kind === 'host' ? (['host'] as const) : config.transport === 'direct' ? [] : (['nccl'] as const);
  return {
    nonce,
    layers: layers.map(({ cache }) => cache),
    shape: { blocks, blockSize, layers: layers.length, blockBytes: blockBytes(layout), family },
    transports: [...(direct ? (['direct'] as const) : []), ...pairs],
    ...(direct && { direct: direct.place }),
  };
}

async function createHandOver(
  { config: { role, transfer }, metrics }: CoreInit,
  engine: TransferEngine | undefined,
  native: NativeInit | undefined,
  direct: DirectWays | undefined,
  log: Logger,
  timelines: Timelines<CoreStage>,
): Promise<HandOver | undefined> {
  if (role === 'both' || !engine || !native) return undefined;
  const { HandOver } = await import('../transfer/native/hand-over.ts');
  return new HandOver({
    init: native,
    wire: engine.native.bind(engine),
    role,
    rank: transfer.rank,
    leaseMs: transfer.timeouts.orphan,
    log,
    metrics: new MetricsPage(metrics.core),
    onStage: (id, stage) => timelines.stamp(id, stage),
    ...(direct && { direct }),
  });
}
