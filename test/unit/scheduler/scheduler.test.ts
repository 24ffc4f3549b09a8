import { describe, expect, it } from 'vitest';
import { type BlockHash, extendHashes } from '../../../src/kv/block-hash.ts';
import { GREEDY } from '../../../src/model/sampler.ts';
import { Scheduler } from '../../../src/scheduler/scheduler.ts';
import type { CoreRequest, SamplingParams } from '../../../src/scheduler/types.ts';
import { transferOf } from '../../../support/ids.ts';
import { expectedTokens, requestId, SchedulerWorld } from '../../support/scheduler-world.ts';

const OPTIONS = {
  numBlocks: 64,
  blockSize: 4,
  maxNumSeqs: 8,
  maxNumBatchedTokens: 64,
  maxModelLen: 128,
  enablePrefixCaching: true,
};

let serial = 0;
function request(
  length: number,
  sampling: Partial<SamplingParams> = {},
  more: { n?: number; remote?: boolean; first?: number; priority?: number } = {},
): CoreRequest {
  const first = more.first ?? serial * 100;
  const id = requestId(serial++, more.remote ?? false);
  return {
    requestId: id,
    transferId: transferOf(id),
    promptTokens: Int32Array.from({ length }, (_, i) => first + i),
    sampling: { ...GREEDY, ...sampling },
    n: more.n ?? 1,
    ...(more.priority !== undefined && { priority: more.priority }),
  };
}

function expectAllTold(world: SchedulerWorld): void {
  for (const [id, told] of world.told) {
    const index = Number(id.slice(id.lastIndexOf('/') + 1));
    expect(told.ends, id).toBe(1);
    expect(told.tokens, id).toEqual(expectedTokens(told.request, index, world.options.maxModelLen));
  }
  expect(world.scheduler.blocks.used).toBe(0);
}

