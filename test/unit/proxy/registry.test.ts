import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import {
  type Instance,
  type InstancePing,
  InstanceRegistry,
  type InstanceRole,
} from '../../../src/proxy/registry.ts';
import type { SendType } from '../../../src/wire/messages.ts';

const TIMEOUT = 10_000;

function setUp() {
  const clock = { now: 1_000 };
  return { clock, registry: new InstanceRegistry(TIMEOUT, () => clock.now) };
}

function ping(role: InstanceRole, port: number, digest?: string): InstancePing {
  return {
    role,
    httpAddress: `10.0.0.1:${port}`,
    zmqAddress: `10.0.0.1:${port + 1}`,
    ...(digest === undefined ? {} : { fingerprint: { digest, model: `model-${digest}` } }),
  };
}

const addresses = (registry: InstanceRegistry) => registry.list().map((instance) => instance.httpAddress);
const picked = (registry: InstanceRegistry, wish = {}) => {
  const pair = registry.pair(wish);
  return typeof pair === 'string' ? pair : [pair.producer.http.port, pair.consumer.http.port];
};

describe('expiry', () => {
  test('removes each silent instance, also one behind a live one', () => {
    const { clock, registry } = setUp();
    registry.announce(ping('producer', 1));
    registry.announce(ping('producer', 3));
    registry.announce(ping('consumer', 5));
    clock.now += TIMEOUT - 1;
    registry.announce(ping('producer', 1)); // first in order, alive
    clock.now += 2;
    const gone = registry.expire().map((change) => change.instance.httpAddress);
    expect(gone).toEqual(['10.0.0.1:3', '10.0.0.1:5']);
    expect(addresses(registry)).toEqual(['10.0.0.1:1']);
  });

  test('an overdue instance serves nobody, also before the sweep', () => {
    const { clock, registry } = setUp();
    registry.announce(ping('producer', 1));
    registry.announce(ping('consumer', 3));
    clock.now += TIMEOUT + 1;
    registry.announce(ping('producer', 1));
    expect(registry.pair()).toBe('consumer');
    expect(addresses(registry)).toEqual(['10.0.0.1:1']);
  });

  test('whatever the order of pings and pauses: listed are exactly those heard of in time, each once', () => {
    const step = fc.oneof(
      fc.record({ port: fc.integer({ min: 1, max: 4 }), consumer: fc.boolean() }),
      fc.record({ pause: fc.integer({ min: 0, max: TIMEOUT }) }),
      fc.constant('sweep' as const),
    );
    fc.assert(
      fc.property(fc.array(step, { maxLength: 40 }), (steps) => {
        const { clock, registry } = setUp();
        const model = new Map<number, { role: InstanceRole; at: number }>();
        for (const s of steps) {
          if (s === 'sweep') registry.expire();
          else if ('pause' in s) clock.now += s.pause;
          else {
            const role = s.consumer ? 'consumer' : 'producer';
            registry.announce(ping(role, s.port * 10));
            model.set(s.port * 10, { role, at: clock.now });
          }
          const live = [...model].filter(([, { at }]) => clock.now - at <= TIMEOUT);
          const expected = live.map(([port, { role }]) => `${role} ${port}`).sort();
          expect(
            registry
              .list()
              .map((instance) => `${instance.role} ${instance.http.port}`)
              .sort(),
          ).toEqual(expected);
        }
      }),
    );
  });
});

