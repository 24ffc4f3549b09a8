import pino from 'pino';
import { afterEach, describe, expect, it, vi } from 'vitest';
import type { LoadFailurePolicy } from '../../../src/config/worker-config.ts';
import { type KvRole, P2pSchedulerConnector } from '../../../src/connector/scheduler-connector.ts';
import { P2pWorkerConnector } from '../../../src/connector/worker-connector.ts';
import type { PagedLayer } from '../../../src/device/device.ts';
import { PdError } from '../../../src/errors.ts';
import type { Executor, LayerHooks } from '../../../src/model/executor.ts';
import { GREEDY } from '../../../src/model/sampler.ts';
import { MetricsPage, readMetric } from '../../../src/observability/metrics.ts';
import { Scheduler } from '../../../src/scheduler/scheduler.ts';
import type {
  CoreRequest,
  ForwardBatch,
  ForwardResult,
  RequestOutput,
} from '../../../src/scheduler/types.ts';
import type { SendType } from '../../../src/wire/messages.ts';
import { CoreLoop } from '../../../src/worker/core.ts';
import { transferOf } from '../../../support/ids.ts';
import { FakeEngine } from '../../support/fake-engine.ts';
import { FakeHandOver } from '../../support/fake-hand-over.ts';
import { requestId } from '../../support/scheduler-world.ts';

const cache: PagedLayer = {
  memory: { kind: 'host', buffer: new SharedArrayBuffer(0), offset: 0, bytes: 0 },
  layout: { family: 'kv-first', numBlocks: 32, blockSize: 4, heads: 1, headDim: 4, dtype: 'float32' },
};

/** Says 100 + output position; breaks as often as it is told to, and finds no token where it is told to. */
class FakeExecutor implements Executor {
  readonly layers = [0, 1, 2].map((index) => ({ name: `model.layers.${index}.self_attn.attn`, cache }));
  readonly vocabSize = 200;
  readonly batches: ForwardBatch[] = [];
  /** Of each batch: was it asked to mark its layers? */
  readonly marked: boolean[] = [];
  failures = 0;
  findsNone = false;
  /** Within each step, after its last layer. */
  within: () => Promise<void> = () => Promise.resolve();

  async forward(batch: ForwardBatch, hooks: LayerHooks): Promise<ForwardResult> {
    this.batches.push(batch);
    this.marked.push(hooks.afterLayer !== undefined);
    for (let index = 0; index < this.layers.length; index++) {
      hooks.afterLayer?.(index);
      if (index === 0 && this.failures > 0) {
        this.failures--;
        throw new Error('layer 0 broke');
      }
    }
    await this.within();
    if (this.findsNone) {
      const error = { code: 'REQUEST_INVALID', message: 'no token is left', context: {} } as const;
      const failed = batch.sequences.flatMap(({ sequenceId, sample }) => (sample ? [sequenceId] : []));
      return {
        sampled: [],
        promptLogprobs: new Map(),
        failed: new Map(failed.map((sequenceId) => [sequenceId, error])),
      };
    }
    const sampled = batch.sequences.flatMap(({ sequenceId, sample }) =>
      sample ? [{ sequenceId, token: 100 + sample.outputPosition }] : [],
    );
    return { sampled, promptLogprobs: new Map() };
  }

  logits(): never {
    throw new PdError('INTERNAL', 'not part of this fake');
  }

  dispose(): void {}
}

interface Settings {
  readonly role?: KvRole;
  readonly sendType?: SendType;
  readonly loadFailure?: LoadFailurePolicy;
  readonly clock?: ManualClock;
  readonly numBlocks?: number;
  /** With a native hand-over, which keeps KV for so long, ms. */
  readonly keepMs?: number;
}

/** A clock that stands until it is told to go on. */
class ManualClock {
  #now = 0;
  #due: { readonly at: number; readonly run: () => void }[] = [];

  now(): number {
    return this.#now;
  }