describe('continuous batching', () => {
  it('computes long prompts in chunks and lets others join', () => {
    const world = new SchedulerWorld({ ...OPTIONS, maxNumBatchedTokens: 16 });
    world.add(request(40));
    world.add(request(3));
    expect(world.step()?.batch.sequences.map((s) => s.tokens.length)).toEqual([16]);
    expect(world.step()?.batch.sequences.map((s) => s.tokens.length)).toEqual([16]);
    expect(world.step()?.batch.sequences.map((s) => s.tokens.length)).toEqual([8, 3]);
    expect(world.step()?.batch.sequences.map((s) => s.tokens.length)).toEqual([1, 1]);
    world.drain();
    expectAllTold(world);
  });

  it('admits first come, first served, no more than maxNumSeqs', () => {
    const world = new SchedulerWorld({ ...OPTIONS, maxNumSeqs: 2 });
    const requests = [request(5), request(5), request(5)];
    for (const each of requests) world.add(each);
    expect(world.step()?.batch.sequences.map((s) => s.requestId)).toEqual(
      requests.slice(0, 2).map((each) => each.requestId),
    );
    expect(world.scheduler.numWaiting).toBe(1);
    world.drain();
    expectAllTold(world);
  });

  it('admits lower priorities first, and takes blocks from the highest', () => {
    const world = new SchedulerWorld({ ...OPTIONS, maxNumSeqs: 2 });
    const [usual, late, urgent] = [
      request(5),
      request(5, {}, { priority: 1 }),
      request(5, {}, { priority: -1 }),
    ];
    for (const each of [usual, late, urgent]) world.add(each);
    expect(world.step()?.batch.sequences.map((s) => s.requestId)).toEqual([
      urgent.requestId,
      usual.requestId,
    ]);
    world.drain();
    expectAllTold(world);

    const scarce = new SchedulerWorld({
      ...OPTIONS,
      numBlocks: 8,
      maxModelLen: 32,
      enablePrefixCaching: false,
    });
    const [patient, hurried] = [
      request(12, { maxTokens: 16 }, { priority: 5 }),
      request(12, { maxTokens: 16 }),
    ];
    scarce.add(patient);
    scarce.step();
    scarce.add(hurried);
    const order: string[] = [];
    for (let step = scarce.step(); step; step = scarce.step()) {
      order.push(...step.batch.sequences.map((s) => s.requestId));
    }
    expect(scarce.preempted).toBeGreaterThan(0);
    expect(order.lastIndexOf(hurried.requestId)).toBeLessThan(order.lastIndexOf(patient.requestId));
    expectAllTold(scarce);
  });

  it('preempts the last to come, which resumes where it was', () => {
    const world = new SchedulerWorld({
      ...OPTIONS,
      numBlocks: 8,
      maxModelLen: 32,
      enablePrefixCaching: false,
    });
    world.add(request(12, { maxTokens: 16 }));
    world.add(request(12, { maxTokens: 16 }));
    world.drain();
    expect(world.preempted).toBeGreaterThan(0);
    expect(world.scheduler.stats.preemptions).toBe(world.preempted);
    expectAllTold(world);
  });

  it('ends at stop tokens after minTokens, at maxTokens and at the end of the context', () => {
    const world = new SchedulerWorld({ ...OPTIONS, maxModelLen: 24 });
    const stop = Array.from({ length: 50 }, (_, token) => token);
    const stopped = request(5, { stopTokenIds: stop, minTokens: 3, maxTokens: 10 });
    const full = request(20, { maxTokens: 100 });
    const counted = request(5, { maxTokens: 2 });
    for (const each of [stopped, full, counted]) world.add(each);
    world.drain();
    const end = (each: CoreRequest) => world.told.get(`${each.requestId}/0`);
    expect(end(stopped)?.last?.finishReason).toBe('stop');
    expect(end(stopped)?.tokens).toHaveLength(4);
    expect(end(full)?.last?.finishReason).toBe('length');
    expect(end(full)?.tokens).toHaveLength(4);
    expect(end(counted)?.last?.finishReason).toBe('length');
    expectAllTold(world);
  });

  it('ends a sequence that has filled every block instead of preempting it for ever', () => {
    const world = new SchedulerWorld({ ...OPTIONS, numBlocks: 4, maxModelLen: 1_000 });
    world.add(request(10, { maxTokens: 500 }));
    world.drain();
    const [told] = world.told.values();
    expect(told?.last?.finishReason).toBe('length');
    expect(told?.tokens).toHaveLength(6);
  });

  it('refuses what can never fit, and what is malformed', () => {
    const world = new SchedulerWorld({ ...OPTIONS, numBlocks: 4 });
    expect(() => world.add(request(16))).toThrow(
      expect.objectContaining({
        code: 'CONTEXT_EXCEEDED',
        message: expect.stringMatching(/16 tokens.*4 blocks of 4/),
      }),
    );
    expect(() => world.add(request(0))).toThrow(expect.objectContaining({ code: 'REQUEST_INVALID' }));
    expect(() => world.add(request(3, {}, { n: 0 }))).toThrow(
      expect.objectContaining({ code: 'REQUEST_INVALID' }),
    );
    const once = request(3);
    world.add(once);
    expect(() => world.scheduler.add(once)).toThrow(/is here already/);
  });

  it('fails the requests of a step that could not run and goes on with the others', () => {
    const world = new SchedulerWorld({ ...OPTIONS, maxNumSeqs: 1 });
    const [bad, good] = [request(5), request(5)];
    world.add(bad);
    world.add(good);
    world.step(true);
    expect(world.told.get(`${bad.requestId}/0`)?.last).toMatchObject({
      finishReason: 'error',
      error: { code: 'INTERNAL' },
    });
    world.drain();
    expect(world.told.get(`${good.requestId}/0`)?.last?.finishReason).toBe('length');
    expect(world.finished.map((each) => each.requestId)).toEqual([bad.requestId, good.requestId]);
  });

  it('ends all with an error when told to stop, midway in a step too', () => {
    const world = new SchedulerWorld(OPTIONS);
    world.add(request(5, {}, { n: 2 }));
    world.add(request(5));
    world.scheduler.schedule();
    const outputs = world.scheduler.endAll({ code: 'SERVER_DRAINING', message: 'bye', context: {} });
    expect(outputs.map((output) => output.error?.code)).toEqual(Array(3).fill('SERVER_DRAINING'));
    expect(world.scheduler.checkIntegrity()).toEqual([]);
    expect(world.scheduler.blocks.used).toBe(0);
  });
});

