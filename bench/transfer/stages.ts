/**
 * Where the time of a direct hand-over goes that is not the GPU's: one request at a time, stage by stage as both core threads see it, early
 * rounds beside late ones, as the code of the first is not compiled yet. On two GPUs, or on stand-ins (PD_STANDIN_WRITE_US=0).
 *
 *   node dist/bench/transfer/stages.js [--devices cuda:0,cuda:1] [--shape llama-3-8b] [--tokens 16] [--rounds 300] [--starts 1] [--pause MS]
 *                                        [--compute] [--paths kept,layers]
 *
 *   kept     WANT .. bound .. launched .. flag .. landed .. loaded    all of it was computed before
 *   layers   computed .. drawn .. landed .. loaded, beside it flag    asked for before; with --compute each layer takes its time on the GPU
 *
 * `GPU:` columns begin with the write that sets the flag, on the GPU's clock: its end, the flag as the consumer sees it, KV and token there.
 */
import { setTimeout as sleep } from 'node:timers/promises';
import { Command } from 'commander';
import { DEFAULT_TIMEOUTS } from '../../src/config/transfer-options.ts';
import { NO_PROGRESS } from '../measure/progress.ts';
import { percentile } from '../measure/statistics.ts';
import { plainTable } from '../measure/table.ts';
import { type BenchOptions, JobMaker, startPeers } from './bench.ts';
import type { Reply } from './messages.ts';
import { newIds, wantAndLoad } from './native.ts';
import type { Peer } from './peer.ts';
import { blocksOf, cacheBlocks, MODEL_NAMES, type ModelName, modelShape, tensorBytesOf } from './shape.ts';

interface StagesCommand {
  readonly devices: string;
  readonly shape: string;
  readonly tokens: string;
  readonly rounds: string;
  readonly starts: string;
  readonly pause: string;
  readonly compute?: true;
  readonly paths: string;
}

/** From one stage to another, ms. */
type Round = Readonly<Record<string, number>>;

/** Rounds, counted from 1, whose medians are shown. */
const SPANS = [
  [1, 1],
  [2, 5],
  [6, 20],
  [21, 60],
  [61, 200],
  [201, 1_000],
] as const;

const program = new Command('stages')
  .option('--devices <list>', 'of producer and consumer', 'cuda:0,cuda:1')
  .option('--shape <name>', MODEL_NAMES.join(', '), 'llama-3-8b')
  .option('--tokens <n>', 'of a prompt', '16')
  .option('--rounds <n>', 'of each path', '300')
  .option('--starts <n>', 'of both programs, each with so many rounds', '1')
  .option('--pause <ms>', 'between two requests', '0')
  .option('--compute', 'layers behind a stand-in for a prefill')
  .option('--paths <list>', 'kept, layers', 'kept,layers');
const {
  devices,
  shape,
  tokens,
  rounds,
  starts,
  pause,
  compute = false,
  paths,
} = program.parse().opts<StagesCommand>();
const [ofProducer = 'cuda:0', ofConsumer = 'cuda:1'] = devices.split(',');
await main(
  {
    devices: [ofProducer, ofConsumer],
    shape: modelShape(shape as ModelName),
    kvBufferSize: 64e6,
    memPoolSize: 64e6,
    ncclNumChannels: 8,
    timeouts: DEFAULT_TIMEOUTS,
    logLevel: 'warn',
    progress: NO_PROGRESS,
  },
  {
    tokens: Number(tokens),
    rounds: Number(rounds),
    starts: Number(starts),
    pauseMs: Number(pause),
    compute,
    paths: paths.split(','),
  },
);

interface Times {
  readonly tokens: number;
  readonly rounds: number;
  readonly starts: number;
  readonly pauseMs: number;
  readonly compute: boolean;
  readonly paths: readonly string[];
}

async function main(options: BenchOptions, times: Times): Promise<void> {
  for (const path of ['kept', 'layers'] as const) {
    if (!times.paths.includes(path)) continue;
    const all: Round[][] = [];
    for (let start = 0; start < times.starts; start++) all.push(await roundsOf(options, path, times));
    const names = Object.keys(all[0]?.[0] ?? {});
    const rows = SPANS.filter(([first]) => first <= times.rounds).map(([first, last]) => {
      const span = all.flatMap((took) => took.slice(first - 1, last));
      const cells = names.map((name) => quartiles(span.map((one) => one[name] ?? 0)));
      return [`${first} to ${Math.min(last, times.rounds)}`, ...cells];
    });
    console.log(`\n${path}, ${times.tokens} tokens: ms, lower quartile and median of ${times.starts} starts`);
    console.log(plainTable({ head: ['rounds', ...names], rows }));
  }
}

