import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { POLICIES, type Policy } from '../../../src/config/proxy-config.ts';
import { type Choices, choose, soonerAlone } from '../../../src/proxy/placement.ts';
import { InstanceWork } from '../../../src/proxy/work.ts';

interface Told {
  readonly requests?: number;
  readonly queued?: number;
  readonly kvUsed?: number;
  readonly picked?: number;
}

function candidates(told: readonly Told[]) {
  return told.map(({ requests = 0, queued = 0, kvUsed = 0, picked = 0 }, at) => {
    const work = new InstanceWork(() => 0);
    work.tell({ running: requests, waiting: 0, kvUsed, kvBlocks: 100, queuedTokens: queued });
    return { address: `10.0.0.${at}:80`, work, ours: true, picked };
  });
}

const cachedAt = (tokens: readonly number[]) => (address: string) =>
  tokens[Number(/\.(\d+):/.exec(address)![1])] ?? 0;
const at = (policy: Policy, role: 'producer' | 'consumer', told: Told[], tokens = 0, cached: number[] = []) =>
  candidates(told).findIndex(
    ({ address }) =>
      address === choose(policy, role, candidates(told), { tokens, cached: cachedAt(cached) }).address,
  );

describe('what is weighed', () => {
  test('a producer by what it has to compute, a consumer by its batch', () => {
    expect(at('least-loaded', 'producer', [{ queued: 5_000 }, { queued: 100, requests: 3 }])).toBe(1);
    expect(at('least-loaded', 'consumer', [{ requests: 4 }, { requests: 3 }])).toBe(1);
    expect(at('least-loaded', 'consumer', [{ kvUsed: 99 }, { requests: 20 }])).toBe(1);
  });

  test('a cached prefix against the queue before it', () => {
    const busy = (queued: number) => at('kv-aware', 'producer', [{ queued }, {}], 4_000, [3_200]);
    expect(busy(3_000)).toBe(0);
    expect(busy(3_400)).toBe(1);
    expect(at('least-loaded', 'producer', [{ queued: 1 }, {}], 4_000, [3_200])).toBe(1);
    // Fetching 3,200 tokens costs less than two requests more in the batch do.
    expect(at('kv-aware', 'consumer', [{ requests: 1 }, {}], 4_000, [3_200])).toBe(0);
    expect(at('kv-aware', 'consumer', [{ requests: 2 }, {}], 4_000, [3_200])).toBe(1);
  });

  test('is told: what each would have cost, and what it had', () => {
    const all = candidates([{ queued: 3_000 }, {}]);
    const choices: Choices = {};
    choose('kv-aware', 'producer', all, { tokens: 4_000, cached: cachedAt([3_200]) }, choices);
    choose('round-robin', 'consumer', all, undefined, choices);
    const costs = [(3_000 + 800) / 8.192, 4_000 / 8.192];
    expect(choices).toEqual({
      producer: {
        policy: 'kv-aware',
        considered: 2,
        candidates: [
          { address: '10.0.0.0:80', costMs: expect.closeTo(costs[0]!), cachedTokens: 3_200 },
          { address: '10.0.0.1:80', costMs: expect.closeTo(costs[1]!), cachedTokens: 0 },
        ],
      },
      consumer: {
        policy: 'round-robin',
        considered: 2,
        candidates: [{ address: '10.0.0.0:80' }, { address: '10.0.0.1:80' }],
      },
    });
  });

  test('of many the first are told, and the one that was chosen', () => {
    const all = candidates(Array.from({ length: 40 }, (_, i) => ({ queued: 100 - i })));
    const choices: Choices = {};
    expect(choose('least-loaded', 'producer', all, undefined, choices)).toBe(all[39]);
    expect(choices.producer?.considered).toBe(40);
    expect(choices.producer?.candidates).toHaveLength(17);
    const { address } = all[39]!;
    expect(choices.producer?.candidates.at(-1)).toEqual({ address, costMs: expect.closeTo(61 / 8.192) });
  });

  test('how fast a producer has been seen to be', () => {
    const [slow, fast] = candidates([{ queued: 1_000 }, { queued: 1_500 }]);
    for (let i = 0; i < 50; i++) {
      slow!.work.learn(2_000, 2_000);
      fast!.work.learn(2_000, 200);
    }
    expect(choose('least-loaded', 'producer', [slow!, fast!], undefined)).toBe(fast);
    expect(fast!.work.msPerToken).toBeCloseTo(0.1);
  });

  test('one that nobody knows yet counts as the others on average', () => {
    const all = candidates([{ queued: 10 }, { queued: 20 }, { queued: 30 }]);
    all[1]!.work.learn(2_000, 8_000);
    expect(choose('least-loaded', 'producer', all, undefined)).toBe(all[0]);
  });
});