describe('prefix cache', () => {
  it('shares the full blocks of a prompt, never its last token', () => {
    const world = new SchedulerWorld(OPTIONS);
    const first = request(16, {}, { first: 7 });
    const second = request(16, {}, { first: 7 });
    world.add(first);
    world.drain();
    world.add(second);
    world.drain();
    expect(world.told.get(`${second.requestId}/0`)?.first?.promptSource).toEqual({
      computed: 4,
      loaded: 0,
      cached: 12,
    });
    expect(world.scheduler.stats).toMatchObject({ prefixQueries: 32, prefixHits: 12 });
    expectAllTold(world);
  });

  it('is not used where prompt log-probabilities are asked for', () => {
    const world = new SchedulerWorld({ ...OPTIONS, maxNumBatchedTokens: 6 }, 'consumer');
    world.add(request(16, {}, { first: 7 }));
    world.drain();
    const echo = request(16, { promptLogprobs: 0, maxTokens: 2 }, { first: 7, remote: true });
    world.add(echo);
    world.drain();
    const first = world.told.get(`${echo.requestId}/0`)?.first;
    expect(first?.promptSource).toEqual({ computed: 16, loaded: 0, cached: 0 });
    expect(first?.promptLogprobs?.tokens).toEqual(echo.promptTokens.slice(1));
  });

  it('tells prompt log-probabilities once although the prompt was preempted midway', () => {
    const world = new SchedulerWorld({ ...OPTIONS, numBlocks: 9, maxNumBatchedTokens: 3, maxModelLen: 32 });
    world.add(request(8, { maxTokens: 20 }));
    for (let i = 0; i < 3; i++) world.step();
    const echo = request(20, { promptLogprobs: 0, maxTokens: 2 });
    world.add(echo);
    world.drain();
    expect(world.preempted).toBeGreaterThan(0);
    const first = world.told.get(`${echo.requestId}/0`)?.first;
    expect(first?.promptLogprobs?.tokens).toEqual(echo.promptTokens.slice(1));
    expectAllTold(world);
  });

  it('answers a prompt without a token where maxTokens is 0', () => {
    const world = new SchedulerWorld(OPTIONS);
    const echo = request(9, { promptLogprobs: 1, maxTokens: 0 });
    world.add(echo);
    world.drain();
    const told = world.told.get(`${echo.requestId}/0`);
    expect(told?.tokens).toEqual([]);
    expect(told?.last).toMatchObject({ finishReason: 'length' });
    expect(told?.last?.promptLogprobs?.tokens).toHaveLength(8);
  });
});

describe('n completions of one prompt', () => {
  it.each([13, 14, 2, 1])('computes a prompt of %i tokens once and forks', (length) => {
    const world = new SchedulerWorld({ ...OPTIONS, enablePrefixCaching: false });
    world.add(request(length, {}, { n: 4 }));
    world.drain();
    expectAllTold(world);
    const computed = world.steps.reduce((sum, step) => sum + step.numTokens, 0);
    expect(computed).toBe(length + 3 * 1 + 4 * 7);
  });

  it('forks although the first ends with its first token', () => {
    const world = new SchedulerWorld({ ...OPTIONS, enablePrefixCaching: false });
    world.add(request(15, { maxTokens: 1 }, { n: 3 }));
    world.drain();
    expect(world.steps.reduce((sum, step) => sum + step.numTokens, 0)).toBe(15 + 2);
    expectAllTold(world);
  });

  it('lets the others go on when the first is aborted before its prompt is there', () => {
    const world = new SchedulerWorld({ ...OPTIONS, maxNumBatchedTokens: 4 });
    const several = request(15, {}, { n: 3 });
    world.add(several);
    world.step();
    world.abort(several.requestId, 0);
    world.drain();
    const ends = [0, 1, 2].map(
      (index) => world.told.get(`${several.requestId}/${index}`)?.last?.finishReason,
    );
    expect(ends).toEqual(['abort', 'length', 'length']);
    expect(world.scheduler.blocks.used).toBe(0);
  });
});