  after(ms: number, run: () => void): { cancel(): void } {
    const entry = { at: this.#now + ms, run };
    this.#due.push(entry);
    const cancel = () => {
      this.#due = this.#due.filter((one) => one !== entry);
    };
    return { cancel };
  }

  /** Timers that are set. */
  get pending(): number {
    return this.#due.length;
  }

  advance(ms: number): void {
    this.#now += ms;
    const due = this.#due.filter(({ at }) => at <= this.#now);
    this.#due = this.#due.filter((one) => !due.includes(one));
    for (const { run } of due) run();
  }
}

class Harness {
  readonly engine = new FakeEngine();
  readonly handOver = new FakeHandOver();
  readonly executor = new FakeExecutor();
  readonly page = new MetricsPage();
  readonly outputs: RequestOutput[] = [];
  readonly lines: Record<string, unknown>[] = [];
  readonly loop: CoreLoop;
  readonly ended: Promise<PdError | undefined>;
  #waiters: {
    readonly done: (outputs: readonly RequestOutput[]) => boolean;
    readonly resolve: () => void;
  }[] = [];

  constructor(settings: Settings = {}) {
    const { role, sendType = 'PUT_ASYNC', loadFailure = 'recompute', clock } = settings;
    const { numBlocks = 32, keepMs } = settings;
    const { engine, handOver, executor, page } = this;
    const scheduler = new Scheduler(
      {
        numBlocks,
        blockSize: 4,
        maxModelLen: 64,
        maxNumSeqs: 4,
        maxNumBatchedTokens: 32,
        enablePrefixCaching: true,
      },
      role && new P2pSchedulerConnector({ role, blockSize: 4, native: keepMs !== undefined }),
    );
    const log = pino({ level: 'debug' }, { write: (line: string) => this.lines.push(JSON.parse(line)) });
    const connector =
      role &&
      new P2pWorkerConnector({
        engine,
        role,
        sendType,
        rank: 0,
        layers: executor.layers,
        log,
        metrics: page,
        ...(keepMs !== undefined && {
          native: { handOver, blocks: scheduler.blockManager, loadMs: keepMs },
        }),
      });
    this.loop = new CoreLoop({
      executor,
      scheduler,
      ...(connector && { connector }),
      loadFailure,
      metrics: page,
      log,
      post: (outputs) => this.#hear(outputs),
      ...(clock && { clock }),
    });
    this.ended = this.loop.run().then(
      () => undefined,
      (error: unknown) => PdError.from(error),
    );
  }

  until(done: (outputs: readonly RequestOutput[]) => boolean): Promise<void> {
    if (done(this.outputs)) return Promise.resolve();
    return new Promise((resolve) => this.#waiters.push({ done, resolve }));
  }

  /** All outputs of a request, once as many completions as it asked for have ended. */
  async generate(request: CoreRequest): Promise<RequestOutput[]> {
    this.loop.add(request);
    return this.outcome(request);
  }

  async outcome({ requestId: id, n }: CoreRequest): Promise<RequestOutput[]> {
    const mine = () => this.outputs.filter((output) => output.requestId === id);
    await this.until(() => mine().filter(({ finishReason }) => finishReason).length === n);
    return mine();
  }

  #hear(outputs: readonly RequestOutput[]): void {
    this.outputs.push(...outputs);
    const due = this.#waiters.filter(({ done }) => done(this.outputs));
    this.#waiters = this.#waiters.filter((waiter) => !due.includes(waiter));
    for (const { resolve } of due) resolve();
  }
}

let serial = 1_000;
function request(
  length: number,
  more: { remote?: boolean; n?: number; maxTokens?: number } = {},
): CoreRequest {
  const { remote = false, n = 1, maxTokens = 3 } = more;
  const id = requestId(serial++, remote);
  const promptTokens = Int32Array.from({ length }, (_, i) => serial * 50 + i);
  return { requestId: id, transferId: transferOf(id), promptTokens, sampling: { ...GREEDY, maxTokens }, n };
}

const tokensOf = (outputs: readonly RequestOutput[]) => outputs.flatMap(({ tokens }) => tokens);
const turn = () => new Promise((resolve) => setImmediate(resolve));

