/** KV leaves while the prompt is still being computed: layer 2 is not computed before layer 0 has left this process's hands. */
import pino from 'pino';
import { afterEach, expect, it } from 'vitest';
import { DEFAULT_LIMITS } from '../../src/config/transfer-options.ts';
import { P2pSchedulerConnector } from '../../src/connector/scheduler-connector.ts';
import { P2pWorkerConnector, type SaveTrace } from '../../src/connector/worker-connector.ts';
import { createDevice } from '../../src/device/create-device.ts';
import { allocatePagedCache, attentionLayerName } from '../../src/device/paged-cache.ts';
import { PdError } from '../../src/errors.ts';
import { layerBytes } from '../../src/kv/layout.ts';
import type { Executor, LayerHooks } from '../../src/model/executor.ts';
import { MetricsPage, readMetric } from '../../src/observability/metrics.ts';
import { Scheduler } from '../../src/scheduler/scheduler.ts';
import type { ForwardBatch, ForwardResult } from '../../src/scheduler/types.ts';
import { TransferEngine } from '../../src/transfer/engine.ts';
import { engineRequestId, proxyRequestId } from '../../src/wire/ids.ts';
import type { SendType } from '../../src/wire/messages.ts';
import { CoreLoop } from '../../src/worker/core.ts';
import { greedy } from '../support/core-harness.ts';
import { PATIENT_TIMEOUTS } from '../support/transfer.ts';

const LAYERS = 4;
const PROMPT = 10;
const layout = {
  family: 'kv-first',
  numBlocks: 8,
  blockSize: 4,
  heads: 2,
  headDim: 16,
  dtype: 'float32',
} as const;
/** Of the prompt in one layer, on the wire: three blocks. */
const LAYER_BYTES = (layerBytes(layout) / layout.numBlocks) * 3;

const open: { dispose(): Promise<void> | void }[] = [];
afterEach(async () => {
  for (const each of open.splice(0)) await each.dispose();
});

async function engine(sendType: SendType, metrics: MetricsPage): Promise<TransferEngine> {
  const created = await TransferEngine.create(
    {
      device: 'host',
      bind: { host: '127.0.0.1', port: 0 },
      announceHost: '127.0.0.1',
      rank: 0,
      sendType,
      kvBufferSize: 2 ** 20,
      memPoolSize: 2 ** 20,
      ncclNumChannels: 8,
      timeouts: PATIENT_TIMEOUTS,
      limits: DEFAULT_LIMITS,
      log: { level: 'warn', format: 'json' },
    },
    { metrics: metrics.buffer },
  );
  open.push(created);
  return created;
}

/** Computes without ever giving its event loop a turn, and before layer 2 waits until layer 0 has been sent. */
class BusyExecutor implements Executor {
  readonly layers: Executor['layers'];
  readonly vocabSize = 10;
  readonly #sentBytes: () => number;
  /** Bytes that had been sent when each layer was begun. */
  readonly sentBefore: number[] = [];

  constructor(layers: Executor['layers'], sentBytes: () => number) {
    this.layers = layers;
    this.#sentBytes = sentBytes;
  }

  async forward(batch: ForwardBatch, hooks: LayerHooks): Promise<ForwardResult> {
    const nothing = new Int32Array(new SharedArrayBuffer(4));
    for (let index = 0; index < LAYERS; index++) {
      if (index === 2) {
        const deadline = performance.now() + 60_000;
        while (this.#sentBytes() < LAYER_BYTES) {
          if (performance.now() > deadline) throw new Error('layer 0 did not leave while layer 2 waited');
          Atomics.wait(nothing, 0, 0, 1); // blocks this thread: what leaves, leaves without it
        }
      }
      this.sentBefore.push(this.#sentBytes());
      hooks.afterLayer?.(index);
    }
    const sampled = batch.sequences.map(({ sequenceId }) => ({ sequenceId, token: 1 }));
    return { sampled, promptLogprobs: new Map() };
  }

  logits(): never {
    throw new PdError('INTERNAL', 'not part of this fake');
  }

  dispose(): void {}
}

it.each(['PUT', 'PUT_ASYNC'] as const)('%s: layer 0 leaves before layer 2 is computed', async (sendType) => {
  const page = new MetricsPage();
  const [producer, consumer] = await Promise.all([
    engine(sendType, page),
    engine(sendType, new MetricsPage()),
  ]);
  const device = await createDevice('host');
  open.push(device);
  const names = Array.from({ length: LAYERS }, (_, index) => attentionLayerName(index));
  const layers = allocatePagedCache(device, layout, names);
  const executor = new BusyExecutor(layers, () => readMetric([page], 'pd_kv_sent_bytes_total'));
  const trace: SaveTrace[] = [];
  const log = pino({ level: 'silent' });
  const answered: string[] = [];
  let onAnswer = () => {};
  const loop = new CoreLoop({
    executor,
    scheduler: new Scheduler(
      {
        numBlocks: 8,
        blockSize: 4,
        maxModelLen: 32,
        maxNumSeqs: 2,
        maxNumBatchedTokens: 32,
        enablePrefixCaching: true,
      },
      new P2pSchedulerConnector({ role: 'producer', blockSize: 4 }),
    ),
    connector: new P2pWorkerConnector({
      engine: producer,
      role: 'producer',
      sendType,
      rank: 0,
      layers,
      log,
      trace: (event) => trace.push(event),
    }),
    loadFailure: 'fail',
    metrics: new MetricsPage(),
    log,
    post: (outputs) => {
      answered.push(...outputs.map(({ error }) => error?.message ?? 'ok'));
      onAnswer();
    },
  });
  const ended = loop.run();
  const id = proxyRequestId(producer.address, consumer.address, '0123456789abcdef0123456789abcdef');
  const answer = new Promise<void>((resolve) => {
    onAnswer = resolve;
  });
  loop.add(greedy(engineRequestId(`cmpl-${id}-0`, 'deadbeef'), Array(PROMPT).fill(1), { maxTokens: 1 }));
  await answer;
  expect(answered).toEqual(['ok']);
  expect(executor.sentBefore[2]).toBeGreaterThanOrEqual(LAYER_BYTES);
  expect(executor.sentBefore[0]).toBe(0);
  if (sendType === 'PUT') {
    expect(trace.filter(({ moment }) => moment === 'sent')).toHaveLength(LAYERS);
    expect(readMetric([page], 'pd_kv_sent_bytes_total')).toBe(LAYER_BYTES * LAYERS);
  }
  loop.close();
  await ended;
});
