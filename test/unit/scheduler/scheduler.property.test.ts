/** Random arrivals, aborts, failing steps and loads under scarce blocks: the world throws where KV is wrong, a block is lost or twice told. */
import fc from 'fast-check';
import { expect, it } from 'vitest';
import { GREEDY } from '../../../src/model/sampler.ts';
import { transferOf } from '../../../support/ids.ts';
import { expectedTokens, requestId, SchedulerWorld } from '../../support/scheduler-world.ts';

const addition = fc.record({
  kind: fc.constant('add' as const),
  family: fc.nat(2),
  length: fc.integer({ min: 1, max: 24 }),
  maxTokens: fc.integer({ min: 1, max: 20 }),
  minTokens: fc.nat(4),
  stops: fc.array(fc.nat(49), { maxLength: 6 }),
  n: fc.constantFrom(1, 1, 1, 2, 3),
  priority: fc.constantFrom(0, 0, 0, -1, 3),
  remote: fc.boolean(),
  promptLogprobs: fc.constantFrom(false, false, false, true),
});
const event = fc.oneof(
  { weight: 3, arbitrary: addition },
  { weight: 8, arbitrary: fc.record({ kind: fc.constant('step' as const) }) },
  { weight: 1, arbitrary: fc.record({ kind: fc.constant('failStep' as const) }) },
  {
    weight: 1,
    arbitrary: fc.record({ kind: fc.constant('abort' as const), who: fc.nat(), index: fc.option(fc.nat(2)) }),
  },
  {
    weight: 3,
    arbitrary: fc.record({
      kind: fc.constant('endLoad' as const),
      who: fc.nat(),
      ok: fc.boolean(),
      policy: fc.constantFrom('recompute' as const, 'fail' as const),
    }),
  },
);
const settings = fc.record({
  numBlocks: fc.integer({ min: 6, max: 24 }),
  blockSize: fc.constantFrom(2, 3, 4),
  maxNumSeqs: fc.integer({ min: 1, max: 6 }),
  maxNumBatchedTokens: fc.integer({ min: 2, max: 48 }),
  maxModelLen: fc.integer({ min: 16, max: 64 }),
  enablePrefixCaching: fc.boolean(),
});

it('loses no block, ends every completion once, and reads and says only what is right', () => {
  const seen = { preempted: 0, loaded: 0, cached: 0, forked: 0, aborted: 0, failed: 0 };
  const property = fc.property(
    settings,
    fc.constantFrom('consumer' as const, 'producer' as const, undefined),
    fc.array(event, { minLength: 20, maxLength: 120, size: 'max' }),
    (options, role, events) => {
      const world = new SchedulerWorld(options, role);
      const excused = new Set<string>();
      const limit = Math.min(options.maxModelLen, options.numBlocks * options.blockSize);
      let serial = 0;
      for (const each of events) {
        if (each.kind === 'add') {
          const id = requestId(serial++, each.remote);
          const request = {
            requestId: id,
            transferId: transferOf(id),
            promptTokens: Int32Array.from({ length: each.length }, (_, i) => each.family * 1_000 + i),
            sampling: {
              ...GREEDY,
              maxTokens: each.maxTokens,
              minTokens: each.minTokens,
              stopTokenIds: each.stops,
              ...(each.promptLogprobs && { promptLogprobs: 0 }),
            },
            n: each.n,
            priority: each.priority,
          };
          if (each.length < limit) world.add(request);
          else
            expect(() => world.add(request)).toThrow(expect.objectContaining({ code: 'CONTEXT_EXCEEDED' }));
        } else if (each.kind === 'step') {
          world.step();
        } else if (each.kind === 'failStep') {
          for (const { sequence } of world.step(true)?.entries ?? []) {
            excused.add(sequence.group.request.requestId);
            seen.failed++;
          }
        } else if (each.kind === 'abort') {
          const { request } = [...world.told.values()][each.who % Math.max(1, world.told.size)] ?? {};
          if (!request) continue;
          excused.add(request.requestId);
          world.abort(request.requestId, each.index ?? undefined);
          seen.aborted++;
        } else {
          const id = [...world.loads.keys()][each.who % Math.max(1, world.loads.size)];
          if (!id) continue;
          if (!each.ok && each.policy === 'fail') excused.add(id);
          world.endLoad(id, each.ok, each.policy);
        }
      }
      world.drain();
      for (const [name, { request, tokens, ends, last, first }] of world.told) {
        const index = Number(name.slice(name.lastIndexOf('/') + 1));
        const expected = expectedTokens(request, index, limit);
        expect(ends, name).toBe(1);
        if (last?.finishReason === 'abort' || last?.finishReason === 'error') {
          expect(excused.has(request.requestId), name).toBe(true);
          expect(tokens).toEqual(expected.slice(0, tokens.length));
        } else {
          expect(tokens, name).toEqual(expected);
        }
        if (first?.promptSource) {
          const { computed, loaded, cached } = first.promptSource;
          expect(computed + loaded + cached).toBe(request.promptTokens.length);
          expect(computed).toBeGreaterThan(0);
          seen.loaded += loaded;
          seen.cached += cached;
        }
        if (request.sampling.promptLogprobs !== undefined && first?.promptLogprobs) {
          expect(first.promptLogprobs.tokens).toEqual(request.promptTokens.slice(1));
        }
      }
      expect(world.scheduler.blocks.used).toBe(0);
      expect(world.finished.map((each) => each.requestId).sort()).toEqual(
        [...new Set([...world.told.values()].map(({ request }) => request.requestId))].sort(),
      );
      if (role === 'producer') {
        const saved = world.saves.map(({ meta }) => meta.requestId);
        expect(new Set(saved).size).toBe(saved.length);
      }
      seen.preempted += world.preempted;
      seen.forked += world.steps.reduce((sum, step) => sum + step.batch.blockCopies.length, 0);
    },
  );
  // What is rare may take another round.
  for (let round = 0; round < 8 && Object.values(seen).includes(0); round++) {
    fc.assert(property, { numRuns: Number(process.env['PD_PROPERTY_RUNS'] ?? 400) });
  }
  // The property says nothing about what never happened.
  for (const [what, count] of Object.entries(seen)) expect(count, what).toBeGreaterThan(0);
});
