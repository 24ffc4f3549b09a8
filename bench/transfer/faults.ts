/** kill -9 in mid-transfer: when the survivor notices and what it reports, and that it works with a peer that replaces the dead one. */
import { setTimeout as sleep } from 'node:timers/promises';
import { monotonicMs } from '../measure/machine.ts';
import {
  type BenchOptions,
  type CheckRow,
  JobMaker,
  messageOf,
  move,
  startPeer,
  startPeers,
} from './bench.ts';
import type { PagedJob } from './messages.ts';
import type { Ending, Peer } from './peer.ts';

export interface FaultSettings {
  /** Of one request. */
  readonly tokens: number;
  /** Of each wait of the engines, instead of the longer defaults. */
  readonly deadlineMs: number;
  /** Run time of the long kernel. */
  readonly kernelMs: number;
}

export const DEFAULT_FAULTS: FaultSettings = { tokens: 4_096, deadlineMs: 2_000, kernelMs: 4_000 };

/** Transfers run this long before a process is killed. */
const RUN_UP_MS = 300;
const WINDOW = 2;
/** A restarted peer works within this. The dead one may be remembered for a second or so. */
const SERVED_WITHIN_MS = 15_000;
const EXIT_WITHIN_MS = 5_000;
/** For answers and aborts after a deadline. */
const SLACK_MS = 3_000;

export async function faults(options: BenchOptions, settings: FaultSettings): Promise<CheckRow[]> {
  const before = await usedMemory(options);
  const rows: CheckRow[] = [];
  const parts = {
    'kill -9 of the consumer': () => killEnd(options, settings, 'consumer'),
    'kill -9 of the producer': () => killEnd(options, settings, 'producer'),
    'kill -9 of two consumers': () => killTwo(options, settings),
  };
  for (const [name, part] of Object.entries(parts)) {
    try {
      rows.push(...(await part()));
    } catch (error) {
      rows.push({ name, ok: false, value: messageOf(error) });
    }
  }
  rows.push(...(await memoryLeft(options, before)));
  options.progress.end();
  return rows;
}

function timeoutsOf({ deadlineMs }: FaultSettings) {
  return {
    connect: deadlineMs,
    answer: deadlineMs,
    pairInit: 10_000,
    transfer: deadlineMs,
    load: 2 * deadlineMs,
  };
}

function wants(options: BenchOptions, settings: FaultSettings, device: 0 | 1, port = 0) {
  const jobs = [new JobMaker('sample', options.shape).paged(settings.tokens)];
  const timeouts = timeoutsOf(settings);
  const kvBufferSize = Math.min(options.kvBufferSize, 8e9);
  // the long kernel is compiled on the GPU where it will run
  return {
    device,
    sendType: 'PUT_ASYNC' as const,
    jobs,
    timeouts,
    kvBufferSize,
    port,
    compute: device === 0,
  };
}

const END = {
  consumer: {
    name: 'kc',
    device: 1,
    survivor: 'the producer',
    served: 'the producer serves the restarted consumer',
  },
  producer: {
    name: 'kp',
    device: 0,
    survivor: 'the consumer',
    served: 'the consumer is served by the restarted producer',
  },
} as const;

/** kill -9 of one end in mid-transfer: the other notices, and works with the next one on the same address. */
async function killEnd(
  options: BenchOptions,
  settings: FaultSettings,
  end: keyof typeof END,
): Promise<CheckRow[]> {
  options.progress.say(`kill -9 of the ${end}`);
  const { name, device, survivor, served: text } = END[end];
  const jobs = new JobMaker(name, options.shape);
  const peers = await startPeers(options, {
    producer: wants(options, settings, 0),
    consumer: wants(options, settings, 1),
  });
  try {
    const [producer, consumer] = peers as [Peer, Peer];
    await move(producer, consumer, jobs.paged(settings.tokens));
    const { pumping, draining } = start(producer, consumer, jobs.paged(settings.tokens));
    await sleep(RUN_UP_MS);
    const victim = end === 'consumer' ? consumer : producer;
    const killed = monotonicMs();
    await victim.kill();
    const what = `kill -9 of the ${end} in mid-transfer: ${survivor}`;
    const noticed = await noticing(what, end === 'consumer' ? pumping : draining, killed, settings);
    const again = wants(options, settings, device, victim.address.port);
    const next = await startPeer(options, `${end}, restarted`, again);
    peers.push(next);
    const [from, to] = end === 'consumer' ? [producer, next] : [next, consumer];
    return [noticed, await served(text, from, to, jobs, settings)];
  } finally {
    await Promise.all(peers.map((peer) => (peer.alive ? peer.quit() : undefined)));
  }
}