/** By new programs: what others have compiled is none of theirs. */
async function roundsOf(
  options: BenchOptions,
  path: 'kept' | 'layers',
  { tokens: count, rounds: most, pauseMs, compute }: Times,
): Promise<Round[]> {
  const { shape: kv } = options;
  const blocks = cacheBlocks(blocksOf(kv, count));
  const jobs = [new JobMaker('layer', kv).flat(1, blocks * tensorBytesOf(kv, kv.blockSize))];
  const [producer, consumer] = await startPeers(options, {
    producer: { device: 0, compute, jobs, end: { role: 'producer', transport: 'direct', blocks } },
    consumer: { device: 1, jobs, end: { role: 'consumer', transport: 'direct', blocks } },
  });
  const took: Seen[] = [];
  for (let round = 0; round < most; round++) {
    if (pauseMs > 0) await sleep(pauseMs);
    const ends = [producer!, consumer!] as const;
    took.push(await (path === 'kept' ? kept(ends, count) : layers(ends, count, compute)));
  }
  await Promise.all([producer!.quit(), consumer!.quit()]);
  return stamped(took);
}

function quartiles(values: readonly number[]): string {
  const ascending = [...values].sort((a, b) => a - b);
  return [25, 50].map((p) => percentile(ascending, p).toFixed(2)).join(' ');
}

interface Seen extends Round {
  /** On the GPU's clock. */
  readonly began: number;
  readonly ended: number;
  /** On the host's. */
  readonly seen: number;
  readonly at: number;
}

/** With times since the last write began: what both clocks say when the flag is seen soonest is taken for one moment. */
function stamped(rounds: readonly Seen[]): Round[] {
  const apart = Math.min(...rounds.map(({ seen, ended }) => seen - ended));
  return rounds.map(({ began, ended, seen, at, ...round }) => ({
    ...round,
    'GPU: write': ended - began,
    'GPU: KV known': seen - began - apart,
    'GPU: token known': at - began - apart,
  }));
}

function seenIn({ flags = [], at = 0 }: Reply): { began: number; ended: number; seen: number; at: number } {
  const { began = 0, ended = 0, seen = 0 } = flags[0] ?? {};
  return { began, ended, seen, at };
}

async function kept([producer, consumer]: readonly [Peer, Peer], count: number): Promise<Seen> {
  const ids = newIds(producer, consumer, 1);
  await producer.ask({ do: 'prefill', ids, tokens: count, compute: false, abandon: false });
  const [{ at: called = 0 }, loaded] = await wantAndLoad(consumer, ids, count, producer.address);
  const writer = stagesOf(await producer.ask({ do: 'timelines' }));
  const reader = stagesOf(await consumer.ask({ do: 'timelines' }));
  const { bound = 0, launched = 0, landed = 0 } = writer;
  const { asked = 0, flagged = 0 } = reader;
  const { at = 0 } = loaded;
  return {
    'call to asked': asked - called,
    'to bound': bound - asked,
    'to launched': launched - bound,
    'to flag': flagged - launched,
    'flag to loaded': at - flagged,
    '(launched to landed)': landed - launched,
    '(landed to loaded)': at - landed,
    'bound to loaded': at - bound,
    ...seenIn(loaded),
  };
}

async function layers(
  [producer, consumer]: readonly [Peer, Peer],
  count: number,
  compute: boolean,
): Promise<Seen> {
  const ids = newIds(producer, consumer, 1);
  const loading = wantAndLoad(consumer, ids, count, producer.address);
  // it may fail first
  loading.catch(() => undefined);
  await producer.ask({ do: 'asked', count: 1 });
  const prefill = { do: 'prefill', ids, tokens: count, compute, abandon: false } as const;
  const { at: computed = 0, sentAt: drawn = 0 } = await producer.ask(prefill);
  const [, loaded] = await loading;
  const { landed = 0 } = stagesOf(await producer.ask({ do: 'timelines' }));
  const { flagged = 0, loaded: told = 0 } = stagesOf(await consumer.ask({ do: 'timelines' }));
  const { at = 0 } = loaded;
  return {
    'computed to drawn': drawn - computed,
    'to landed': landed - drawn,
    'to told': told - landed,
    'to loaded': at - told,
    '(computed to flag)': flagged - computed,
    'computed to loaded': at - computed,
    ...seenIn(loaded),
  };
}

/** Of the latest request. */
function stagesOf({ timelines = [] }: Reply): Readonly<Record<string, number>> {
  return Object.fromEntries((timelines.at(-1)?.stages ?? []).map(({ stage, at }) => [stage, at]));
}
