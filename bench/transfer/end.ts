/**
 * One end of the product's hand-over as a worker's core thread has it: a paged cache with its books, the connector and the hand-over, the
 * transfer thread behind them. The benchmark stands for scheduler and model: it says what a step computes and what is wanted.
 */
import { setTimeout as sleep } from 'node:timers/promises';
import { DEFAULT_LIMITS } from '../../src/config/transfer-options.ts';
import type { ConnectorMetadata } from '../../src/connector/metadata.ts';
import { P2pWorkerConnector } from '../../src/connector/worker-connector.ts';
import { type Deferred, deferred } from '../../src/deferred.ts';
import type { Device, DeviceEvent, PagedLayer } from '../../src/device/device.ts';
import { allocatePagedCache } from '../../src/device/paged-cache.ts';
import type { EventPoller } from '../../src/device/poller.ts';
import { PdError } from '../../src/errors.ts';
import { BlockManager } from '../../src/kv/block-manager.ts';
import type { HostPort } from '../../src/net/address.ts';
import { createLogger } from '../../src/observability/log.ts';
import { MetricsPage } from '../../src/observability/metrics.ts';
import { monotonicMs, type Timeline, Timelines } from '../../src/observability/timelines.ts';
import { TransferEngine } from '../../src/transfer/engine.ts';
import type { FirstTokens, HandOverStage } from '../../src/transfer/native/hand-over-api.ts';
import { KvCache } from '../../src/transfer/native/kv-cache.ts';
import { NativeTransfer } from '../../src/transfer/native/native-transfer.ts';
import { type EngineRequestId, engineRequestId, type TransferId } from '../../src/wire/ids.ts';
import type { Compute } from './compute.ts';
import type { EndSetup, FlagTimes, PeerSetup, Reply } from './messages.ts';
import { iterationsOf, layerName, layoutOf, xorshift } from './shape.ts';

const LOOPBACK = '127.0.0.1';
/** Of a step's last event. */
const STEP_TIMEOUT_MS = 30_000;
/** For WANTs to reach a producer. */
const ASKED_MS = 20_000;
/** For a write that has just been launched to land and to be told of. */
const REPLY_MS = 2;
const DIGEST = '00'.repeat(16);
const DRAWN: FirstTokens = { tokens: [7] };
const NOTHING: ConnectorMetadata = {
  saves: [],
  loads: [],
  cancels: [],
  lost: [],
  fills: [],
  wants: [],
  unwanted: [],
};

interface Parts {
  readonly native: NativeTransfer;
  readonly connector: P2pWorkerConnector;
  readonly layers: readonly PagedLayer[];
  readonly blocks: BlockManager;
  readonly timelines: Timelines<HandOverStage | 'begun'>;
  readonly flags: ReadonlyMap<TransferId, FlagTimes>;
  readonly poller: EventPoller;
  /** After all else. */
  readonly dispose: () => void;
}

export class End {
  readonly #parts: Parts;
  readonly #loads = new Map<EngineRequestId, Deferred<number>>();
  #closed = false;

  private constructor(parts: Parts) {
    this.#parts = parts;
    void this.#collect();
  }

  /** Throws what a worker's start throws. */
  static async create(
    device: Device,
    { shape, ncclNumChannels }: PeerSetup,
    { role, transport, blocks: numBlocks, kvBufferSize, timeouts, logLevel }: EndSetup,
    poller: EventPoller,
  ): Promise<End> {
    const log = createLogger({ level: logLevel, format: 'json' }, role);
    const layout = layoutOf(shape, numBlocks);
    const names = Array.from({ length: shape.layers }, (_, i) => layerName(i));
    const cache =
      role === 'consumer' && transport === 'direct'
        ? await KvCache.allocate(device, layout, names, log)
        : undefined;
    const named = cache?.layers ?? allocatePagedCache(device, layout, names);
    const { blockSize } = shape;
    const timelines = new Timelines<HandOverStage | 'begun'>();
    const flags = new Map<TransferId, FlagTimes>();
    const options = {
      device: device.name,
      ncclNumChannels,
      kvBufferSize,
      bind: { host: LOOPBACK, port: 0 },
      announceHost: LOOPBACK,
      rank: 0,
      timeouts,
      limits: DEFAULT_LIMITS,
      log: { level: logLevel, format: 'json' },
    } as const;
    const native = await NativeTransfer.open({
      role,
      rank: 0,
      transport,
      device,
      layers: named,
      exported: cache?.exported,
      leaseMs: timeouts.orphan,
      // what is measured here is measured alone
      busy: () => true,
      log,
      metrics: new MetricsPage(),
      onStage: (id, stage) => timelines.stamp(id, stage),
      onFlag: (id, { began, ended }) => {
        flags.set(id, { began: Number(began) / 1e6, ended: Number(ended) / 1e6, seen: monotonicMs() });
      },
      openEngine: (init) => TransferEngine.create(options, { native: init }),
    });
    const { engine, handOver } = native;
    const blocks = new BlockManager(numBlocks, blockSize);
    scatter(blocks);
    const connector = new P2pWorkerConnector({
      engine,
      role,
      sendType: 'PUT_ASYNC',
      rank: 0,
      layers: named,
      log,
      native: { handOver, blocks, loadMs: timeouts.load },
    });
    const layers = named.map((layer) => layer.cache);
    const dispose = () => cache?.dispose();
    return new End({ native, connector, layers, blocks, timelines, flags, poller, dispose });
  }

