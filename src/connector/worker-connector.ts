/** The worker half of the P2P connector: what the metadata of a step asks for, done by the transfer engine in the background. */
import { type Deferred, deferred } from '../deferred.ts';
import type { EventRef, PagedLayer } from '../device/device.ts';
import { type ErrorData, PdError } from '../errors.ts';
import { wireShape } from '../kv/families.ts';
import { formatHostPort, type HostPort } from '../net/address.ts';
import { createLogger, type Logger } from '../observability/log.ts';
import type { MetricsPage } from '../observability/metrics.ts';
import type { TransferEngineApi } from '../transfer/engine.ts';
import type { FirstTokens } from '../transfer/native/hand-over-api.ts';
import { type EngineRequestId, tensorIdOf } from '../wire/ids.ts';
import type { SendType } from '../wire/messages.ts';
import type { FinishedRequest, LoadOutcome, SaveOutcome, WorkerConnector } from './connector.ts';
import type { ConnectorMetadata, LoadMeta, SaveMeta } from './metadata.ts';
import { NativeHalf, type NativeParts } from './native-half.ts';
import type { KvRole } from './scheduler-connector.ts';

/** One moment in the life of a layer's save, in milliseconds since the epoch, when this thread learned of it. */
export interface SaveTrace {
  readonly requestId: EngineRequestId;
  readonly layer: string;
  readonly moment: 'computed' | 'gathered' | 'sent';
  readonly at: number;
}

export interface P2pWorkerConnectorOptions {
  readonly engine: TransferEngineApi;
  readonly role: KvRole;
  readonly sendType: SendType;
  /** Own rank: peers are reached at the port in the request id + rank. */
  readonly rank: number;
  /** Every layer of the model: what a load fills. */
  readonly layers: readonly { readonly name: string; readonly cache: PagedLayer }[];
  /** Absent: warnings to stdout. */
  readonly log?: Logger;
  readonly metrics?: MetricsPage;
  /** Absent: every request takes the frozen wire. */
  readonly native?: NativeParts;
  readonly trace?: (event: SaveTrace) => void;
}

/** A save that has begun: what its consumer must be told of. */
interface SaveProgress {
  /** Layers for which there is no pair with the peer yet. */
  opening: number;
  failure: ErrorData | undefined;
  /** Resolves once none is opening any more, or it has failed. */
  readonly settled: Deferred<ErrorData | undefined>;
}

/** One per paged cache, beside the model that writes it. It does not own the engine: dispose that yourself, after the last step. */
export class P2pWorkerConnector implements WorkerConnector {
  readonly #options: P2pWorkerConnectorOptions;
  readonly #log: Logger;
  readonly #native: NativeHalf | undefined;
  /** By its name. */
  readonly #layerIndex: ReadonlyMap<string, number>;
  #saves: readonly SaveMeta[] = [];
  /** Moments that `waitForSave` waits for. None rejects. */
  readonly #pending: Promise<void>[] = [];
  readonly #progress = new Map<SaveMeta, SaveProgress>();
  /** Loads under way; none rejects. */
  readonly #loads = new Map<EngineRequestId, Promise<void>>();
  #stepLoads: Promise<void>[] = [];
  readonly #outcomes: LoadOutcome[] = [];
  #ended = deferred<void>();
  /** `#ended` is resolved. */
  #rung = false;

  constructor(options: P2pWorkerConnectorOptions) {
    this.#options = options;
    this.#log = options.log ?? createLogger({ level: 'warn', format: 'auto' }, 'connector');
    this.#layerIndex = new Map(options.layers.map(({ name }, index) => [name, index]));
    this.#native =
      options.native &&
      new NativeHalf(options.native, {
        loadEnded: (outcome) => this.#loadEnded(outcome),
        freed: () => this.#ring(),
        ownRankOf: (rank0) => this.#ownRankOf(rank0),
      });
  }

  get loadEnded(): Promise<void> {
    return this.#ended.promise;
  }

  startLoadKv(metadata: ConnectorMetadata): void {
    const { saves, loads, cancels, fills, wants } = metadata;
    if (saves.length + loads.length + cancels.length + fills.length + wants.length > 0) {
      this.#log.debug(
        {
          saves: saves.map(({ requestId }) => requestId),
          loads: loads.map(({ requestId }) => requestId),
          cancels,
          ...(fills.length > 0 && { fills: fills.map(({ requestId }) => requestId) }),
          ...(wants.length > 0 && { wants: wants.map(({ requestId }) => requestId) }),
        },
        'connector metadata built',
      );
    }
    this.#saves = saves;
    this.#stepLoads = loads.map((load) => this.#startLoad(load));
    for (const requestId of cancels) {
      if (this.#loads.has(requestId)) this.#options.engine.cancelLoad(requestId);
    }
    this.#native?.start(metadata);
  }