describe('KV from a peer', () => {
  it('loads all but the last token outside the batch, holding up nobody', () => {
    const world = new SchedulerWorld(OPTIONS, 'consumer');
    const [remote, local] = [request(14, {}, { remote: true }), request(6)];
    world.add(remote);
    world.add(local);
    expect(world.step()?.batch.sequences.map((s) => s.requestId)).toEqual([local.requestId]);
    expect(world.scheduler.numLoading).toBe(1);
    expect([...world.loads.values()]).toMatchObject([{ numTokens: 13, skipBlocks: 0, peer: { port: 8082 } }]);
    world.endLoad(remote.requestId, true);
    expect(world.step()?.batch.sequences.find((s) => s.requestId === remote.requestId)?.tokens.length).toBe(
      1,
    );
    world.drain();
    expect(world.told.get(`${remote.requestId}/0`)?.first?.promptSource).toEqual({
      computed: 1,
      loaded: 13,
      cached: 0,
    });
    expectAllTold(world);
  });

  it('starts loads although the batch is full', () => {
    const world = new SchedulerWorld({ ...OPTIONS, maxNumSeqs: 1 }, 'consumer');
    for (const each of [request(6), request(6), request(14, {}, { remote: true })]) world.add(each);
    world.step();
    expect(world.loads.size).toBe(1);
    world.drain();
    expectAllTold(world);
  });

  it('loads KV that is being computed with that time, unless it is known to be over by then', () => {
    const world = new SchedulerWorld(OPTIONS, 'consumer');
    const [early, over] = [14, 14].map((length) => ({
      ...request(length, {}, { remote: true }),
      prefillWithinMs: 700,
    })) as [CoreRequest, CoreRequest];
    world.add(early);
    world.add(over);
    world.scheduler.prefilled(over.transferId);
    world.step();
    expect(world.loads.get(early.requestId)?.prefillWithinMs).toBe(700);
    expect(world.loads.get(over.requestId)?.prefillWithinMs).toBeUndefined();
    world.drain();
    expectAllTold(world);
  });

  it('skips what the prefix cache has, and loads nothing where it has all', () => {
    const world = new SchedulerWorld(OPTIONS, 'consumer');
    world.add(request(9, {}, { first: 3 }));
    world.drain();
    const longer = request(20, {}, { first: 3, remote: true });
    const same = request(9, {}, { first: 3, remote: true });
    world.add(longer);
    world.add(same);
    world.step();
    expect([...world.loads.values()]).toMatchObject([
      { requestId: longer.requestId, numTokens: 11, skipBlocks: 2, blockIds: { length: 5 } },
    ]);
    world.drain();
    expect(world.told.get(`${same.requestId}/0`)?.first?.promptSource).toEqual({
      computed: 1,
      loaded: 0,
      cached: 8,
    });
    expectAllTold(world);
  });

  it('computes the prompt when the load fails, and poisons no cache', () => {
    const world = new SchedulerWorld(OPTIONS, 'consumer');
    const failed = request(14, {}, { remote: true, first: 1 });
    world.add(failed);
    world.step();
    world.endLoad(failed.requestId, false);
    world.drain();
    expect(world.told.get(`${failed.requestId}/0`)?.first?.promptSource).toEqual({
      computed: 14,
      loaded: 0,
      cached: 0,
    });
    world.add(request(14, {}, { first: 1 }));
    world.drain();
    expectAllTold(world);
  });

  it('ends every completion with the cause under the policy `fail`', () => {
    const world = new SchedulerWorld(OPTIONS, 'consumer');
    const failed = request(14, {}, { remote: true, n: 3 });
    world.add(failed);
    world.step();
    world.endLoad(failed.requestId, false, 'fail');
    for (const told of world.told.values()) {
      expect(told.last).toMatchObject({ finishReason: 'error', error: { code: 'KV_LOAD_TIMEOUT' } });
    }
    expect(world.scheduler.blocks.used).toBe(0);
    expect(world.finished).toEqual([
      { requestId: failed.requestId, transferId: failed.transferId, aborted: false },
    ]);
  });

  it('refuses a second request of an id whose KV moves, and of no other, while the first is under way', () => {
    const world = new SchedulerWorld(OPTIONS, 'consumer');
    const first = request(14, {}, { remote: true });
    const again = { ...first, requestId: requestId('again', true) };
    world.add(first);
    expect(() => world.scheduler.add(again)).toThrow(
      expect.objectContaining({ code: 'REQUEST_INVALID', message: expect.stringContaining('is under way') }),
    );
    world.step();
    world.abort(first.requestId);
    // Its load may still write: KV of the next could be taken for it.
    expect(() => world.scheduler.add(again)).toThrow(/is under way/);
    world.endLoad(first.requestId, false, 'fail');
    world.scheduler.add(again);
    const local = request(14);
    world.add(local);
    world.scheduler.add({ ...local, requestId: requestId('local', false) });
  });

  it('keeps the blocks of an aborted request until its load can write no more', () => {
    const world = new SchedulerWorld(OPTIONS, 'consumer');
    const aborted = request(14, {}, { remote: true, n: 2 });
    world.add(aborted);
    world.step();
    world.abort(aborted.requestId);
    expect([...world.told.values()].map((told) => told.last?.finishReason)).toEqual(['abort', 'abort']);
    expect(world.scheduler.blocks.used).toBe(4);
    expect(world.finished).toEqual([]);
    world.step();
    expect(world.canceled).toEqual([aborted.requestId]);
    world.endLoad(aborted.requestId, false, 'fail');
    expect(world.scheduler.blocks.used).toBe(0);
    expect(world.finished).toEqual([
      { requestId: aborted.requestId, transferId: aborted.transferId, aborted: true },
    ]);
  });

  it.each([true, false])('serves the followers of an aborted first completion (load ok: %s)', (ok) => {
    const world = new SchedulerWorld({ ...OPTIONS, enablePrefixCaching: false }, 'consumer');
    const several = request(14, {}, { remote: true, n: 3 });
    world.add(several);
    world.step();
    world.abort(several.requestId, 0);
    world.endLoad(several.requestId, ok);
    world.drain();
    const ends = [0, 1, 2].map(
      (index) => world.told.get(`${several.requestId}/${index}`)?.last?.finishReason,
    );
    expect(ends).toEqual(['abort', 'length', 'length']);
    expect(world.scheduler.blocks.used).toBe(0);
  });
});