  get address(): HostPort {
    return this.#parts.native.engine.address;
  }

  get layers(): readonly PagedLayer[] {
    return this.#parts.layers;
  }

  timelines(): readonly Timeline[] {
    return this.#parts.timelines.recent();
  }

  want(ids: readonly TransferId[], tokens: number, peer: HostPort): Reply {
    const { blocks, connector, timelines } = this.#parts;
    const wants = ids.map((transferId) => {
      const requestId = engineRequestId(transferId);
      timelines.begin(transferId, 'begun');
      const load = deferred<number>();
      // it may fail before anybody asks for its end
      load.promise.catch(() => undefined);
      this.#loads.set(requestId, load);
      const common = { requestId, transferId, promptDigest: DIGEST, samplingDigest: DIGEST, peer };
      return {
        ...common,
        numTokens: tokens,
        skipBlocks: 0,
        blockIds: [...blocks.allocate(requestId, tokens)],
      };
    });
    const at = monotonicMs();
    connector.startLoadKv({ ...NOTHING, wants });
    return { at, blocks: wants.map(({ blockIds }) => blockIds) };
  }

  /** Once so many WANTs wait for their prompts. Throws PEER_ANSWER_TIMEOUT. */
  async asked(count: number): Promise<void> {
    const deadline = monotonicMs() + ASKED_MS;
    while (this.#parts.native.state().grants.unbound < count) {
      if (monotonicMs() > deadline)
        throw new PdError('PEER_ANSWER_TIMEOUT', `${count} WANTs have not come within ${ASKED_MS} ms`);
      await sleep(1);
    }
  }

  /** When the last of them was there. Throws why one did not come. */
  async loaded(ids: readonly TransferId[]): Promise<Reply> {
    const ends = ids.map((id) => this.#loads.get(engineRequestId(id))?.promise ?? 0);
    const at = Math.max(...(await Promise.all(ends)));
    const flags = ids.flatMap((id) => this.#parts.flags.get(id) ?? []);
    return { at, ...(flags.length > 0 && { flags }) };
  }

  /** `at`: the last layer was computed, as the core thread sees its event; `sentAt`: the connector knew what was drawn. */
  async prefill(
    ids: readonly TransferId[],
    tokens: number,
    compute: Compute | undefined,
    abandon: boolean,
  ): Promise<Reply> {
    const { blocks, connector, layers, timelines, poller } = this.#parts;
    const fills = ids.map((transferId) => {
      const requestId = engineRequestId(transferId);
      timelines.begin(transferId, 'begun');
      const blockIds = [...blocks.allocate(requestId, tokens)];
      const common = { requestId, transferId, promptDigest: DIGEST, samplingDigest: DIGEST };
      return { ...common, numTokens: tokens, numComputed: tokens, blockIds };
    });
    const firstSendAt = monotonicMs();
    connector.startLoadKv({ ...NOTHING, fills });
    const events: DeviceEvent[] = [];
    for (const [i, layer] of layers.entries()) {
      const event = compute?.one(compute.prefillLoop, iterationsOf(tokens));
      if (event) events.push(event);
      connector.saveKvLayer(layerName(i), layer, event?.ref);
    }
    const last = events.at(-1);
    if (last) await poller.wait(last, STEP_TIMEOUT_MS, 'a step');
    const at = monotonicMs();
    await connector.waitForSave();
    if (!abandon) connector.promptsDrawn(new Map(fills.map(({ requestId }) => [requestId, DRAWN])));
    const sentAt = monotonicMs();
    for (const { requestId, transferId } of fills) {
      connector.requestFinished({ requestId, transferId, aborted: abandon });
      blocks.free(requestId);
    }
    for (const event of events) event.dispose();
    // what is said to the benchmark must not stand in the way of what ends the hand-over
    await sleep(REPLY_MS);
    return { at, firstSendAt, sentAt, blocks: fills.map(({ blockIds }) => blockIds) };
  }

  async close(): Promise<void> {
    this.#closed = true;
    await this.#parts.native.close();
    this.#parts.dispose();
  }

  async #collect(): Promise<void> {
    const { connector, blocks } = this.#parts;
    while (!this.#closed) {
      await connector.loadEnded;
      for (const outcome of connector.getFinished()) {
        const at = monotonicMs();
        const { requestId } = outcome;
        blocks.free(requestId);
        const transferId = requestId as string as TransferId;
        connector.requestFinished({ requestId, transferId, aborted: false });
        const load = this.#loads.get(requestId);
        if (outcome.ok) load?.resolve(at);
        else load?.reject(PdError.fromData(outcome.error));
      }
    }
  }
}

/** Tables of a worker that has served for a while: blocks in no order. */
function scatter(blocks: BlockManager): void {
  const next = xorshift(blocks.numBlocks);
  const ids = Array.from({ length: blocks.numBlocks }, (_, i) => ({ id: String(i), at: next() }));
  for (const { id } of ids) blocks.allocate(id, 1);
  for (const { id } of ids.sort((a, b) => a.at - b.at)) blocks.free(id);
}