  async waitForLayerLoad(layerName: string): Promise<void> {
    if (!this.#options.layers.some(({ name }) => name === layerName)) {
      throw new PdError(
        'REQUEST_INVALID',
        `there is no layer ${JSON.stringify(layerName)} to wait for; there are ${this.#options.layers.map(({ name }) => name).join(', ') || 'none'}`,
      );
    }
    const loads = this.#stepLoads;
    if (loads.length > 0) this.#log.debug({ layerName, loads: loads.length }, 'waitForLayerLoad: begins');
    // The engine puts all layers of a request in place as one load, so each layer is there when all are.
    await Promise.all(loads);
    if (loads.length > 0) this.#log.debug({ layerName, loads: loads.length }, 'waitForLayerLoad: done');
  }

  saveKvLayer(layerName: string, layer: PagedLayer, ready?: EventRef): void {
    for (const save of this.#saves) this.#saveLayer(save, layerName, layer, ready);
    const index = this.#layerIndex.get(layerName);
    if (index !== undefined) this.#native?.layer(index, ready);
  }

  async waitForSave(): Promise<readonly SaveOutcome[]> {
    const pending = this.#pending.splice(0);
    this.#saves = [];
    // Where something is saved: most steps of a decode have nothing to wait for.
    const begun = performance.now();
    if (pending.length > 0) this.#log.debug({ layers: pending.length }, 'waitForSave: begins');
    await Promise.all(pending);
    await this.#native?.stepEnded();
    const outcomes = [...this.#progress].flatMap(([{ requestId }, progress]): SaveOutcome | [] => {
      const { failure: error, opening, settled } = progress;
      if (error) return { requestId, state: 'failed', error };
      return opening === 0 ? [] : { requestId, state: 'opening', settled: settled.promise };
    });
    this.#progress.clear();
    if (pending.length > 0) {
      const milliseconds = Math.round(performance.now() - begun);
      const failed = outcomes.filter(({ state }) => state === 'failed').length;
      this.#log.debug({ layers: pending.length, failed, milliseconds }, 'waitForSave: done');
    }
    return outcomes;
  }

  promptsDrawn(draws: ReadonlyMap<EngineRequestId, FirstTokens>): void {
    this.#native?.promptsDrawn(draws);
  }

  makeRoom(numBlocks: number): true | number | undefined {
    return this.#native?.makeRoom(numBlocks);
  }