describe('CoreLoop', () => {
  const open: Harness[] = [];
  function start(settings?: Settings): Harness {
    const harness = new Harness(settings);
    open.push(harness);
    return harness;
  }
  afterEach(async () => {
    for (const { loop, ended } of open.splice(0)) {
      loop.close();
      await ended;
    }
  });

  it('serves, counts and comes to rest', async () => {
    const { loop, page, executor, generate } = bind(start());
    const [one, two] = await Promise.all([generate(request(5)), generate(request(6, { n: 2 }))]);
    expect(tokensOf(one)).toEqual([100, 101, 102]);
    expect(tokensOf(two)).toHaveLength(6);
    await turn();
    const batches = executor.batches.length;
    await turn();
    expect(executor.batches.length).toBe(batches);
    expect(loop.state()).toMatchObject({
      running: 0,
      waiting: 0,
      loading: 0,
      blocks: { used: 0 },
      integrity: [],
    });
    expect(readMetric([page], 'vllm:generation_tokens_total')).toBe(9);
    expect(readMetric([page], 'vllm:prompt_tokens_total')).toBe(11);
    expect(readMetric([page], 'pd_prompt_tokens_total', 'computed')).toBe(11);
    expect(readMetric([page], 'vllm:request_success_total', 'length')).toBe(3);
    expect(readMetric([page], 'pd_kv_blocks')).toBe(32);
    expect(readMetric([page], 'pd_kv_blocks_used')).toBe(0);
  });

  it('answers a request that can never fit with its error, and goes on', async () => {
    const { generate } = bind(start());
    const refused = await generate(request(64, { n: 2 }));
    expect(refused).toMatchObject([
      { index: 0, finishReason: 'error', error: { code: 'CONTEXT_EXCEEDED' } },
      { index: 1, finishReason: 'error', error: { code: 'CONTEXT_EXCEEDED' } },
    ]);
    expect(tokensOf(await generate(request(5)))).toHaveLength(3);
  });

  it('frees the blocks of an aborted request, and tells a stop string from a client that left', async () => {
    const harness = start();
    const { loop, page } = harness;
    const long = request(5, { maxTokens: 50, n: 2 });
    loop.add(long);
    await harness.until((outputs) => outputs.length >= 4);
    loop.abort(long.requestId, 1);
    loop.abort(long.requestId);
    const outputs = await harness.outcome(long);
    expect(outputs.filter(({ finishReason }) => finishReason === 'abort')).toHaveLength(2);
    await turn();
    expect(loop.state().blocks.used).toBe(0);
    expect(readMetric([page], 'vllm:request_success_total', 'stop')).toBe(1);
    expect(readMetric([page], 'vllm:request_success_total', 'abort')).toBe(1);
  });

  it('computes no prompt token beyond the step under way when a client leaves', async () => {
    const harness = start();
    const { loop, page, executor } = harness;
    const long = request(60); // two steps of at most 32 tokens
    let left = 0;
    executor.within = async () => {
      left++;
      loop.abort(long.requestId);
    };
    loop.add(long);
    expect(await harness.outcome(long)).toMatchObject([{ finishReason: 'abort' }]);
    await turn();
    expect(left).toBe(1);
    expect(readMetric([page], 'pd_step_tokens_total')).toBe(32);
    expect(loop.state()).toMatchObject({ waiting: 0, blocks: { used: 0 } });
  });

  it('ends the requests of a failing step and serves the next', async () => {
    const { executor, generate, lines } = bind(start());
    executor.failures = 1;
    expect(await generate(request(5))).toMatchObject([
      { finishReason: 'error', error: { code: 'INTERNAL', message: 'layer 0 broke' } },
    ]);
    expect(lines.some(({ level, msg }) => level === 50 && String(msg).includes('layer 0 broke'))).toBe(true);
    expect(tokensOf(await generate(request(5)))).toHaveLength(3);
  });

  it('gives up after three failing steps in a row', async () => {
    const { executor, ended, generate } = bind(start());
    executor.failures = 3;
    for (let i = 0; i < 3; i++) expect(await generate(request(5))).toMatchObject([{ finishReason: 'error' }]);
    expect((await ended)?.message).toMatch(/3 steps in a row failed, the last: layer 0 broke/);
  });

  it('cannot go on without its transfer engine', async () => {
    const { engine, ended, generate } = bind(start({ role: 'consumer' }));
    engine.onLoad = () => {
      throw new PdError('ENGINE_CLOSED', 'the transfer thread crashed');
    };
    expect((await generate(request(9, { remote: true }))).at(-1)).toMatchObject({
      error: { code: 'ENGINE_CLOSED' },
    });
    expect((await ended)?.message).toBe('the transfer thread crashed');
  });

  it('ends what is left with SERVER_DRAINING when closed', async () => {
    const { loop, ended, engine, outputs } = start({ role: 'consumer' });
    const [loading, late] = [request(9, { remote: true }), request(5)];
    const begun = new Promise<void>((resolve) => {
      engine.onLoad = () => resolve();
    });
    loop.add(loading);
    await begun;
    loop.close();
    loop.add(late);
    expect(await ended).toBeUndefined();
    expect(outputs.map(({ requestId: id, error }) => [id, error?.code])).toEqual([
      [loading.requestId, 'SERVER_DRAINING'],
      [late.requestId, 'SERVER_DRAINING'],
    ]);
  });

  describe('throughput', () => {
    const of = ({ lines }: Harness) => lines.filter(({ msg }) => String(msg).includes('throughput'));

    it('is told every ten seconds of work, once more when the work has ended, and not at all without any', async () => {
      const clock = new ManualClock();
      const harness = start({ role: 'consumer', clock });
      await turn();
      expect(clock.pending).toBe(0);
      const remote = request(9, { remote: true });
      harness.loop.add(remote);
      await harness.generate(request(5));
      clock.advance(9_999);
      expect(of(harness)).toEqual([]);
      clock.advance(1);
      expect(of(harness)).toMatchObject([
        {
          level: 30,
          promptTokensPerSecond: 0.5,
          generationTokensPerSecond: 0.3,
          running: 0,
          waiting: 0,
          loading: 1,
          kvCacheUsagePercent: 9.4,
          prefixHitPercent: 0,
        },
      ]);
      harness.engine.loaded(remote.requestId);
      await harness.outcome(remote);
      await turn();
      clock.advance(10_000);
      expect(of(harness)).toHaveLength(2);
      expect(of(harness)[1]!['msg']).toBe(
        'in 10.0 s: prompt throughput 0.9 tokens/s, generation throughput 0.3 tokens/s; running 0, waiting 0, loading 0; ' +
          'KV cache usage 0.0 %, prefix cache hit rate 0.0 %',
      );
      expect(clock.pending).toBe(0);
    });

    it('has the hit rate of the last lookups, and is told of what the end cuts short', async () => {
      const clock = new ManualClock();
      const harness = start({ clock });
      const { loop, generate, ended } = { ...bind(harness) };
      const first = request(9);
      await generate(first);
      await generate({ ...request(9), promptTokens: first.promptTokens });
      clock.advance(10_000);
      await generate(request(3, { maxTokens: 1 }));
      clock.advance(2_000);
      loop.close();
      await ended;
      expect(of(harness)).toMatchObject([
        { promptTokensPerSecond: 1.8, prefixHitPercent: 44.4 },
        { promptTokensPerSecond: 1.5, generationTokensPerSecond: 0.5 },
      ]);
      expect(clock.pending).toBe(0);
    });
  });

  describe('producer', () => {
    it('has layers marked in the step that ends a prompt alone: nothing else is sent', async () => {
      const { engine, executor, generate } = bind(start({ role: 'producer' }));
      engine.autoSend = true;
      await generate(request(40, { remote: true, maxTokens: 3 }));
      expect(executor.marked).toEqual([false, true, false, false]);
    });

    it('answers only after every layer has gone', async () => {
      const harness = start({ role: 'producer', sendType: 'PUT' });
      const { engine, loop, outputs } = harness;
      const remote = request(5, { remote: true, maxTokens: 1 });
      const allSent = new Promise<void>((resolve) => {
        engine.onSend = () => engine.sends.length === 3 && resolve();
      });
      loop.add(remote);
      await allSent;
      await turn();
      expect(outputs).toEqual([]);
      for (const { gathered, sent } of engine.sends) {
        gathered.resolve();
        sent.resolve(1);
      }
      expect(tokensOf(await harness.outcome(remote))).toEqual([100]);
      await turn();
      expect(engine.finished).toMatchObject([{ keepSends: true }]);
    });

    it('keeps no KV of what was released while a step was under way, in the step or come during it', async () => {
      const harness = start({ role: 'producer', sendType: 'PUT' });
      const { engine, loop } = harness;
      const [first, second] = [1, 2].map(() => request(5, { remote: true, maxTokens: 1 })) as [
        CoreRequest,
        CoreRequest,
      ];
      const saved = new Promise<void>((resolve) => {
        engine.onSend = () => engine.sends.length === 3 && resolve();
      });
      loop.add(first);
      await saved;
      loop.add(second);
      for (const { transferId } of [first, second]) loop.released(transferId);
      engine.autoSend = true;
      for (const { gathered, sent } of engine.sends) {
        gathered.resolve();
        sent.resolve(1);
      }
      await Promise.all([harness.outcome(first), harness.outcome(second)]);
      await turn();
      expect(engine.finished).toEqual(
        [first, second].map(({ transferId: id }) => ({ id, keepSends: false })),
      );
    });

    it('answers although its KV could not be sent, and counts it', async () => {
      const { engine, page, generate } = bind(start({ role: 'producer' }));
      engine.onSend = ({ gathered, sent }) => {
        gathered.reject(new PdError('PEER_UNREACHABLE', 'nobody there'));
        sent.reject(new PdError('PEER_UNREACHABLE', 'nobody there'));
      };
      expect(tokensOf(await generate(request(5, { remote: true, maxTokens: 1 })))).toEqual([100]);
      expect(readMetric([page], 'pd_kv_saves_failed_total')).toBe(1);
    });

    it('lets go of blocks only when the layers saved before a failure are gathered', async () => {
      const harness = start({ role: 'producer' });
      const { engine, executor, loop } = harness;
      executor.failures = 1;
      const remote = request(5, { remote: true });
      const saved = new Promise<void>((resolve) => {
        engine.onSend = () => resolve();
      });
      loop.add(remote);
      await saved;
      await turn();
      expect(loop.state().blocks.used).toBe(2);
      for (const { gathered } of engine.sends) gathered.resolve();
      expect(await harness.outcome(remote)).toMatchObject([{ finishReason: 'error' }]);
      expect(loop.state().blocks.used).toBe(0);
    });
  });

  describe('consumer', () => {
    it('has no layer marked, since it sends none', async () => {
      const { engine, executor, generate } = bind(start({ role: 'consumer' }));
      engine.onLoad = ({ request: load }) => engine.loaded(load.requestId);
      await generate(request(9, { remote: true }));
      expect(executor.marked).toEqual([false, false, false]);
    });

    it('serves others while KV is on its way, then computes one prompt token', async () => {
      const harness = start({ role: 'consumer' });
      const { engine, loop, page, executor } = harness;
      const remote = request(9, { remote: true });
      loop.add(remote);
      expect(tokensOf(await harness.generate(request(5)))).toHaveLength(3);
      expect(loop.state().loading).toBe(1);
      engine.loaded(remote.requestId);
      const [first] = await harness.outcome(remote);
      expect(first?.promptSource).toEqual({ computed: 1, loaded: 8, cached: 0 });
      const mine = executor.batches
        .flatMap(({ sequences }) => sequences)
        .filter((s) => s.requestId === remote.requestId);
      expect(mine[0]).toMatchObject({ start: 8, tokens: { length: 1 } });
      await turn();
      expect(readMetric([page], 'pd_kv_loads_total', 'ok')).toBe(1);
      expect(readMetric([page], 'pd_prompt_tokens_total', 'loaded')).toBe(8);
      expect(engine.finished.some(({ id, keepSends }) => remote.requestId.startsWith(id) && !keepSends)).toBe(
        true,
      );
    });

    it('computes the prompt when its KV does not come', async () => {
      const harness = start({ role: 'consumer' });
      const { engine, page, lines } = harness;
      engine.onLoad = ({ request: load }) =>
        engine.loadFailed(load.requestId, new PdError('KV_LOAD_TIMEOUT', 'not within 60 s'));
      const remote = request(9, { remote: true });
      const [first] = await harness.generate(remote);
      expect(first?.promptSource).toEqual({ computed: 9, loaded: 0, cached: 0 });
      expect(readMetric([page], 'pd_kv_loads_total', 'recomputed')).toBe(1);
      const warned = lines.find(({ level }) => level === 40);
      expect(warned).toMatchObject({ requestId: remote.requestId, code: 'KV_LOAD_TIMEOUT' });
      expect(warned?.['msg']).toMatch(/computed here: not within 60 s/);
    });

    it('fails the request instead under the policy `fail`', async () => {
      const harness = start({ role: 'consumer', loadFailure: 'fail' });
      const { engine, page } = harness;
      engine.onLoad = ({ request: load }) =>
        engine.loadFailed(load.requestId, new PdError('KV_LOAD_TIMEOUT', 'not within 60 s'));
      expect(await harness.generate(request(9, { remote: true }))).toMatchObject([
        { tokens: [], finishReason: 'error', error: { code: 'KV_LOAD_TIMEOUT' } },
      ]);
      expect(readMetric([page], 'pd_kv_loads_total', 'failed')).toBe(1);
      await turn();
      expect(engine.finished).toHaveLength(1);
    });

    it('gives a load up with its request, and frees its blocks once it has ended', async () => {
      const harness = start({ role: 'consumer' });
      const { engine, loop, page } = harness;
      let settle = () => {};
      const canceled = new Promise<void>((resolve) => {
        engine.cancelLoad = (id) => {
          settle = () => engine.loadFailed(id, new PdError('REQUEST_ABORTED', 'given up'));
          resolve();
        };
      });
      const remote = request(9, { remote: true });
      const begun = new Promise<void>((resolve) => {
        engine.onLoad = () => resolve();
      });
      loop.add(remote);
      await begun;
      loop.abort(remote.requestId);
      expect(await harness.outcome(remote)).toMatchObject([{ finishReason: 'abort' }]);
      await canceled;
      expect(loop.state().blocks.used).toBe(3);
      expect(engine.finished).toEqual([]);
      settle();
      await turn();
      await turn();
      expect(loop.state().blocks.used).toBe(0);
      expect(engine.finished).toHaveLength(1);
      expect(readMetric([page], 'pd_kv_loads_total', 'failed')).toBe(0);
      expect(readMetric([page], 'pd_kv_loads_total', 'recomputed')).toBe(0);
    });
  });
});

