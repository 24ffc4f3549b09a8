import pino from 'pino';
import { describe, expect, it } from 'vitest';
import { type KvRole, P2pSchedulerConnector } from '../../../src/connector/scheduler-connector.ts';
import { P2pWorkerConnector, type SaveTrace } from '../../../src/connector/worker-connector.ts';
import type { PagedLayer } from '../../../src/device/device.ts';
import { PdError } from '../../../src/errors.ts';
import { MetricsPage, readMetric } from '../../../src/observability/metrics.ts';
import { engineRequestId, transferIdOf } from '../../../src/wire/ids.ts';
import type { SendType } from '../../../src/wire/messages.ts';
import { FakeEngine } from '../../support/fake-engine.ts';

const PATTERN = '___prefill_addr_10.0.0.1:8082___decode_addr_10.0.0.2:8084_0123456789abcdef0123456789abcdef';
const transferId = transferIdOf(`cmpl-${PATTERN}-0`);
const requestId = engineRequestId(transferId, 'deadbeef');
const request = { requestId, transferId, numPromptTokens: 10, mayLoad: true };

const cache: PagedLayer = {
  memory: { kind: 'host', buffer: new SharedArrayBuffer(0), offset: 0, bytes: 0 },
  layout: { family: 'kv-first', numBlocks: 16, blockSize: 4, heads: 2, headDim: 8, dtype: 'float32' },
};
const layers = [0, 1].map((index) => ({ name: `model.layers.${index}.self_attn.attn`, cache }));

function connect(role: KvRole, sendType: SendType = 'PUT_ASYNC', rank = 0) {
  const engine = new FakeEngine();
  const scheduler = new P2pSchedulerConnector({ role, blockSize: 4 });
  const metrics = new MetricsPage();
  const lines: Record<string, unknown>[] = [];
  const log = pino({ level: 'debug' }, { write: (line: string) => lines.push(JSON.parse(line)) });
  const events: SaveTrace[] = [];
  const trace = (event: SaveTrace) => events.push(event);
  const worker = new P2pWorkerConnector({ engine, role, sendType, rank, layers, log, metrics, trace });
  return { engine, scheduler, worker, metrics, lines, events };
}

type Connected = ReturnType<typeof connect>;

function startSave({ scheduler, worker }: Connected): void {
  const blockIds = [5, 3, 9];
  const step = [
    { requestId, transferId, numPromptTokens: 10, numComputedTokens: 0, numScheduledTokens: 10, blockIds },
  ];
  worker.startLoadKv(scheduler.buildConnectorMeta(step));
  for (const { name } of layers) worker.saveKvLayer(name, cache);
}

function startLoad({ scheduler, worker }: Connected): void {
  scheduler.updateStateAfterAlloc(request, [5, 3, 9], 4, 5);
  worker.startLoadKv(scheduler.buildConnectorMeta([]));
}

async function isSettled(promise: Promise<unknown>): Promise<boolean> {
  let settled = false;
  void promise.then(() => {
    settled = true;
  });
  await new Promise((resolve) => setImmediate(resolve));
  return settled;
}