  getFinished(): LoadOutcome[] {
    if (!this.#rung) return [];
    this.#rung = false;
    this.#ended = deferred<void>();
    return this.#outcomes.splice(0);
  }

  requestFinished(request: FinishedRequest): void {
    if (this.#native?.requestFinished(request)) return;
    const { transferId, aborted } = request;
    // A producer is done once its part is kept or on its way; the consumer fetches it later. After an abort nobody does.
    const keepSends = this.#options.role === 'producer' && !aborted;
    this.#options.engine.finish(transferId, { keepSends });
  }

  #startLoad(load: LoadMeta): Promise<void> {
    const { engine, layers } = this.#options;
    const { requestId, transferId, promptDigest, blockIds, skipBlocks, numTokens, prefillWithinMs } = load;
    const peer = this.#ownRankOf(load.peer);
    const [first] = layers;
    const blockSize = first?.cache.layout.blockSize ?? 0;
    this.#log.debug(
      {
        requestId,
        transferId,
        tensorId: first && tensorIdOf(transferId, first.name),
        layers: layers.length,
        shape: first && wireShape(first.cache.layout, blockIds.length),
        dtype: first?.cache.layout.dtype,
        numTokens,
        skipBlocks,
        peer: formatHostPort(peer),
      },
      'load started',
    );
    const request = {
      requestId,
      transferId,
      ...(promptDigest !== undefined && { promptDigest }),
      peer,
      layers: layers.map(({ name, cache }) => ({ name, target: cache })),
      blockIds: Int32Array.from(blockIds),
      skipBlocks,
      // What the local cache has is whole blocks.
      numTokens: skipBlocks * blockSize + numTokens,
      ...(prefillWithinMs !== undefined && { prefillWithinMs }),
    };
    // In an async function, so that what `load` throws ends this load like what it rejects with.
    const ended = (async () => engine.load(request))().then(
      ({ bytes, milliseconds }) => {
        this.#log.debug(
          { requestId, transferId, layers: layers.length, bytes, milliseconds },
          'waitForLayerLoad: every layer of the load is in place',
        );
        this.#loadEnded({ requestId, ok: true, bytes, milliseconds });
      },
      (error: unknown) => {
        const data = PdError.from(error, 'KV_LOAD_FAILED', { requestId, transferId }).toData();
        this.#loadEnded({ requestId, ok: false, error: data, quarantined: false });
      },
    );
    this.#loads.set(requestId, ended);
    return ended;
  }

  #loadEnded(outcome: LoadOutcome): void {
    this.#loads.delete(outcome.requestId);
    this.#outcomes.push(outcome);
    this.#ring();
  }

  #ring(): void {
    this.#rung = true;
    this.#ended.resolve();
  }

  #saveLayer(save: SaveMeta, layerName: string, layer: PagedLayer, ready?: EventRef): void {
    const { engine, sendType, trace } = this.#options;
    const { requestId, transferId, promptDigest } = save;
    const tensorId = tensorIdOf(transferId, layerName);
    const shape = wireShape(layer.layout, save.blockIds.length);
    const peer = sendType === 'GET' ? undefined : this.#ownRankOf(save.peer);
    const moment = (name: SaveTrace['moment']) =>
      trace?.({ requestId, layer: layerName, moment: name, at: now() });
    moment('computed');
    const handle = engine.send({
      tensorId,
      shape,
      dtype: layer.layout.dtype,
      source: { kind: 'blocks', layer, blockIds: Int32Array.from(save.blockIds) },
      numTokens: save.numTokens,
      ...(promptDigest !== undefined && { promptDigest }),
      ...(ready && { ready }),
      ...(peer && { peer }),
    });
    this.#log.debug(
      {
        requestId,
        transferId,
        tensorId,
        shape,
        dtype: layer.layout.dtype,
        peer: peer && formatHostPort(peer),
      },
      'layer saved',
    );
    const progress = this.#progressOf(save);
    const failed = (error: unknown) => this.#saveFailed(save, progress, error);
    progress.opening++;
    handle.underWay.then(() => {
      if (--progress.opening === 0) progress.settled.resolve(undefined);
    }, failed);
    const gathered = handle.gathered.then(() => moment('gathered'), failed);
    const sent = handle.sent.then(() => moment('sent'), failed);
    this.#pending.push(this.#isSaved(gathered, sent));
  }

  /**
   * PUT_ASYNC: the blocks may be reused; the sending goes on. PUT: the peer has it. GET: it is kept, so that whoever asks after the HTTP
   * answer finds it. Always gathered too: a failed send may not have let go of the blocks.
   */
  #isSaved(gathered: Promise<void>, sent: Promise<void>): Promise<void> {
    switch (this.#options.sendType) {
      case 'PUT_ASYNC':
        return gathered;
      case 'PUT':
      case 'GET':
        return Promise.all([gathered, sent]).then(() => undefined);
    }
  }

  #progressOf(save: SaveMeta): SaveProgress {
    const known = this.#progress.get(save);
    if (known) return known;
    const made = { opening: 0, failure: undefined, settled: deferred<ErrorData | undefined>() };
    this.#progress.set(save, made);
    return made;
  }

  /** Once per request, whose layers tend to fail together: the consumer's policy decides what becomes of it. */
  #saveFailed(save: SaveMeta, progress: SaveProgress, cause: unknown): void {
    const { requestId, transferId } = save;
    if (progress.failure) return;
    const error = PdError.from(cause, 'KV_SEND_FAILED', { requestId, transferId });
    progress.failure = error.toData();
    progress.settled.resolve(progress.failure);
    this.#options.metrics?.inc('pd_kv_saves_failed_total', 1);
    this.#log.warn(
      { requestId, transferId, peer: formatHostPort(save.peer), code: error.code },
      `KV of request ${requestId} could not be sent: ${error.message}`,
    );
  }

  #ownRankOf(rank0: HostPort): HostPort {
    return { host: rank0.host, port: rank0.port + this.#options.rank };
  }
}

/** Comparable between threads: `performance.now()` alone counts from the start of its own. */
function now(): number {
  return performance.timeOrigin + performance.now();
}