describe('native hand-over', () => {
  const open: Harness[] = [];
  const start = (settings: Settings) => {
    const harness = new Harness(settings);
    open.push(harness);
    return harness;
  };
  afterEach(async () => {
    vi.useRealTimers();
    for (const { loop, ended } of open.splice(0)) {
      loop.close();
      expect(await ended).toBeUndefined();
    }
  });
  const native = (length: number, maxTokens = 1): CoreRequest => ({
    ...request(length, { remote: true, maxTokens }),
    wire: 'native',
  });
  const KEPT = 600_000;

  it('fills with every step of a prompt, and tells the token before its blocks are free', async () => {
    const { handOver, generate, loop } = bind(start({ role: 'producer', keepMs: KEPT, numBlocks: 16 }));
    expect(tokensOf(await generate(native(40)))).toEqual([100]);
    const layers = ['layer 0', 'layer 1', 'layer 2', 'stepEnded'];
    expect(handOver.told).toEqual([
      'begin',
      'progress 32',
      ...layers,
      'progress 40',
      ...layers,
      'finish 100',
    ]);
    expect(loop.state()).toMatchObject({ blocks: { used: 10 }, integrity: [] });
  });

  it('lets a prompt wait for blocks that are kept for a consumer, as long as they are', async () => {
    const { handOver, generate, loop } = bind(start({ role: 'producer', keepMs: KEPT, numBlocks: 8 }));
    const kept = native(20);
    await generate(kept);
    const waiting = generate(request(16));
    await turn();
    await turn();
    expect(loop.state()).toMatchObject({ running: 0, waiting: 1, blocks: { used: 5 } });
    handOver.user.books.endLease(kept.transferId);
    handOver.user.freed();
    expect(tokensOf(await waiting)).toHaveLength(3);
    expect(handOver.told).not.toContain('fail');
  });

  it('makes room sooner where the consumer waits for what cannot begin, as each would wait for the other', async () => {
    const { handOver, generate, loop } = bind(start({ role: 'producer', keepMs: 400, numBlocks: 8 }));
    handOver.waits = 100;
    vi.useFakeTimers({ toFake: ['setTimeout', 'clearTimeout', 'performance'] });
    await generate(native(20));
    const waiting = generate(request(16));
    for (const [ms, made] of [
      [99, false],
      [1, true],
    ] as const) {
      vi.advanceTimersByTime(ms);
      await turn();
      await turn();
      expect(handOver.told.includes('fail')).toBe(made);
    }
    expect(tokensOf(await waiting)).toHaveLength(3);
    await turn();
    expect(loop.state()).toMatchObject({ blocks: { used: 0 }, integrity: [] });
  });

  it('makes room with what was kept for longer than a consumer has to ask', async () => {
    const { handOver, generate, loop } = bind(start({ role: 'producer', keepMs: 0, numBlocks: 8 }));
    await generate(native(20));
    expect(tokensOf(await generate(request(16)))).toHaveLength(3);
    expect(handOver.told.at(-1)).toBe('fail');
    await turn();
    expect(loop.state()).toMatchObject({ blocks: { used: 0 }, integrity: [] });
  });

  it.each([
    ['aborted', 'its request is', (harness: Harness, id: CoreRequest) => harness.loop.abort(id.requestId)],
    ['failed', 'its step has', (harness: Harness) => harness.executor.failures++],
    ['refused', 'no first token may be drawn', ({ executor }: Harness) => (executor.findsNone = true)],
  ] as const)('says at once that KV will not come where %s: %s', async (_, __, end) => {
    const harness = start({ role: 'producer', keepMs: KEPT, numBlocks: 16 });
    const { handOver, executor, loop } = harness;
    const long = native(40);
    executor.within = () => {
      executor.within = () => Promise.resolve();
      end(harness, long);
      return Promise.resolve();
    };
    await harness.generate(long);
    await turn();
    expect(handOver.told.at(-1)).toBe('fail');
    expect(loop.state()).toMatchObject({ blocks: { used: 0 }, integrity: [] });
  });

  it('says the first token of a load in the middle of a step, and computes nothing of its prompt', async () => {
    const harness = start({ role: 'consumer', keepMs: KEPT });
    const { handOver, executor, loop, page } = harness;
    const remote = native(9, 3);
    const { requestId: id } = remote;
    let saidWithin = -1;
    let asked = new Promise<void>((resolve) => {
      handOver.onWant = resolve;
    });
    executor.within = async () => {
      await asked;
      executor.within = () => Promise.resolve();
      handOver.user.loadEnded({ requestId: id, ok: true, bytes: 1, milliseconds: 1, draw: { tokens: [7] } });
      await harness.until((outputs) => outputs.some((output) => output.requestId === id));
      saidWithin = harness.outputs.length;
    };
    loop.add(remote);
    loop.add(request(5));
    expect(tokensOf(await harness.outcome(remote))).toEqual([7, 101, 102]);
    expect(saidWithin).toBe(1);
    expect(
      executor.batches.flatMap(({ sequences }) => sequences).filter(({ start: at }) => at < 9),
    ).toHaveLength(3);
    expect(readMetric([page], 'pd_prompt_tokens_total', 'loaded')).toBe(9);
    asked = Promise.resolve();
  });

  it.each([
    ['names no token of the vocabulary', { draw: { tokens: [200] } }],
    [
      'has no log-probability of it',
      { draw: { tokens: [7], logprobs: [{ token: 999, logprob: 0, top: [] }] } },
    ],
    ['is not there', {}],
  ])('computes the last position itself where the draw %s', async (_, more) => {
    const harness = start({ role: 'consumer', keepMs: KEPT });
    const { handOver, page } = harness;
    const remote = native(9, 2);
    const { requestId: id } = remote;
    handOver.onWant = () =>
      handOver.user.loadEnded({ requestId: id, ok: true, bytes: 1, milliseconds: 1, ...more });
    expect(tokensOf(await harness.generate(remote))).toEqual([100, 101]);
    expect(readMetric([page], 'pd_prompt_tokens_total', 'computed')).toBe(1);
    expect(readMetric([page], 'pd_prompt_tokens_total', 'loaded')).toBe(8);
  });

  it('computes a prompt in other blocks while what was asked for may still be written', async () => {
    const harness = start({ role: 'consumer', keepMs: KEPT });
    const { handOver, executor, loop } = harness;
    const remote = native(9, 2);
    handOver.onWant = () => {
      const [{ requestId, blocks }] = handOver.wants as [(typeof handOver.wants)[number]];
      handOver.user.books.expose('WANT 1', blocks);
      const error = { code: 'KV_LOAD_TIMEOUT', message: 'never came', context: {} } as const;
      handOver.user.loadEnded({ requestId, ok: false, error, quarantined: true });
    };
    expect(tokensOf(await harness.generate(remote))).toEqual([100, 101]);
    const written = executor.batches.flatMap(({ sequences }) =>
      sequences.flatMap((one) => [...one.blockTable]),
    );
    expect(written.filter((block) => handOver.wants[0]?.blocks.includes(block))).toEqual([]);
    await turn();
    expect(loop.state()).toMatchObject({ blocks: { used: 3 }, integrity: [] });
    handOver.user.books.retract('WANT 1');
    expect(loop.state().blocks.used).toBe(0);
  });
});

/** A harness whose methods may be taken apart. */
function bind(harness: Harness) {
  const { loop, page, executor, engine, handOver, lines, ended } = harness;
  return { loop, page, executor, engine, handOver, lines, ended, generate: harness.generate.bind(harness) };
}
