/**
 * The runbook's four ways to hang, each on a system that is broken so: what pd-doctor finds through the proxy, and at each worker;
 * and of a peer that is stopped.
 * Deadlines are short by flags; nothing here is waited for but what those flags say.
 */
import { afterEach, expect, test } from 'vitest';
import {
  metricsOf,
  type ProxyHandle,
  startProxy,
  startWorker,
  type WorkerHandle,
} from '../../support/cluster.ts';
import { examine, failed, pdDoctor } from '../../support/doctor.ts';
import { NETNS_IPV4, NETNS_SILENT_IPV4, NetworkNamespace, netnsUnavailable } from '../../support/netns.ts';
import { rows, withTheOthers } from '../../support/rows.ts';

const unavailable = netnsUnavailable();
if (unavailable) console.warn(`doctor: what a silent firewall does is skipped: ${unavailable}`);

/** Only what is to pass: in scenarios 3 and 4 connections and KV must come first, however busy the machine. */
const SOON = ['--kv-load-timeout', '3s', '--pair-init-timeout', '1500ms', '--connect-timeout', '1s'];
const BY_FULL_ID = ['--kv-key', 'engine'];
const SOON_ENOUGH = ['--kv-load-timeout', '6s'];

interface Broken {
  readonly producer?: readonly string[];
  readonly consumer?: readonly string[];
  readonly loadFailure?: 'fail' | 'recompute';
  readonly deadlines?: readonly string[];
  readonly network?: NetworkNamespace;
  /** `frozen`, whose ways to hang these are, unless it is said otherwise. */
  readonly wire?: 'auto';
}

interface System {
  readonly proxy: ProxyHandle;
  readonly producer: WorkerHandle;
  readonly consumer: WorkerHandle;
  readonly prefix: readonly string[];
}

const undo: (() => Promise<unknown>)[] = [];
afterEach(async () => {
  for (const step of undo.splice(0).reverse()) await step();
});

async function start({
  producer = [],
  consumer = [],
  loadFailure = 'fail',
  deadlines = SOON,
  network,
  wire,
}: Broken): Promise<System> {
  const prefix = network?.prefix ?? [];
  const proxy = await startProxy([], prefix);
  undo.push(() => proxy.program.stop());
  const common = [
    ...['--num-blocks', '64', '--debug-state', '--wire', wire ?? 'frozen'],
    ...['--kv-load-failure', loadFailure, ...deadlines],
  ];
  const workers = await Promise.all([
    startWorker('producer', proxy, [...common, ...producer], prefix),
    startWorker('consumer', proxy, [...common, ...consumer], prefix),
  ]);
  undo.push(() => Promise.all(workers.map(({ program }) => program.stop())));
  for (const from of [0, 1]) {
    const seen = proxy.program.lines.findIndex(({ msg }) => msg.includes('🔵Add'));
    await proxy.program.line(/🔵Add/, 60_000, from === 0 ? 0 : seen + 1);
  }
  return { proxy, producer: workers[0]!, consumer: workers[1]!, prefix };
}

/** The fix of each failure, by way of asking. `producerFails`: its own deadline may come after the consumer's. */
async function diagnosed({ proxy, producer, consumer, prefix }: System, producerFails = true) {
  const system = await examine('proxy', proxy.url, prefix);
  if (producerFails) await producer.program.line(/could not be sent/, 60_000);
  const [sender, receiver] = await Promise.all(
    [producer, consumer].map(({ url }) => examine('worker', url, prefix)),
  );
  expect(system.status).toBe(1);
  const fixes = (found: typeof system) => failed(found).map(({ fix }) => fix!);
  return {
    system: fixes(system),
    sender: fixes(sender!),
    receiver: fixes(receiver!),
    findings: system.findings,
  };
}

const scenario = (number: number, fix: string) =>
  expect.stringMatching(new RegExp(`^hang scenario ${number} of the runbook, .*${fix}`));

if (!withTheOthers) {
  test('2: the consumer tells a wrong KV address', async () => {
    const system = await start({ consumer: ['--kv-announce-host', '127.0.0.2'] });
    const { consumer } = system;
    const { system: all, sender, receiver, findings } = await diagnosed(system);
    const address = consumer.kvAddress.replaceAll('.', '\\.');
    const expected = [scenario(2, `--kv-announce-host.*pd-doctor --peer ${address} `)];
    expect({ all, sender, receiver }).toEqual({ all: expected, sender: expected, receiver: expected });
    expect(findings).toContainEqual({
      level: 'warn',
      what: expect.stringMatching(/^consumer .* 127\.0\.0\.2:\d+: from here it refuses connections/),
      fix: expect.stringContaining('--kv-announce-host'),
    });
  });
}