describe('announcements', () => {
  test('an address that pings with another role is the new role only', () => {
    const { registry } = setUp();
    registry.announce(ping('producer', 1));
    const changes = registry.announce(ping('consumer', 1));
    expect(changes?.map((change) => change.kind)).toEqual(['removed', 'added']);
    expect(registry.list('producer')).toEqual([]);
    expect(registry.list('consumer')).toHaveLength(1);
  });

  test('one that has restarted on its addresses is another: it takes requests again after a drain', () => {
    const { registry } = setUp();
    const first = { ...ping('producer', 1, 'a'), started: 1_000 };
    registry.announce(first);
    registry.announce(ping('consumer', 3, 'a'));
    registry.drain('10.0.0.1:1', true);
    expect(registry.announce(first)).toEqual([]);
    expect(registry.pair()).toBe('producer');
    const changes = registry.announce({ ...first, started: 2_000 });
    expect(changes?.map(({ kind }) => kind)).toEqual(['removed', 'added']);
    expect(picked(registry)).toEqual([1, 3]);
  });

  test('an instance that restarts on another HTTP port, with the same KV port, replaces its old self', () => {
    const { registry } = setUp();
    registry.announce(ping('producer', 1));
    registry.announce({ ...ping('producer', 1), httpAddress: '10.0.0.1:77' });
    expect(addresses(registry)).toEqual(['10.0.0.1:77']);
  });

  test('an address that is none is refused', () => {
    const { registry } = setUp();
    expect(() => registry.announce({ ...ping('producer', 1), zmqAddress: 'nowhere' })).toThrow(
      /ZMQ address of a ping "nowhere"/,
    );
    expect(registry.list()).toEqual([]);
  });

  test('strangers cannot fill memory', () => {
    const { registry } = setUp();
    for (let i = 0; i < 3_000; i++) registry.announce(ping('producer', 2 * i + 1));
    expect(registry.list().length).toBeLessThanOrEqual(1_024);
  });
});

describe('pairing', () => {
  test('round robin per role: shares differ by one at most', () => {
    const counts = fc.integer({ min: 1, max: 5 });
    fc.assert(
      fc.property(counts, counts, fc.integer({ min: 1, max: 40 }), (producers, consumers, requests) => {
        const { registry } = setUp();
        for (let i = 0; i < producers; i++) registry.announce(ping('producer', 100 + 2 * i, 'a'));
        for (let i = 0; i < consumers; i++) registry.announce(ping('consumer', 200 + 2 * i, 'a'));
        const served = new Map<number, number>();
        for (let i = 0; i < requests; i++) {
          for (const port of picked(registry) as number[]) served.set(port, (served.get(port) ?? 0) + 1);
        }
        for (const [base, count] of [
          [100, producers],
          [200, consumers],
        ] as const) {
          const shares = Array.from({ length: count }, (_, i) => served.get(base + 2 * i) ?? 0);
          expect(Math.max(...shares) - Math.min(...shares)).toBeLessThanOrEqual(1);
        }
      }),
    );
  });

  test('never pairs two fingerprints that differ', () => {
    const digest = fc.option(fc.constantFrom('a', 'b', 'c'), { nil: undefined });
    fc.assert(
      fc.property(fc.array(fc.tuple(fc.boolean(), digest), { maxLength: 8 }), (instances) => {
        const { registry } = setUp();
        for (const [i, [consumer, d]] of instances.entries()) {
          registry.announce(ping(consumer ? 'consumer' : 'producer', 10 + 2 * i, d));
        }
        for (let i = 0; i < 5; i++) {
          const pair = registry.pair();
          if (typeof pair === 'string') continue;
          const a = pair.producer.fingerprint?.digest;
          const b = pair.consumer.fingerprint?.digest;
          if (a !== undefined && b !== undefined) expect(a).toBe(b);
        }
      }),
    );
  });

  test('never pairs GET with PUT; a worker that does not tell fits both', () => {
    const { registry } = setUp();
    const telling = (role: InstanceRole, port: number, sendType: SendType) =>
      registry.announce({ ...ping(role, port, 'a'), sendType });
    telling('producer', 1, 'GET');
    telling('consumer', 3, 'PUT');
    expect(registry.pair()).toBe('match');
    telling('producer', 5, 'PUT_ASYNC');
    for (let i = 0; i < 3; i++) expect(picked(registry)).toEqual([5, 3]);
    registry.announce(ping('consumer', 7, 'a'));
    expect(new Set([0, 1, 2, 3].map(() => String(picked(registry))))).toContain('1,7');
  });

  test('says which role is missing, or that nothing fits', () => {
    const { registry } = setUp();
    expect(registry.pair()).toBe('producer');
    registry.announce(ping('producer', 1, 'a'));
    expect(registry.pair()).toBe('consumer');
    registry.announce(ping('consumer', 3, 'b'));
    expect(registry.pair()).toBe('match');
  });

  test('vLLM instances, which announce no fingerprint, pair with each other; with ours only as a last resort', () => {
    const { registry } = setUp();
    registry.announce(ping('producer', 1));
    registry.announce(ping('producer', 3, 'a'));
    registry.announce(ping('consumer', 5, 'a'));
    expect([picked(registry), picked(registry)]).toEqual([
      [3, 5],
      [3, 5],
    ]);
    registry.announce(ping('consumer', 7));
    expect(picked(registry)).toEqual([1, 7]);
    expect(picked(registry, { exclude: new Set(['10.0.0.1:3', '10.0.0.1:7']) })).toEqual([1, 5]);
  });

  test('takes instances that serve the model asked for, and any that fit where nobody is known to', () => {
    const { registry } = setUp();
    for (const [role, port, digest] of [
      ['producer', 1, 'a'],
      ['consumer', 3, 'a'],
      ['producer', 5, 'b'],
      ['consumer', 7, 'b'],
    ] as const) {
      registry.announce(ping(role, port, digest));
      registry.setModels(`10.0.0.1:${port}`, [`model-${digest}`]);
    }
    expect([picked(registry, { model: 'model-b' }), picked(registry, { model: 'model-b' })]).toEqual([
      [5, 7],
      [5, 7],
    ]);
    expect(picked(registry, { model: 'other' })).toEqual([1, 3]);
    // Nobody for a while, rather than one that says that there is no such model.
    expect(registry.pair({ model: 'model-b', exclude: new Set(['10.0.0.1:5']) })).toBe('producer');
    registry.drain('10.0.0.1:7', true);
    expect(registry.pair({ model: 'model-b' })).toBe('consumer');
  });

  test('an instance that refused a connection comes last until it pings, and serves when it is the only one', () => {
    const { clock, registry } = setUp();
    registry.announce(ping('producer', 1));
    registry.announce(ping('consumer', 3));
    registry.announce(ping('consumer', 5));
    registry.quarantine('10.0.0.1:3', 3_000);
    expect([picked(registry), picked(registry)]).toEqual([
      [1, 5],
      [1, 5],
    ]);
    registry.quarantine('10.0.0.1:5', 3_000);
    expect(picked(registry)).toEqual([1, 3]);
    clock.now += 3_001;
    // A dead or leaving instance pings no more: nobody is sent to it again before it expires.
    registry.announce(ping('consumer', 5));
    expect([picked(registry), picked(registry)]).toEqual([
      [1, 5],
      [1, 5],
    ]);
    registry.announce(ping('consumer', 3));
    expect(new Set([picked(registry), picked(registry)].map(String))).toEqual(new Set(['1,3', '1,5']));
  });
});

