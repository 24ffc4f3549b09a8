/** Puts the core together: device, model, transfer engine, connectors, scheduler, loop; and takes it apart again. */
import type { WorkerConfig } from '../config/worker-config.ts';
import { P2pSchedulerConnector } from '../connector/scheduler-connector.ts';
import { P2pWorkerConnector } from '../connector/worker-connector.ts';
import { createDevice } from '../device/create-device.ts';
import type { Device } from '../device/device.ts';
import { createExecutor } from '../model/create-executor.ts';
import { formatHostPort } from '../net/address.ts';
import type { Logger } from '../observability/log.ts';
import { MetricsPage } from '../observability/metrics.ts';
import { Timelines } from '../observability/timelines.ts';
import { maxSequenceLength, Scheduler } from '../scheduler/scheduler.ts';
import type { TransferEngine } from '../transfer/engine.ts';
import type { NativeInit } from '../transfer/native/channel.ts';
import type { HandOver } from '../transfer/native/hand-over.ts';
import type { KvCache } from '../transfer/native/kv-cache.ts';
import type { NativeTransfer, NativeTransferParts } from '../transfer/native/native-transfer.ts';
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
  let loop: CoreLoop | undefined;
  const dispose = async () => {
    for (let last = undo.pop(); last; last = undo.pop()) await last();
  };
  try {
    const device = await createDevice(config.transfer.device);
    undo.push(() => device.dispose());
    const shared: { cache?: KvCache } = {};
    const { executor, fingerprint, maxModelLen, numBlocks } = await createExecutor({
      config,
      device,
      log,
      ...(sharesCache(config, device) && {
        allocateCache: async (on, layout, names) => {
          const { KvCache } = await import('../transfer/native/kv-cache.ts');
          const cache = await KvCache.allocate(on, layout, names, log);
          undo.push(() => cache.dispose());
          shared.cache = cache;
          return cache.layers;
        },
      }),
    });
    undo.push(() => executor.dispose());
    const timelines = new Timelines<CoreStage>();
    const openEngine = (native?: NativeInit) =>
      createEngine(config, fingerprint, init.metrics.transfer, native);
    const metrics = new MetricsPage(init.metrics.core);
    const native = await createNative(config, {
      device,
      layers: executor.layers,
      exported: shared.cache?.exported,
      busy: () => loop?.isBusy ?? true,
      log,
      metrics,
      onStage: (id, stage, facts) => {
        timelines.stamp(id, stage);
        if (facts) timelines.note(id, { ...facts });
      },
      openEngine,
    });
    if (native) undo.push(() => native.close());
    // An undivided worker needs neither ZeroMQ nor a transport.
    const frozen = native || config.role === 'both' ? undefined : await openEngine();
    if (frozen) undo.push(() => frozen.dispose());
    const engine = native?.engine ?? frozen;
    const handOver = native?.whole;
    const { role, blockSize, maxNumSeqs, maxNumBatchedTokens, enablePrefixCaching, transfer } = config;
    const limits = { numBlocks, blockSize, maxModelLen };
    const split = role !== 'both' && engine ? { role, engine } : undefined;
    const grammars = new CoreGrammars(executor.vocabSize);
    const scheduler = new Scheduler(
      {
        ...limits,
        maxNumSeqs,
        maxNumBatchedTokens,
        enablePrefixCaching,
        logCacheChanges: config.kvEventsPort !== undefined,
        isLastToken: (grammar, history, token) => grammars.isLastToken(grammar, history, token),
      },
      split && new P2pSchedulerConnector({ role: split.role, blockSize, native: handOver !== undefined }),
    );
    const connector =
      split &&
      new P2pWorkerConnector({
        ...split,
        sendType: transfer.sendType,
        rank: transfer.rank,
        layers: executor.layers,
        log,
        metrics,
        ...(handOver && {
          native: { handOver, blocks: scheduler.blockManager, loadMs: transfer.timeouts.load },
        }),
      });
    loop = new CoreLoop({
      executor,
      scheduler,
      grammars,
      ...(connector && { connector }),
      loadFailure: config.loadFailure,
      metrics,
      ...(engine && { reportLoad: (load) => engine.reportLoad(load) }),
      log,
      timelines,
      pairs: device.kind === 'cuda' ? 'nccl' : 'host',
      ...told,
    });
    return {
      loop,
      info: {
        ...(engine && { kvAddress: formatHostPort(engine.address) }),
        maxModelLen: maxSequenceLength(limits),
        numBlocks,
        blockSize,
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

async function createEngine(
  config: WorkerConfig,
  fingerprint: Fingerprint,
  metrics: SharedArrayBuffer,
  native: NativeInit | undefined,
): Promise<TransferEngine> {
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

/** Of a consumer on a GPU: producers of its host may write into it, where the settings allow it. */
function sharesCache(config: WorkerConfig, device: Device): boolean {
  const allowed = config.transport === 'auto' || config.transport === 'direct';
  return config.role === 'consumer' && speaksNative(config) && allowed && device.kind === 'cuda';
}

async function createNative(
  config: WorkerConfig,
  parts: Omit<NativeTransferParts, 'role' | 'rank' | 'transport' | 'leaseMs'>,
): Promise<NativeTransfer | undefined> {
  const { role, transport, transfer } = config;
  if (role === 'both' || !speaksNative(config) || parts.layers.length === 0) return undefined;
  const { NativeTransfer } = await import('../transfer/native/native-transfer.ts');
  const { rank, timeouts } = transfer;
  return NativeTransfer.open({ ...parts, role, rank, transport, leaseMs: timeouts.orphan });
}