describe('saving', () => {
  it('sends every layer as it is saved, keyed by the transfer id, to the same rank', () => {
    const all = connect('producer', 'PUT_ASYNC', 3);
    startSave(all);
    expect(all.engine.sends.map(({ request: sent }) => sent)).toEqual(
      layers.map(({ name }) => ({
        tensorId: `${transferId}#${name}`,
        shape: [2, 3, 4, 2, 8],
        dtype: 'float32',
        source: { kind: 'blocks', layer: cache, blockIds: Int32Array.of(5, 3, 9) },
        numTokens: 10,
        peer: { host: '10.0.0.2', port: 8087 },
      })),
    );
    const saved = all.lines.filter(({ msg }) => msg === 'layer saved');
    expect(saved).toHaveLength(2);
    expect(saved[0]).toMatchObject({ requestId, transferId, peer: '10.0.0.2:8087', shape: [2, 3, 4, 2, 8] });
  });

  it('names no peer in GET and passes the event on', () => {
    const all = connect('producer', 'GET');
    startSave(all);
    all.worker.saveKvLayer('x', cache, { kind: 'host' });
    expect(all.engine.sends.every(({ request: sent }) => sent.peer === undefined)).toBe(true);
    expect(all.engine.sends.map(({ request: sent }) => sent.ready)).toEqual([
      undefined,
      undefined,
      { kind: 'host' },
    ]);
  });

  it.each([
    ['PUT_ASYNC', true],
    ['PUT', false],
    ['GET', false],
  ] as const)('%s: a save that is gathered is over: %s', async (sendType, over) => {
    const all = connect('producer', sendType);
    startSave(all);
    const saved = all.worker.waitForSave();
    for (const { gathered } of all.engine.sends) gathered.resolve();
    expect(await isSettled(saved)).toBe(over);
    for (const { sent } of all.engine.sends) sent.resolve(1);
    expect(await saved).toEqual([]);
    expect(new Set(all.events.map(({ moment }) => moment))).toEqual(
      new Set(['computed', 'gathered', 'sent']),
    );
  });

  it('does not let go of blocks that a failed send still reads', async () => {
    const all = connect('producer', 'PUT');
    startSave(all);
    const saved = all.worker.waitForSave();
    for (const { sent } of all.engine.sends) sent.reject(new PdError('PEER_LOST', 'gone'));
    expect(await isSettled(saved)).toBe(false);
    for (const { gathered } of all.engine.sends) gathered.resolve();
    expect(await saved).toMatchObject([{ requestId, state: 'failed', error: { code: 'PEER_LOST' } }]);
  });

  it('tells of a save whose pair is still being opened, and how that ends', async () => {
    for (const error of [undefined, new PdError('PEER_UNREACHABLE', 'nobody there')]) {
      const all = connect('producer');
      all.engine.paired = false;
      startSave(all);
      for (const { gathered } of all.engine.sends) gathered.resolve();
      const [outcome] = await all.worker.waitForSave();
      if (outcome?.state !== 'opening') throw new Error(`it is ${outcome?.state}`);
      expect(await isSettled(outcome.settled)).toBe(false);
      for (const { underWay } of all.engine.sends) {
        if (error) underWay.reject(error);
        else underWay.resolve();
      }
      expect(await outcome.settled).toEqual(error?.toData());
    }
  });

  it('tells and counts a failure once per request, also when it comes after the step', async () => {
    const all = connect('producer');
    startSave(all);
    for (const { gathered } of all.engine.sends) gathered.resolve();
    expect(await all.worker.waitForSave()).toEqual([]);
    for (const { sent } of all.engine.sends) sent.reject(new PdError('PEER_UNREACHABLE', 'nobody there'));
    await new Promise((resolve) => setImmediate(resolve));
    const warned = all.lines.filter(({ level }) => level === 40);
    expect(warned).toMatchObject([{ requestId, code: 'PEER_UNREACHABLE', peer: '10.0.0.2:8084' }]);
    expect(readMetric([all.metrics], 'pd_kv_saves_failed_total')).toBe(1);
  });

  it('saves nothing twice: the next step starts empty', async () => {
    const all = connect('producer');
    all.engine.autoSend = true;
    startSave(all);
    await all.worker.waitForSave();
    all.worker.saveKvLayer('x', cache);
    expect(all.engine.sends).toHaveLength(2);
  });

  it('keeps what is to be asked for, unless the request was aborted', () => {
    const { engine, worker } = connect('producer', 'GET');
    worker.requestFinished({ requestId, transferId, aborted: false });
    worker.requestFinished({ requestId, transferId, aborted: true });
    expect(engine.finished).toEqual([
      { id: transferId, keepSends: true },
      { id: transferId, keepSends: false },
    ]);
  });
});