const anyTold = fc.array(
  fc.record({
    requests: fc.nat(Number.MAX_SAFE_INTEGER),
    queued: fc.nat(Number.MAX_SAFE_INTEGER),
    kvUsed: fc.nat(Number.MAX_SAFE_INTEGER),
    picked: fc.nat(),
  }),
  { minLength: 1, maxLength: 8 },
);
const anyRole = fc.constantFrom('producer', 'consumer');

test('whatever instances tell, one of them is chosen', () => {
  const prompt = fc.record({ tokens: fc.nat(), session: fc.option(fc.string(), { nil: undefined }) });
  const policy = fc.constantFrom(...POLICIES);
  fc.assert(
    fc.property(anyTold, policy, anyRole, prompt, fc.array(fc.nat()), (told, one, role, wish, cached) => {
      const all = candidates(told);
      expect(all).toContain(choose(one, role, all, { ...wish, cached: cachedAt(cached) }));
    }),
  );
});

test('among equals each is chosen in turn', () => {
  for (const policy of POLICIES) {
    const all = candidates([{}, {}, {}]).map((one) => ({ ...one }));
    const turns = Array.from({ length: 6 }, (_, turn) => {
      const chosen = choose(policy, 'producer', all, undefined);
      chosen.picked = turn + 1;
      return all.indexOf(chosen);
    });
    expect(turns, policy).toEqual([0, 1, 2, 0, 1, 2]);
  }
});

test('more cached never makes an instance lose, more to do never makes it win', () => {
  fc.assert(
    fc.property(
      anyTold,
      anyRole,
      fc.nat(100_000),
      fc.nat(100_000),
      fc.nat(7),
      (told, role, tokens, more, which) => {
        const mine = which % told.length;
        const before = at('kv-aware', role, told, tokens);
        const cached = told.map((_, i) => (i === mine ? more : 0));
        if (before === mine) expect(at('kv-aware', role, told, tokens, cached)).toBe(mine);
        const busier = told.map((one, i) => (i === mine ? { ...one, requests: one.requests + more } : one));
        if (before !== mine) expect(at('kv-aware', role, busier, tokens)).not.toBe(mine);
      },
    ),
  );
});

test('a consumer has a prompt sooner where its producer is far behind, and it is not', () => {
  const sooner = (
    producer: Told,
    consumer: Told,
    uncached = { producer: 2_000, consumer: 2_000 },
    ms?: number,
  ) => {
    const [prefill, decode] = candidates([producer, consumer]).map(({ work }) => work);
    if (ms !== undefined) prefill!.learn(10_000, ms);
    return soonerAlone(150, prefill!, decode!, uncached);
  };
  // 0.025 ms a token: 6,000 are computed in 150 ms, of the consumer 4,000.
  const fast = 250;
  expect(sooner({ queued: 6_000 }, {}, undefined, fast)).toBe(false);
  expect(sooner({ queued: 6_001 }, { requests: 30 }, undefined, fast)).toBe(true);
  expect(sooner({ queued: 6_001 }, { queued: 3_333 }, undefined, fast)).toBe(true);
  expect(sooner({ queued: 6_001 }, { queued: 3_400 }, undefined, fast)).toBe(false);
  // What the producer has cached, and the consumer has not.
  expect(sooner({ queued: 6_001 }, {}, { producer: 100, consumer: 5_000 }, fast)).toBe(false);
  expect(sooner({ queued: 60_000 }, {})).toBe(false); // nobody has seen how fast it is
});

test('auto is kv-aware among pd-workers, and takes turns where one of them is none', () => {
  const prompt = { tokens: 4_000, cached: cachedAt([0, 3_200]) };
  const ours = candidates([{ picked: 1 }, { picked: 2 }]);
  expect(choose('auto', 'producer', ours, prompt)).toBe(ours[1]);
  const mixed = ours.map((one, index) => ({ ...one, ours: index === 1 }));
  expect(choose('auto', 'producer', mixed, prompt)).toBe(mixed[0]);
});

describe('sessions', () => {
  const where = (session: string, addresses: readonly string[]) =>
    choose(
      'session',
      'consumer',
      addresses.map((address) => ({ address, work: new InstanceWork(() => 0), ours: true, picked: 0 })),
      { tokens: 0, session, cached: () => 0 },
    ).address;

  test('stay where they are; of an instance that goes, only its own move', () => {
    const all = ['a', 'b', 'c', 'd'];
    fc.assert(
      fc.property(fc.string(), fc.constantFrom(...all), (session, gone) => {
        const home = where(session, all);
        expect(where(session, [...all].reverse())).toBe(home);
        if (gone !== home)
          expect(
            where(
              session,
              all.filter((one) => one !== gone),
            ),
          ).toBe(home);
      }),
    );
  });

  test('spread over the instances', () => {
    const counts = new Map<string, number>();
    for (let i = 0; i < 3_000; i++) {
      const home = where(`s${i}`, ['a', 'b', 'c']);
      counts.set(home, (counts.get(home) ?? 0) + 1);
    }
    for (const count of counts.values()) expect(Math.abs(count - 1_000)).toBeLessThan(150);
  });
});