describe('KV for a peer', () => {
  it('saves once, with the last chunk of the prompt, all its blocks', () => {
    const world = new SchedulerWorld({ ...OPTIONS, maxNumBatchedTokens: 6 }, 'producer');
    const remote = request(14, { maxTokens: 3 }, { remote: true });
    world.add(remote);
    world.drain();
    expect(world.saves).toMatchObject([
      {
        step: 2,
        meta: { requestId: remote.requestId, numTokens: 14, blockIds: { length: 4 }, peer: { port: 8084 } },
      },
    ]);
  });

  it('saves cached blocks too', () => {
    const world = new SchedulerWorld(OPTIONS, 'producer');
    for (const each of [request(14, {}, { first: 5 }), request(14, {}, { first: 5, remote: true })]) {
      world.add(each);
      world.drain();
    }
    expect(world.saves).toHaveLength(1);
    expect(world.saves[0]?.meta.blockIds).toHaveLength(4);
    expect(world.saves[0]?.meta.numTokens).toBe(14);
  });
});
describe('prompt tokens that are queued', () => {
  it('are those to be computed here, less what is cached or comes from a peer', () => {
    const world = new SchedulerWorld({ ...OPTIONS, maxNumBatchedTokens: 16 }, 'consumer');
    const first = request(40);
    world.add(first);
    expect(world.scheduler.queuedTokens).toBe(40);
    world.step();
    expect(world.scheduler.queuedTokens).toBe(40 - 16 - 1);
    world.drain();
    expect(world.scheduler.queuedTokens).toBe(0);
    const again = request(40, {}, { first: first.promptTokens[0]! });
    world.add(again);
    expect(world.scheduler.queuedTokens).toBe(4);
    world.add(request(20, {}, { remote: true }));
    expect(world.scheduler.queuedTokens).toBe(4 + 1);
  });
});