test('a producer that takes five times as long for a token as the others is let alone for half a minute', () => {
  const { clock, registry } = setUp();
  for (const port of [1, 3, 5]) registry.announce(ping('producer', port));
  registry.announce(ping('consumer', 7));
  const [slow, ...others] = registry.list('producer');
  const computed = (instance: Instance, ms: number) => registry.learn(instance, 2_000, ms);
  const producers = () => Array.from({ length: 9 }, () => (picked(registry) as number[])[0]);
  for (const one of others) computed(one, 200);
  // Four times as long is slow, and no reason to do without it.
  computed(slow!, 800);
  expect(new Set(producers())).toEqual(new Set([1, 3, 5]));
  for (let i = 0; i < 20; i++) computed(slow!, 2_000);
  expect(registry.standing(slow!)?.breaker.state).toBe('open');
  expect(new Set(producers())).toEqual(new Set([3, 5]));

  const pingAgain = () => {
    for (const port of [1, 3, 5]) registry.announce(ping('producer', port));
    registry.announce(ping('consumer', 7));
  };
  for (let at = 0; at < 30_000; at += TIMEOUT / 2) {
    clock.now += TIMEOUT / 2;
    pingAgain();
  }
  // One request tries it, and that it was slow before is not held against it.
  expect(registry.standing(slow!)?.breaker.state).toBe('half-open');
  expect(producers().filter((port) => port === 1)).toHaveLength(1);
  registry.standing(slow!)?.breaker.succeeded();
  computed(slow!, 220);
  expect(new Set(producers())).toEqual(new Set([1, 3, 5]));
});

test('two producers are no measure of each other: none of them is let alone for being slow', () => {
  const { registry } = setUp();
  for (const port of [1, 3]) registry.announce(ping('producer', port));
  const [slow, fast] = registry.list('producer');
  registry.learn(fast!, 2_000, 20);
  registry.learn(slow!, 2_000, 20_000);
  expect(registry.standing(slow!)?.breaker.state).toBe('closed');
});
