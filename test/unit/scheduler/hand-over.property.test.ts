/** Two schedulers hand KV over by the native way, through faults and late messages: every token is what one alone would say. */
import fc from 'fast-check';
import { expect, it, vi } from 'vitest';
import { GREEDY } from '../../../src/model/sampler.ts';
import type { SchedulerStep } from '../../../src/scheduler/step.ts';
import type { CoreRequest } from '../../../src/scheduler/types.ts';
import { transferOf } from '../../../support/ids.ts';
import { PairWorld } from '../../support/pair-world.ts';
import { propertyRuns } from '../../support/property-runs.ts';
import { expectedTokens, requestId } from '../../support/scheduler-world.ts';

const addition = fc.record({
  kind: fc.constant('add' as const),
  family: fc.nat(2),
  length: fc.integer({ min: 1, max: 20 }),
  maxTokens: fc.integer({ min: 1, max: 8 }),
  minTokens: fc.nat(2),
  stops: fc.array(fc.nat(49), { maxLength: 12 }),
  n: fc.constantFrom(1, 1, 1, 2, 3),
  logprobs: fc.constantFrom(undefined, undefined, 0),
  temperature: fc.constantFrom(0, 1),
  /** Of the producer's copy; the consumer's is 1. */
  seed: fc.constantFrom(1, 1, 1, 2),
  scored: fc.constantFrom(false, false, false, false, true),
  /** At which end it comes at all; `local`: to the producer, which decodes it itself. */
  at: fc.constantFrom('both', 'both', 'both', 'both', 'consumer', 'producer', 'local'),
});
const named = <Kind extends string>(...kinds: readonly Kind[]) =>
  fc.record({ kind: fc.constantFrom(...kinds), who: fc.nat(), many: fc.nat(5) });
const event = fc.oneof(
  { weight: 3, arbitrary: addition },
  { weight: 4, arbitrary: named('come to producer', 'come to consumer') },
  { weight: 10, arbitrary: named('produce', 'consume') },
  { weight: 14, arbitrary: named('deliver to producer', 'deliver to consumer', 'land') },
  { weight: 3, arbitrary: named('tick', 'abort', 'abort one', 'fail step', 'fail one', 'release') },
  { weight: 1, arbitrary: named('long tick', 'stop', 'reconnect', 'kill producer', 'kill consumer') },
);
const settings = fc.record({
  numBlocks: fc.integer({ min: 8, max: 20 }),
  blockSize: fc.constant(4),
  maxNumSeqs: fc.integer({ min: 1, max: 6 }),
  maxNumBatchedTokens: fc.integer({ min: 3, max: 32 }),
  maxModelLen: fc.constant(30),
  enablePrefixCaching: fc.boolean(),
});
const END = 30;

