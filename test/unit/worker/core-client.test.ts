import { describe, expect, it } from 'vitest';
import { GREEDY } from '../../../src/model/sampler.ts';
import type { CoreRequest, RequestOutput } from '../../../src/scheduler/types.ts';
import { engineRequestId, transferIdOf } from '../../../src/wire/ids.ts';
import { AsyncQueue } from '../../../src/worker/async-queue.ts';
import type { Generation } from '../../../src/worker/core-client.ts';
import { FakeCore } from '../../support/fake-core.ts';

function request(id: string, n = 1): CoreRequest {
  return {
    requestId: engineRequestId(id),
    transferId: transferIdOf(id),
    promptTokens: Int32Array.of(1, 2, 3),
    sampling: { ...GREEDY, maxTokens: 4 },
    n,
  };
}

async function collect(generation: Generation): Promise<RequestOutput[]> {
  const outputs: RequestOutput[] = [];
  for await (const output of generation) outputs.push(output);
  return outputs;
}

const silent = () => {};

describe('CoreClient', () => {
  it('gives each request its own outputs, until the last of n has finished', async () => {
    const core = new FakeCore((r, emit) => {
      for (let index = 0; index < r.n; index++) {
        emit({ index, tokens: [index] });
        emit({ index, tokens: [9], finishReason: 'length' });
      }
    });
    const client = await core.connect();
    const [a, b] = await Promise.all([
      collect(client.generate(request('a', 2))),
      collect(client.generate(request('b'))),
    ]);
    expect(a.map(({ index, tokens }) => [index, ...tokens])).toEqual([
      [0, 0],
      [0, 9],
      [1, 1],
      [1, 9],
    ]);
    expect(b).toHaveLength(2);
    expect(client.pending).toBe(0);
    await client.close();
    expect(core.terminated).toBe(true);
    expect(await client.ended).toBeUndefined();
  });

  it('aborts in the core by signal, and by leaving the loop', async () => {
    const core = new FakeCore((_, emit) => emit({ index: 0, tokens: [1] }));
    const client = await core.connect();
    const abort = new AbortController();
    const signalled = collect(client.generate(request('a'), abort.signal));
    abort.abort();
    await expect(signalled).rejects.toMatchObject({ code: 'REQUEST_ABORTED' });
    for await (const _ of client.generate(request('b'))) break;
    const gone = new AbortController();
    gone.abort();
    await expect(collect(client.generate(request('c'), gone.signal))).rejects.toMatchObject({
      code: 'REQUEST_ABORTED',
    });
    expect(core.aborted.map(({ requestId }) => requestId)).toEqual(['a', 'b', 'c']);
    expect(client.pending).toBe(0);
  });

  it('tells of KV that is not under way what the core says, and nothing of an earlier request of that id', async () => {
    const [opening, error] = [
      { state: 'opening' },
      { code: 'PEER_UNREACHABLE', message: 'x', context: {} },
    ] as const;
    const core = new FakeCore((r, emit) => {
      const last = r.sampling.maxTokens === 1;
      emit({ index: 0, tokens: [1], kvSave: opening, ...(last && { finishReason: 'length' }) });
    });
    const client = await core.connect();
    for await (const _ of client.generate(request('a'))) break; // left before its KV is known to be lost
    core.emit({ type: 'kv-saved', requestId: engineRequestId('a'), error });
    const one = { ...request('a'), sampling: { ...request('a').sampling, maxTokens: 1 } };
    for (const told of [undefined, error]) {
      const generation = client.generate(one);
      await collect(generation);
      core.emit({ type: 'kv-saved', requestId: engineRequestId('a'), ...(told && { error: told }) });
      expect(await generation.kvSaved()).toEqual(told);
    }
    const waiting = client.generate(one);
    await collect(waiting);
    core.emit({ type: 'fatal', error: { ...error, code: 'CUDA_ERROR' } });
    expect(await waiting.kvSaved()).toMatchObject({ code: 'CUDA_ERROR' });
  });

  it('gives up one completion and drops what still comes of it', async () => {
    const core = new FakeCore(silent);
    const client = await core.connect();
    const generation = client.generate(request('a', 2));
    const outputs = collect(generation);
    const { requestId } = request('a');
    const emit = (index: number, finishReason?: 'length' | 'abort') =>
      core.emit({
        type: 'outputs',
        outputs: [{ requestId, index, tokens: [1], ...(finishReason ? { finishReason } : {}) }],
      });
    emit(0);
    generation.abort(0);
    emit(0, 'abort');
    emit(1, 'length');
    expect((await outputs).map(({ index }) => index)).toEqual([0, 1]);
    expect(core.aborted).toEqual([{ type: 'abort', requestId, index: 0 }]);
  });

  it('fails every pending request when the core dies, and takes none after', async () => {
    const core = new FakeCore(silent);
    const client = await core.connect();
    const pending = collect(client.generate(request('a')));
    core.answersState = false;
    const state = client.state(60_000);
    core.emit({ type: 'fatal', error: { code: 'CUDA_ERROR', message: 'the bus fell off', context: {} } });
    await expect(pending).rejects.toMatchObject({ code: 'CUDA_ERROR' });
    await expect(state).rejects.toMatchObject({ code: 'CUDA_ERROR' });
    expect(await client.ended).toMatchObject({ code: 'CUDA_ERROR' });
    expect(() => client.generate(request('b'))).toThrow(expect.objectContaining({ code: 'CUDA_ERROR' }));
    await client.close();
  });

  it('lets a core that failed take itself apart before its thread is ended', async () => {
    const core = new FakeCore(silent);
    const client = await core.connect();
    core.post = silent;
    core.emit({ type: 'fatal', error: { code: 'CUDA_ERROR', message: 'the bus fell off', context: {} } });
    const closed = client.close();
    await new Promise((resolve) => setImmediate(resolve));
    expect(core.terminated).toBe(false);
    core.emit({ type: 'closed' });
    await closed;
    expect(core.terminated).toBe(true);
  });

  it('takes a thread that ends unasked for dead', async () => {
    const core = new FakeCore(silent);
    const client = await core.connect();
    const pending = collect(client.generate(request('a')));
    core.die(new Error('out of memory'));
    await expect(pending).rejects.toMatchObject({ code: 'INTERNAL', message: 'out of memory' });
    expect(await client.ended).toMatchObject({ message: 'out of memory' });
  });

  it('does not wait for ever: start, state, shutdown', async () => {
    const never = new FakeCore(silent);
    never.connect = () => Promise.reject(new Error('unused'));
    const { CoreClient } = await import('../../../src/worker/core-client.ts');
    await expect(CoreClient.connect(never, { startTimeoutMs: 5 })).rejects.toThrow(/not ready after/);
    expect(never.terminated).toBe(true);
    const core = new FakeCore(silent);
    const client = await core.connect({ shutdownTimeoutMs: 5 });
    core.answersState = false;
    await expect(client.state(5)).rejects.toThrow(/did not answer/);
    core.post = silent;
    await client.close();
    expect(core.terminated).toBe(true);
  });

  it('throws what the core died of while it started', async () => {
    const core = new FakeCore(silent);
    const started = core.connect();
    core.emit({ type: 'fatal', error: { code: 'CHECKPOINT_INVALID', message: 'no shard 2', context: {} } });
    await expect(started).rejects.toMatchObject({ code: 'CHECKPOINT_INVALID', message: 'no shard 2' });
  });

  it('refuses an id that is under way', async () => {
    const client = await new FakeCore(silent).connect();
    client.generate(request('a'));
    expect(() => client.generate(request('a'))).toThrow(/under way/);
  });
});

describe('AsyncQueue', () => {
  it('reads what was pushed before it failed, then throws once', async () => {
    const queue = new AsyncQueue<number>();
    queue.push(1);
    queue.fail(new Error('over'));
    queue.push(2);
    expect(await queue.next()).toEqual({ value: 1, done: false });
    await expect(queue.next()).rejects.toThrow('over');
    expect(await queue.next()).toEqual({ value: undefined, done: true });
  });
});