/** Two consumers at once, while a long kernel runs on the producer's GPU: aborting a communicator waits for that kernel. */
async function killTwo(options: BenchOptions, settings: FaultSettings): Promise<CheckRow[]> {
  options.progress.say('kill -9 of two consumers at once');
  const onGpu = options.devices[0] !== 'host';
  const jobs = new JobMaker('k2', options.shape);
  const kernel = onGpu ? ` while a kernel of ${settings.kernelMs} ms runs on the producer's GPU` : '';
  const peers = await startPeers(options, {
    producer: wants(options, settings, 0),
    'consumer C': wants(options, settings, 1),
    'consumer D': wants(options, settings, 1),
  });
  try {
    const [producer, c, d] = peers as [Peer, Peer, Peer];
    for (const consumer of [c, d]) await move(producer, consumer, jobs.paged(settings.tokens));
    const flows = [c, d].map((consumer) => start(producer, consumer, jobs.paged(settings.tokens)));
    await sleep(RUN_UP_MS);
    if (onGpu) await producer.ask({ do: 'occupy', ms: settings.kernelMs });
    const killed = monotonicMs();
    await Promise.all([c.kill(), d.kill()]);
    const rows = await Promise.all(
      flows.map(({ pumping }, i) =>
        noticing(`kill -9 of two consumers at once${kernel}: pair ${i + 1}`, pumping, killed, settings),
      ),
    );
    const restarted = await startPeers(options, {
      'consumer C, restarted': wants(options, settings, 1, c.address.port),
      'consumer D, restarted': wants(options, settings, 1, d.address.port),
    });
    peers.push(...restarted);
    for (const consumer of restarted) {
      rows.push(await served(`the producer serves ${consumer.name}`, producer, consumer, jobs, settings));
    }
    // and once more, to exit in the middle of it
    const last = restarted.map((consumer) => start(producer, consumer, jobs.paged(settings.tokens)));
    await sleep(RUN_UP_MS);
    if (onGpu) await producer.ask({ do: 'occupy', ms: settings.kernelMs });
    await Promise.all(restarted.map((consumer) => consumer.kill()));
    const ending = await producer.quit();
    await Promise.allSettled(last.flatMap(({ pumping, draining }) => [pumping, draining]));
    rows.push(exited(`the producer, told to exit with both pairs stuck${kernel}`, ending));
    return rows;
  } finally {
    await Promise.all(peers.map((peer) => (peer.alive ? peer.quit() : undefined)));
  }
}

interface Flow {
  readonly pumping: Promise<unknown>;
  readonly draining: Promise<unknown>;
}

/** Transfers without a pause. Both promises fail when an end dies. */
function start(producer: Peer, consumer: Peer, job: PagedJob): Flow {
  const draining = consumer.ask({ do: 'drain', job, peer: producer.address, window: WINDOW });
  const pumping = producer.ask({ do: 'pump', job, peer: consumer.address, window: WINDOW });
  draining.catch(() => undefined);
  pumping.catch(() => undefined);
  return { pumping, draining };
}

async function noticing(
  name: string,
  failing: Promise<unknown>,
  killed: number,
  settings: FaultSettings,
): Promise<CheckRow> {
  const error = await failing.then(
    () => undefined,
    (reason: unknown) => messageOf(reason),
  );
  const ms = monotonicMs() - killed;
  const allowed = 2 * settings.deadlineMs + SLACK_MS;
  if (error === undefined) return { name, ok: false, value: 'did not notice' };
  return {
    name,
    ok: ms <= allowed,
    value: `noticed after ${ms.toFixed(0)} ms (allowed ${allowed}): ${error}`,
    data: { milliseconds: ms, allowed },
  };
}

/** Retried, as requests are: those in flight when the peer died may still fail. */
async function served(
  name: string,
  from: Peer,
  to: Peer,
  jobs: JobMaker,
  settings: FaultSettings,
): Promise<CheckRow> {
  const start = monotonicMs();
  const failures: string[] = [];
  while (monotonicMs() - start < SERVED_WITHIN_MS) {
    try {
      const { milliseconds } = await move(from, to, jobs.paged(settings.tokens), 2 * settings.deadlineMs);
      const ms = monotonicMs() - start;
      const tries =
        failures.length === 0 ? '' : ` on try ${failures.length + 1} (before: ${failures.at(-1)})`;
      return {
        name,
        ok: ms <= SERVED_WITHIN_MS,
        value: `after ${ms.toFixed(0)} ms${tries}, the request itself in ${milliseconds.toFixed(1)} ms, every byte right`,
        data: { milliseconds: ms, tries: failures.length + 1 },
      };
    } catch (error) {
      failures.push(messageOf(error));
      await sleep(100);
    }
  }
  return { name, ok: false, value: `not within ${SERVED_WITHIN_MS} ms: ${failures.at(-1)}` };
}

function exited(name: string, { milliseconds, code, signal }: Ending): CheckRow {
  return {
    name,
    ok: milliseconds < EXIT_WITHIN_MS,
    value: `exited after ${milliseconds.toFixed(0)} ms (${signal ?? `status ${code}`})`,
    data: { milliseconds, how: signal ?? `status ${code}` },
  };
}

/** Of both devices, as seen by a process that holds nothing else. Undefined on the host. */
async function usedMemory(options: BenchOptions): Promise<readonly number[] | undefined> {
  if (options.devices.includes('host')) return undefined;
  const jobs = [new JobMaker('probe', options.shape).flat(1, 256)];
  const used: number[] = [];
  for (const device of [0, 1] as const) {
    const peer = await startPeer(options, 'memory probe', { device, jobs });
    try {
      used.push((await peer.ask({ do: 'memory' })).deviceUsedBytes ?? 0);
    } finally {
      await peer.quit();
    }
  }
  return used;
}

async function memoryLeft(options: BenchOptions, before: readonly number[] | undefined): Promise<CheckRow[]> {
  if (!before) return [];
  const name = 'GPU memory in use afterwards, compared with before';
  try {
    const after = (await usedMemory(options)) ?? [];
    const more = after.map((bytes, i) => bytes - (before[i] ?? 0));
    return [
      {
        name,
        ok: more.every((bytes) => bytes <= 0),
        value: more
          .map((bytes, i) => `${options.devices[i]} ${bytes > 0 ? '+' : ''}${bytes} bytes`)
          .join(', '),
        data: { more0: more[0] ?? 0, more1: more[1] ?? 0 },
      },
    ];
  } catch (error) {
    return [{ name, ok: false, value: messageOf(error) }];
  }
}