if (withTheOthers) {
  test('1: the pair never opens: nobody takes data connections where the producer says', async () => {
    const system = await start({
      producer: ['--kv-host', '127.0.0.2', '--kv-announce-host', '127.0.0.1'],
      // The KV port that the producer tells is as wrong, and nobody is to find that first.
      consumer: ['--connect-timeout', '60s'],
    });
    const { system: all, sender, receiver } = await diagnosed(system);
    const expected = [scenario(1, '--kv-announce-host')];
    expect({ all, sender, receiver }).toEqual({ all: expected, sender: expected, receiver: expected });
  });

  test.skipIf(unavailable !== undefined)(
    '1: the pair never opens: a firewall drops what goes there',
    async () => {
      const network = await NetworkNamespace.create('dual');
      undo.push(() => network.close());
      const kv = ['--kv-host', NETNS_IPV4];
      const system = await start({
        network,
        producer: [...kv, '--kv-announce-host', NETNS_SILENT_IPV4],
        consumer: kv,
      });
      const { system: all, sender, receiver } = await diagnosed(system);
      const expected = [scenario(1, 'let all TCP pass')];
      expect({ all, sender, receiver }).toEqual({ all: expected, sender: expected, receiver: expected });
    },
  );
}

if (withTheOthers) {
  test('natively, a producer that tells a wrong KV address is told apart as 2', async () => {
    const system = await start({
      wire: 'auto',
      producer: ['--kv-host', '127.0.0.2', '--kv-announce-host', '127.0.0.1'],
    });
    const { system: all, receiver } = await diagnosed(system, false);
    const expected = [scenario(2, '--kv-announce-host')];
    expect({ all, receiver }).toEqual({ all: expected, receiver: expected });
  });

  test('natively, a wrong KV address of the consumer and no room to receive hinder nothing', async () => {
    const { proxy, consumer } = await start({
      wire: 'auto',
      consumer: ['--kv-announce-host', '127.0.0.2', '--kv-buffer-size', '0', '--mem-pool-size-gb', '0'],
    });
    expect(await pdDoctor('System', ['--proxy', proxy.url])).toMatchObject({ status: 0 });
    expect((await metricsOf(consumer)).get('pd_kv_loads_total{result="ok"}')).toBe(1);
  });

  test('4, wherever the wire is left to the workers', async () => {
    const system = await start({ wire: 'auto', producer: BY_FULL_ID, deadlines: SOON_ENOUGH });
    const { system: all } = await diagnosed(system, false);
    expect(all).toEqual([scenario(4, 'start the producer with --kv-key transfer')]);
  });
}

test.each(rows<'fail' | 'recompute'>(['fail'], ['recompute']))(
  '3: no memory for KV, and the consumer will %s',
  async (loadFailure) => {
    const system = await start({
      consumer: ['--kv-buffer-size', '0', '--mem-pool-size-gb', '0'],
      loadFailure,
      deadlines: [], // it is refused, and told so
    });
    const { system: all, sender, receiver } = await diagnosed(system);
    const expected = scenario(3, '--kv-buffer-size or --mem-pool-size-gb');
    if (loadFailure === 'recompute') expect(all.shift()).toMatch(/--kv-load-failure fail/);
    for (const fixes of [all, sender, receiver]) {
      expect(fixes.length).toBeGreaterThan(0);
      for (const fix of fixes) expect(fix).toEqual(expected);
    }
  },
);

test.skipIf(!withTheOthers).each<[string, Broken, string]>([
  ['the producer', { producer: BY_FULL_ID }, 'the producer'],
  ['the consumer', { consumer: BY_FULL_ID }, 'this consumer'],
  ['both', { producer: BY_FULL_ID, consumer: BY_FULL_ID }, 'this consumer'],
])('4: ids differ, KV is keyed by the full id by %s', async (_, broken, end) => {
  const system = await start({ ...broken, deadlines: SOON_ENOUGH });
  const { system: all, receiver } = await diagnosed(system, false);
  const expected = [scenario(4, `start ${end} with --kv-key transfer`)];
  expect({ all, receiver }).toEqual({ all: expected, receiver: expected });
});

if (!withTheOthers) {
  test('a peer whose process is stopped is there, and does not answer', async () => {
    const worker = await startWorker('consumer', undefined);
    undo.push(() => worker.program.stop('SIGKILL'));
    worker.program.child.kill('SIGSTOP');
    const { findings, status } = await pdDoctor('Peer', ['--peer', worker.kvAddress, '--timeout', '1s']);
    expect(status).toBe(1);
    expect(findings[0]).toMatchObject({
      level: 'fail',
      what: expect.stringContaining(`${worker.kvAddress} accepts connections but sends nothing`),
      fix: expect.stringContaining('kill -CONT'),
    });
  });
}