describe('sampling', () => {
  it('ends the request that no token can be drawn for, all its completions, and no other', () => {
    const scheduler = new Scheduler(OPTIONS);
    const [fails, goesOn] = [request(5, {}, { n: 2 }), request(5)];
    for (const each of [fails, goesOn]) scheduler.add(each);
    const drawn = (step: ReturnType<Scheduler['schedule']>, without?: string) =>
      step.batch.sequences
        .filter(({ sequenceId }) => sequenceId !== without)
        .map(({ sequenceId }) => ({ sequenceId, token: 1 }));
    const first = scheduler.schedule();
    scheduler.update(first, { sampled: drawn(first), promptLogprobs: new Map() });
    const step = scheduler.schedule();
    const error = { code: 'REQUEST_INVALID', message: 'no token is left', context: {} } as const;
    const failing = `${fails.requestId}/0`;
    const outputs = scheduler.update(step, {
      sampled: drawn(step, failing),
      promptLogprobs: new Map(),
      failed: new Map([[failing, error]]),
    });
    const ended = outputs.filter(({ finishReason }) => finishReason === 'error');
    expect(ended.map((output) => [output.requestId, output.index, output.error])).toEqual([
      [fails.requestId, 0, error],
      [fails.requestId, 1, error],
    ]);
    expect(scheduler.checkIntegrity()).toEqual([]);
    expect(scheduler.schedule().batch.sequences.map(({ requestId: id }) => id)).toEqual([goesOn.requestId]);
  });

  it('shows prompt and output where they are looked back at', () => {
    const scheduler = new Scheduler(OPTIONS);
    const looking = request(3, { frequencyPenalty: 1 }, { first: 10 });
    for (const each of [looking, request(3)]) scheduler.add(each);
    const first = scheduler.schedule();
    const sampled = first.batch.sequences.map(({ sequenceId }) => ({ sequenceId, token: 42 }));
    scheduler.update(first, { sampled, promptLogprobs: new Map() });
    const [withHistory, plain] = scheduler.schedule().batch.sequences.map(({ sample }) => sample?.history);
    expect(plain).toBeUndefined();
    expect(withHistory?.promptLength).toBe(3);
    expect([...withHistory!.tokens(0, withHistory!.length)]).toEqual([10, 11, 12, 42]);
    expect(withHistory).toBe(first.batch.sequences[0]!.sample?.history);
  });
});

it('tells of all that enters and leaves the prefix cache, in that order', () => {
  const world = new SchedulerWorld({ ...OPTIONS, numBlocks: 10, logCacheChanges: true });
  const cached = new Map<BlockHash, Int32Array>();
  const take = () => {
    for (const change of world.scheduler.takeCacheChanges()) {
      if (change.type === 'removed') {
        expect(cached.delete(change.hash)).toBe(true);
        continue;
      }
      for (const [at, hash] of change.hashes.entries()) {
        expect(cached.has(hash)).toBe(false);
        cached.set(hash, change.tokens.slice(at * 4, at * 4 + 4));
      }
    }
  };
  for (const first of [0, 500, 0, 900, 500, 0]) {
    const one = request(13, {}, { first });
    world.add(one);
    while (world.step()) take();
    take();
    const hashes: BlockHash[] = [];
    extendHashes(hashes, one.promptTokens, 4);
    expect(hashes.map((hash) => cached.get(hash))).toEqual(
      [0, 4, 8].map((at) => one.promptTokens.slice(at, at + 4)),
    );
  }
  expect(cached.size).toBeLessThanOrEqual(10);
});