it('says what one scheduler alone would, writes to nobody else’s blocks, and keeps none', () => {
  const seen = { drawn: 0, loaded: 0, quarantined: 0, failed: 0, madeRoom: 0, midStep: 0, ended: 0 };
  const property = fc.property(
    settings,
    settings,
    fc.constantFrom(0, Number.POSITIVE_INFINITY),
    fc.constantFrom('recompute' as const, 'recompute' as const, 'fail' as const),
    fc.array(event, { minLength: 60, maxLength: 250, size: 'max' }),
    (consumerOptions, producerOptions, keepMs, policy, events) => {
      const pair = new PairWorld(consumerOptions, producerOptions, keepMs);
      const toCome: { readonly at: 'producer' | 'consumer'; readonly request: CoreRequest }[] = [];
      const excused = new Set<string>();
      let requests = 0;
      const come = (at: 'producer' | 'consumer', which = 0) => {
        const mine = toCome.filter((one) => one.at === at);
        const next = mine[which % Math.max(1, mine.length)];
        if (!next) return;
        toCome.splice(toCome.indexOf(next), 1);
        pair[at].world.add(next.request);
      };
      const hear = (meanwhile: boolean) => {
        for (const outcome of pair.consumer.world.takeOutcomes(policy)) {
          if (meanwhile) seen.midStep++;
          if (outcome.ok) seen.loaded++;
          if (outcome.ok && outcome.draw) seen.drawn++;
          if (outcome.ok) continue;
          seen.failed++;
          if (outcome.quarantined) seen.quarantined++;
          if (outcome.error.message.includes('made room')) seen.madeRoom++;
          if (policy === 'fail') excused.add(outcome.requestId);
        }
      };
      const spread = (many: number) => {
        for (let i = 0; i < many; i++) {
          pair.land();
          pair.deliver('producer');
          pair.deliver('consumer');
        }
      };
      /** The one of the sequences of a step for which no token can be drawn. */
      const failOne = (who: number | undefined) => (step: SchedulerStep) => {
        const sampling = step.batch.sequences.filter(({ sample }) => sample !== undefined);
        const one = who === undefined ? undefined : sampling[who % Math.max(1, sampling.length)];
        if (!one) return [];
        excused.add(one.requestId);
        return [one.sequenceId];
      };
      const produce = (fail: boolean, many: number, failing?: number) => {
        const step = pair.producer.world.step(fail, () => spread(many), failOne(failing));
        if (fail)
          for (const { sequence } of step?.entries ?? []) excused.add(sequence.group.request.requestId);
      };
      const consume = (fail: boolean, many: number, failing?: number) => {
        hear(false);
        const meanwhile = () => {
          spread(many);
          hear(true);
        };
        const step = pair.consumer.world.step(fail, meanwhile, failOne(failing));
        if (fail)
          for (const { sequence } of step?.entries ?? []) excused.add(sequence.group.request.requestId);
        hear(false);
      };
      const finish = (world: PairWorld['consumer']['world']) => {
        for (const [name, { request, tokens, ends, last }] of world.told) {
          const expected = expectedTokens(request, Number(name.slice(name.lastIndexOf('/') + 1)), END);
          expect(ends, name).toBe(1);
          const isCut = last?.finishReason === 'abort' || last?.finishReason === 'error';
          if (isCut) expect(excused.has(request.requestId), name).toBe(true);
          expect(tokens, name).toEqual(isCut ? expected.slice(0, tokens.length) : expected);
          seen.ended++;
        }
      };
      for (const each of events) {
        if (each.kind === 'add') {
          const { family, length, at, n, seed, maxTokens, minTokens, stops, scored, ...sampling } = each;
          const id = requestId(requests++, at !== 'local');
          const { kind: _, logprobs, temperature } = sampling;
          const request = {
            requestId: id,
            transferId: transferOf(id),
            promptTokens: Int32Array.from({ length }, (_, i) => family * 1_000 + i),
            wire: 'native',
            n,
            sampling: {
              ...GREEDY,
              temperature,
              seed: 1,
              maxTokens,
              minTokens,
              stopTokenIds: stops,
              ...(logprobs !== undefined && { logprobs }),
            },
          } as const;
          const copy = { ...request.sampling, seed, maxTokens: 1, minTokens: Math.min(1, minTokens) };
          const scoring = { ...request.sampling, ...(scored && { promptLogprobs: 0 }) };
          if (at === 'local') toCome.push({ at: 'producer', request });
          else if (at !== 'consumer')
            toCome.push({ at: 'producer', request: { ...request, n: 1, sampling: copy } });
          if (at === 'both' || at === 'consumer')
            toCome.push({ at: 'consumer', request: { ...request, sampling: scoring } });
        } else {
          const { kind, who, many } = each;
          if (kind === 'come to producer') come('producer', who);
          else if (kind === 'come to consumer') come('consumer', who);
          else if (kind === 'produce') produce(false, many);
          else if (kind === 'consume') consume(false, many);
          else if (kind === 'fail step') (who % 2 === 0 ? produce : consume)(true, many);
          else if (kind === 'fail one') (who % 2 === 0 ? produce : consume)(false, many, who >> 1);
          else if (kind === 'deliver to producer') pair.deliver('producer');
          else if (kind === 'deliver to consumer') pair.deliver('consumer');
          else if (kind === 'land') pair.land();
          else if (kind === 'tick') pair.tick(250);
          else if (kind === 'long tick') pair.tick(1_500);
          else if (kind === 'stop') pair.tick(10_000);
          else if (kind === 'reconnect') pair.connect();
          else if (kind === 'kill producer') pair.killProducer();
          else if (kind === 'kill consumer') pair.killConsumer();
          else {
            const { world } = who % 2 === 0 ? pair.producer : pair.consumer;
            const told = [...world.told.values()];
            const { request } = told[(who >> 1) % Math.max(1, told.length)] ?? {};
            if (!request) continue;
            if (kind === 'release') world.scheduler.released(request.transferId);
            else {
              excused.add(request.requestId);
              world.abort(request.requestId, kind === 'abort one' ? 0 : undefined);
            }
          }
        }
        pair.check();
      }
      // and now everything gets its turn
      for (const { at } of [...toCome]) come(at);
      for (let round = 0; round < 400; round++) {
        produce(false, 2);
        consume(false, 2);
        spread(20);
        pair.tick(500);
        pair.check();
        const { consumer, producer } = pair;
        const left = consumer.world.scheduler.numRequests + producer.world.scheduler.numRequests;
        if (left === 0 && pair.isIdle) break;
      }
      finish(pair.consumer.world);
      finish(pair.producer.world);
      expect(pair.isIdle).toBe(true);
      expect([pair.consumer.world.scheduler.blocks.used, pair.producer.world.scheduler.blocks.used]).toEqual([
        0, 0,
      ]);
    },
  );
  // What is rare may take another round.
  for (let round = 0; round < 8 && Object.values(seen).includes(0); round++) {
    fc.assert(property, { numRuns: propertyRuns(100) });
  }
  for (const [what, count] of Object.entries(seen)) expect(count, what).toBeGreaterThan(0);
});

