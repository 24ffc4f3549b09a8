/**
 * Where the time of a direct hand-over goes that is not the GPU's: one request at a time, stage by stage as both core threads see it, early
 * rounds beside late ones, as the code of the first is not compiled yet. On two GPUs, or on stand-ins (PD_STANDIN_WRITE_US=0).
 *
 *   node dist/bench/transfer/stages.js [--devices cuda:0,cuda:1] [--shape llama-3-8b] [--tokens 16] [--rounds 300] [--starts 1] [--pause MS]
 *
 *   kept     WANT .. bound .. launched .. flag .. landed .. loaded    all of it was computed before
 *   layers   computed .. flag .. loaded                               asked for before
 */
import { setTimeout as sleep } from 'node:timers/promises';
import { Command } from 'commander';
import { DEFAULT_TIMEOUTS } from '../../src/config/transfer-options.ts';
import { NO_PROGRESS } from '../measure/progress.ts';
import { percentile } from '../measure/statistics.ts';
import { plainTable } from '../measure/table.ts';
import { type BenchOptions, JobMaker, startPeers } from './bench.ts';
import type { Reply } from './messages.ts';
import { newIds } from './native.ts';
import type { Peer } from './peer.ts';
import { blocksOf, cacheBlocks, MODEL_NAMES, type ModelName, modelShape, tensorBytesOf } from './shape.ts';

interface StagesCommand {
  readonly devices: string;
  readonly shape: string;
  readonly tokens: string;
  readonly rounds: string;
  readonly starts: string;
  readonly pause: string;
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
  .option('--pause <ms>', 'between two requests', '0');
const { devices, shape, tokens, rounds, starts, pause } = program.parse().opts<StagesCommand>();
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
  },
);

interface Times {
  readonly tokens: number;
  readonly rounds: number;
  readonly starts: number;
  readonly pauseMs: number;
}

async function main(options: BenchOptions, times: Times): Promise<void> {
  for (const path of ['kept', 'layers'] as const) {
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
  { tokens: count, rounds: most, pauseMs }: Times,
): Promise<Round[]> {
  const { shape: kv } = options;
  const blocks = cacheBlocks(blocksOf(kv, count));
  const jobs = [new JobMaker('layer', kv).flat(1, blocks * tensorBytesOf(kv, kv.blockSize))];
  const [producer, consumer] = await startPeers(options, {
    producer: { device: 0, jobs, end: { role: 'producer', transport: 'direct', blocks } },
    consumer: { device: 1, jobs, end: { role: 'consumer', transport: 'direct', blocks } },
  });
  const took: Round[] = [];
  for (let round = 0; round < most; round++) {
    if (pauseMs > 0) await sleep(pauseMs);
    took.push(await (path === 'kept' ? kept : layers)(producer!, consumer!, count));
  }
  await Promise.all([producer!.quit(), consumer!.quit()]);
  return took;
}

function quartiles(values: readonly number[]): string {
  const ascending = [...values].sort((a, b) => a - b);
  return [25, 50].map((p) => percentile(ascending, p).toFixed(2)).join(' ');
}

async function kept(producer: Peer, consumer: Peer, count: number): Promise<Round> {
  const ids = newIds(producer, consumer, 1);
  await producer.ask({ do: 'prefill', ids, tokens: count, compute: false, abandon: false });
  const { at: called = 0 } = await consumer.ask({ do: 'want', ids, tokens: count, peer: producer.address });
  const loaded = await consumer.ask({ do: 'loaded', ids });
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
  };
}

async function layers(producer: Peer, consumer: Peer, count: number): Promise<Round> {
  const ids = newIds(producer, consumer, 1);
  await consumer.ask({ do: 'want', ids, tokens: count, peer: producer.address });
  await producer.ask({ do: 'asked', count: 1 });
  const computed = await producer.ask({ do: 'prefill', ids, tokens: count, compute: false, abandon: false });
  const loaded = await consumer.ask({ do: 'loaded', ids });
  const { launched = 0, landed = 0 } = stagesOf(await producer.ask({ do: 'timelines' }));
  const { flagged = 0 } = stagesOf(await consumer.ask({ do: 'timelines' }));
  const { at = 0 } = loaded;
  return {
    'launched to computed': (computed.at ?? 0) - launched,
    'computed to landed': landed - (computed.at ?? 0),
    'landed to loaded': at - landed,
    'flag to loaded': at - flagged,
    'computed to loaded': at - (computed.at ?? 0),
  };
}

/** Of the latest request. */
function stagesOf({ timelines = [] }: Reply): Readonly<Record<string, number>> {
  return Object.fromEntries((timelines.at(-1)?.stages ?? []).map(({ stage, at }) => [stage, at]));
}