describe('keyed by whatever the metadata says', () => {
  const full = transferIdOf(requestId);
  const keyed = { ...request, transferId: full, promptTokens: Int32Array.of(1, 2) };

  it('sends, loads and finishes under it, and says of which prompt it is', () => {
    const producer = connect('producer', 'PUT');
    const blockIds = [5, 3, 9];
    const step = [{ ...keyed, numComputedTokens: 0, numScheduledTokens: 10, blockIds }];
    producer.worker.startLoadKv(producer.scheduler.buildConnectorMeta(step));
    producer.worker.saveKvLayer(layers[0]!.name, cache);
    const consumer = connect('consumer', 'PUT');
    consumer.scheduler.updateStateAfterAlloc(keyed, blockIds, 4, 5);
    consumer.worker.startLoadKv(consumer.scheduler.buildConnectorMeta([]));
    const sent = producer.engine.sends[0]?.request;
    expect(sent?.tensorId).toBe(`${requestId}#${layers[0]!.name}`);
    expect(sent?.promptDigest).toMatch(/^[0-9a-f]{32}$/);
    expect(consumer.engine.loads[0]?.request).toMatchObject({
      requestId,
      transferId: full,
      promptDigest: sent?.promptDigest,
    });
    consumer.worker.requestFinished({ requestId, transferId: full, aborted: false });
    expect(consumer.engine.finished).toEqual([{ id: full, keepSends: false }]);
  });
});

describe('loading', () => {
  it('loads all layers of a request in the background and tells once', async () => {
    const all = connect('consumer', 'PUT_ASYNC', 1);
    startLoad(all);
    expect(all.engine.loads.map(({ request: load }) => load)).toEqual([
      {
        requestId,
        transferId,
        peer: { host: '10.0.0.1', port: 8083 },
        layers: layers.map(({ name }) => ({ name, target: cache })),
        blockIds: Int32Array.of(5, 3, 9),
        skipBlocks: 1,
        numTokens: 9,
      },
    ]);
    expect(all.lines.find(({ msg }) => msg === 'load started')).toMatchObject({
      requestId,
      peer: '10.0.0.1:8083',
    });
    expect(all.worker.getFinished()).toEqual([]);
    const ended = all.worker.loadEnded;
    all.engine.loaded(requestId);
    await ended;
    expect(all.worker.getFinished()).toEqual([{ requestId, ok: true, bytes: 100, milliseconds: 1 }]);
    expect(all.worker.getFinished()).toEqual([]);
    expect(await isSettled(all.worker.loadEnded)).toBe(false);
  });

  it('tells the engine how long the prompt may still be computed', () => {
    const all = connect('consumer');
    all.scheduler.updateStateAfterAlloc({ ...request, prefillWithinMs: 700 }, [5, 3, 9], 4, 5);
    all.worker.startLoadKv(all.scheduler.buildConnectorMeta([]));
    expect(all.engine.loads[0]?.request.prefillWithinMs).toBe(700);
  });

  it('waits for a layer of the loads of this step, failed ones too', async () => {
    const all = connect('consumer');
    startLoad(all);
    const layer = all.worker.waitForLayerLoad(layers[1]!.name);
    expect(await isSettled(layer)).toBe(false);
    all.engine.loadFailed(requestId, new PdError('KV_LOAD_TIMEOUT', 'never came'));
    await layer;
    expect(all.worker.getFinished()).toMatchObject([
      { requestId, ok: false, error: { code: 'KV_LOAD_TIMEOUT' } },
    ]);
    await expect(all.worker.waitForLayerLoad('model.layers.7.self_attn.attn')).rejects.toThrow(/no layer/);
  });

  it('cancels on the scheduler side’s word, and frees what the engine holds', async () => {
    const all = connect('consumer');
    startLoad(all);
    all.scheduler.requestFinished(requestId);
    all.worker.startLoadKv(all.scheduler.buildConnectorMeta([]));
    expect(all.engine.canceled).toEqual([requestId]);
    await all.worker.loadEnded;
    expect(all.worker.getFinished()).toMatchObject([{ ok: false, error: { code: 'REQUEST_ABORTED' } }]);
    all.worker.requestFinished({ requestId, transferId, aborted: true });
    expect(all.engine.finished).toEqual([{ id: transferId, keepSends: false }]);
  });

  it('turns what an engine throws into a failed load', async () => {
    const all = connect('consumer');
    all.engine.onLoad = () => {
      throw new Error('closed');
    };
    startLoad(all);
    await all.worker.loadEnded;
    expect(all.worker.getFinished()).toMatchObject([
      { ok: false, error: { code: 'KV_LOAD_FAILED', message: 'closed' } },
    ]);
  });
});