it('writes nothing from blocks that a preemption has taken from a prompt, and all of it once it is computed again', () => {
  const options = { blockSize: 4, maxNumSeqs: 2, maxModelLen: END, enablePrefixCaching: false };
  const consumerOptions = { ...options, numBlocks: 8, maxNumBatchedTokens: 32 };
  const pair = new PairWorld(
    consumerOptions,
    { ...options, numBlocks: 7, maxNumBatchedTokens: 2 },
    Number.POSITIVE_INFINITY,
  );
  const make = (name: number, remote: boolean, length: number, maxTokens: number) => {
    const id = requestId(name, remote);
    const promptTokens = Int32Array.from({ length }, (_, i) => name * 1_000 + i);
    const more = { wire: 'native', n: 1, sampling: { ...GREEDY, maxTokens } } as const;
    return { requestId: id, transferId: transferOf(id), promptTokens, ...more };
  };
  const { producer, consumer } = pair;
  producer.world.add(make(0, false, 4, 12));
  producer.world.step();
  producer.world.step();
  producer.world.add(make(1, true, 16, 1));
  consumer.world.add(make(1, true, 16, 3));
  for (let i = 0; i < 20 && producer.world.preempted === 0; i++) producer.world.step();
  expect(producer.world.preempted).toBe(1);
  consumer.world.step();
  for (let round = 0; round < 200 && consumer.world.scheduler.numRequests > 0; round++) {
    while (pair.deliver('producer') || pair.land() || pair.deliver('consumer')) pair.check();
    consumer.world.takeOutcomes('recompute');
    consumer.world.step();
    producer.world.step();
  }
  const [told] = consumer.world.told.values();
  expect(told?.tokens).toEqual(expectedTokens(make(1, true, 16, 3), 0, END));
  expect(told?.first?.promptSource).toEqual({ computed: 0, loaded: 16, cached: 0 });
});

/**
 * Each end may hold what the other needs: a consumer's blocks are allocated to wants of prompts that its producer cannot begin, whose own are
 * kept for prompts that the consumer has no blocks left to ask for.
 */
it('two ends whose caches are full of what the other waits for go on, in whatever order requests came to either', () => {
  const KEEP_MS = 3_000;
  const LENGTH = 12;
  const one = { blockSize: 4, maxNumSeqs: 4, maxNumBatchedTokens: 16, maxModelLen: END };
  const seen = { crossed: 0, kept: 0, loaded: 0 };
  const orders = fc.integer({ min: 4, max: 9 }).chain((count) => {
    const all = Array.from({ length: count }, (_, i) => i);
    const order = fc.shuffledSubarray(all, { minLength: count, maxLength: count });
    return fc.tuple(order, order);
  });
  const clock = vi.spyOn(performance, 'now');
  const property = fc.property(
    orders,
    fc.integer({ min: 4, max: 7 }),
    fc.integer({ min: 4, max: 7 }),
    fc.array(fc.constantFrom('produce', 'consume', 'spread', 'tick'), { minLength: 40, maxLength: 120 }),
    ([toProducer, toConsumer], ofProducer, ofConsumer, turns) => {
      const options = { ...one, enablePrefixCaching: false };
      const pair = new PairWorld(
        { ...options, numBlocks: ofConsumer },
        { ...options, numBlocks: ofProducer },
        KEEP_MS,
      );
      clock.mockImplementation(() => pair.now);
      const { producer, consumer } = pair;
      const leasedAt = new Map<string, number>();
      const { run, fail } = producer.half;
      producer.half.run = (actions) => {
        for (const action of actions) if (action.kind === 'lease') leasedAt.set(action.id, pair.now);
        run.call(producer.half, actions);
      };
      producer.half.fail = (id, code, why) => {
        const age = pair.now - (leasedAt.get(id) ?? Number.NaN);
        const crossed = producer.half.consumerWaits() >= KEEP_MS / 4;
        if (why.includes('made room')) expect(age).toBeGreaterThanOrEqual(crossed ? KEEP_MS / 4 : KEEP_MS);
        if (why.includes('made room') && age < KEEP_MS) seen.crossed++;
        fail.call(producer.half, id, code, why);
      };
      const make = (name: number) => {
        const id = requestId(name, true);
        const promptTokens = Int32Array.from({ length: LENGTH }, (_, i) => name * 1_000 + i);
        const more = { wire: 'native', n: 1, sampling: { ...GREEDY, maxTokens: 3 } } as const;
        return { requestId: id, transferId: transferOf(id), promptTokens, ...more };
      };
      for (const name of toProducer) {
        const request = make(name);
        producer.world.add({ ...request, sampling: { ...request.sampling, maxTokens: 1 } });
      }
      for (const name of toConsumer) consumer.world.add(make(name));
      const hear = () => {
        for (const { ok } of consumer.world.takeOutcomes('recompute')) if (ok) seen.loaded++;
      };
      const spread = () => {
        while (pair.land() || pair.deliver('producer') || pair.deliver('consumer'));
      };
      const left = () => consumer.world.scheduler.numRequests + producer.world.scheduler.numRequests;
      for (let at = 0; left() > 0 || !pair.isIdle; at++) {
        // in an order of its own, and then each in its turn
        const turn = turns[at] ?? (['produce', 'spread', 'consume', 'spread', 'tick'] as const)[at % 5];
        if (turn === 'produce') producer.world.step();
        else if (turn === 'consume') consumer.world.step();
        else if (turn === 'spread') spread();
        else pair.tick(250);
        hear();
        pair.check();
        // at the worst one after the other, each given up by both ends
        const most = 2 * KEEP_MS * (toProducer.length + 1) + 250 * turns.length;
        expect(pair.now, JSON.stringify(consumer.world.counts())).toBeLessThan(most);
      }
      if (leasedAt.size > 0) seen.kept++;
      for (const { request, tokens } of consumer.world.told.values())
        expect(tokens).toEqual(expectedTokens(request, 0, END));
    },
  );
  try {
    for (let round = 0; round < 4 && Object.values(seen).includes(0); round++)
      fc.assert(property, { numRuns: 60 });
  } finally {
    clock.mockRestore();
  }
  for (const [what, count] of Object.entries(seen)) expect(count, what).toBeGreaterThan(0);
});
