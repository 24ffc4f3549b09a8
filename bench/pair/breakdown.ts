/**
 * Where the time to a first token goes: the same prompts, one at a time, to a proxy with a pair, and to a proxy whose consumer computes all
 * by itself (`--bypass-tokens`), as an undivided worker does. Each stage is what proxy and workers have stamped (observability/timelines.ts).
 */
import type { Timeline } from '../../src/observability/timelines.ts';
import { readConfig } from '../../support/kv-shape.ts';
import { type Environment, type Machine, readEnvironment, readMachine } from '../measure/machine.ts';
import { median } from '../measure/statistics.ts';
import type { Table } from '../measure/table.ts';
import { BLOCK_SIZE, timedPrompt } from './loads.ts';
import { NATIVE, type Pair, type SystemOptions, startPair } from './systems.ts';

export interface BreakdownOptions {
  readonly model: string;
  /** In the report. */
  readonly name: string;
  readonly device: 'host' | 'cuda';
  readonly tokens: number;
  readonly rounds: number;
  readonly warmUp: number;
  readonly onLine?: (line: string) => void;
}

/** When a stage was passed, milliseconds since the client sent its request: `proxy read`, `producer core drawn`, `client first token`. */
type Marks = ReadonlyMap<string, number>;

export interface BreakdownResult {
  readonly startedAt: string;
  readonly model: string;
  readonly promptTokens: number;
  readonly rounds: number;
  readonly machine: Machine;
  readonly environment: Environment;
  /** Medians over the rounds, of each stage since the client sent its request. */
  readonly undivided: Readonly<Record<string, number>>;
  readonly pair: Readonly<Record<string, number>>;
  readonly intervals: readonly Interval[];
}

/** Of the way from the request to the first token: the medians, milliseconds, add up to about the time to the first token. */
export interface Interval {
  readonly name: string;
  readonly undivided: number;
  readonly pair: number;
}

/** Of the answers: the first token is looked at, and that the next come. */
const OUTPUT_TOKENS = 8;
/** Of frozen peers, of which there is none. */
const KV_BUFFER = '64e6';
/** Of any prompt. */
const EVERY_TOKEN = 2 ** 20;

/** `worker`: who computes the prompt. Each ends with that stage, and begins where the one before has ended. */
const WAY: readonly (readonly [name: string, undivided: string, pair: string])[] = [
  ['client to proxy, body received', 'proxy received', 'proxy received'],
  ['proxy reads the body', 'proxy read', 'proxy read'],
  ['proxy sends it', 'proxy decode', 'proxy prefill'],
  ['proxy to worker, body received', 'consumer received', 'producer received'],
  ['worker reads the body', 'consumer parsed', 'producer parsed'],
  ['to its core thread', 'consumer core received', 'producer core received'],
  ['to its first step', 'consumer core step', 'producer core step'],
  ['computing, to the drawn token', 'consumer core drawn', 'producer core drawn'],
  ['hand-over, to the consumer', 'consumer core drawn', 'consumer core loaded'],
  ['posted to its main thread', 'consumer core posted', 'consumer core posted'],
  ['heard there', 'consumer heard', 'consumer heard'],
  ['written as an event', 'consumer written', 'consumer written'],
  ['relayed by the proxy', 'proxy relayed', 'proxy relayed'],
  ['to the client', 'client first token', 'client first token'],
];

export async function breakDown(options: BreakdownOptions): Promise<BreakdownResult> {
  const { model, name, device, tokens, rounds, warmUp } = options;
  const startedAt = new Date().toISOString();
  const config = readConfig(model);
  const output = OUTPUT_TOKENS + 1;
  const promptTokens = Math.min(tokens, (config['max_position_embeddings'] ?? tokens) - output);
  const systems = await startBoth(options, promptTokens + output);
  try {
    const sent: Record<'undivided' | 'pair', { readonly at: number; readonly firstMs: number }[]> = {
      undivided: [],
      pair: [],
    };
    for (let round = 0; round < warmUp + rounds; round++) {
      const prompt = timedPrompt(config['vocab_size'] ?? 0, promptTokens, round);
      for (const way of ['undivided', 'pair'] as const) {
        const { sentAt, firstMs } = await systems[way].client.timed(prompt, OUTPUT_TOKENS);
        sent[way].push({ at: sentAt, firstMs });
      }
    }
    const medians: Record<'undivided' | 'pair', Record<string, number>> = { undivided: {}, pair: {} };
    const marks: Record<'undivided' | 'pair', Marks[]> = { undivided: [], pair: [] };
    for (const way of ['undivided', 'pair'] as const) {
      marks[way] = await marksOf(systems[way], sent[way].slice(-rounds));
      medians[way] = mediansOf(marks[way]);
    }
    return {
      ...{ startedAt, model: name, promptTokens, rounds },
      machine: await readMachine(),
      environment: await readEnvironment(device),
      ...medians,
      intervals: WAY.map(([interval, undivided, pair], i) => ({
        name: interval,
        undivided: medianInterval(marks.undivided, WAY[i - 1]?.[1], undivided),
        pair: medianInterval(marks.pair, WAY[i - 1]?.[2], pair),
      })),
    };
  } finally {
    await Promise.all(Object.values(systems).map((system) => system.stop()));
  }
}

async function startBoth(
  { model, device, rounds, warmUp, onLine }: BreakdownOptions,
  length: number,
): Promise<{ readonly undivided: Pair; readonly pair: Pair }> {
  // Room for all of them, so that full caches do not distort the times.
  const blocks = Math.ceil(length / BLOCK_SIZE) * (warmUp + rounds + 4);
  const flags = ['--max-model-len', String(length), '--num-blocks', String(blocks)];
  flags.push('--block-size', String(BLOCK_SIZE), '--kv-buffer-size', KV_BUFFER);
  const system: SystemOptions = {
    ...{ device, model, flags: [...flags, '--log-format', 'json', '--debug-state'] },
    ...(onLine && { onLine }),
  };
  const env = { PD_DEBUG_STATE: 'true' };
  const alone = { ...env, PD_BYPASS_TOKENS: String(EVERY_TOKEN) };
  const undivided = await startPair({ ...system, env: alone }, NATIVE);
  try {
    return { undivided, pair: await startPair({ ...system, env }, NATIVE) };
  } catch (error) {
    await undivided.stop();
    throw error;
  }
}

interface DebugState {
  readonly recentRequests: readonly Timeline[];
  readonly core?: { readonly recentRequests?: readonly Timeline[] };
}

/** Of the last requests, of which `sent` says when the client sent them and had its first token. */
async function marksOf(
  { client, producerUrl, consumerUrl }: Pair,
  sent: readonly { readonly at: number; readonly firstMs: number }[],
): Promise<Marks[]> {
  const [proxy, producer, consumer] = await Promise.all(
    [client.url, producerUrl, consumerUrl].map(debugState),
  );
  const threads = [
    ['producer', producer!.recentRequests],
    ['producer core', producer!.core?.recentRequests ?? []],
    ['consumer', consumer!.recentRequests],
    ['consumer core', consumer!.core?.recentRequests ?? []],
  ] as const;
  return proxy!.recentRequests.slice(-sent.length).map((request, i) => {
    const { at: from, firstMs } = sent[i]!;
    const marks = new Map([['client first token', firstMs]]);
    const add = (who: string, { stages }: Timeline) => {
      const counts = new Map<string, number>();
      for (const { stage, at } of stages) {
        const count = (counts.get(stage) ?? 0) + 1;
        counts.set(stage, count);
        marks.set(`${who} ${stage}${count > 1 ? ` ${count}` : ''}`, at - from);
      }
    };
    add('proxy', request);
    for (const [who, timelines] of threads) {
      const timeline = timelines.find(({ id }) => id.includes(request.id));
      if (timeline) add(who, timeline);
    }
    return marks;
  });
}

async function debugState(url: string): Promise<DebugState> {
  const response = await fetch(`${url}/debug/state`, { signal: AbortSignal.timeout(30_000) });
  if (!response.ok) throw new Error(`${url}/debug/state answers ${response.status}`);
  return (await response.json()) as DebugState;
}

/** By time. */
function mediansOf(rounds: readonly Marks[]): Record<string, number> {
  const names = new Set(rounds.flatMap((marks) => [...marks.keys()]));
  const medians = [...names].map((name) => {
    const values = rounds.flatMap((marks) => marks.get(name) ?? []);
    return [name, median(values)] as const;
  });
  return Object.fromEntries(medians.sort(([, a], [, b]) => a - b));
}

/** Without `from`: since the request was sent. Throws where a stage was never stamped, which would be a hole in the way. */
function medianInterval(rounds: readonly Marks[], from: string | undefined, to: string): number {
  const values = rounds.flatMap((marks) => {
    const [begin, end] = [from === undefined ? 0 : marks.get(from), marks.get(to)];
    return begin === undefined || end === undefined ? [] : [end - begin];
  });
  if (values.length === 0) throw new Error(`no request has passed both ${from ?? 'the client'} and ${to}`);
  return median(values);
}

export function intervalTable({ intervals, undivided, pair }: BreakdownResult): Table {
  const row = (name: string, alone: number, both: number) => [name, ms(alone), ms(both), ms(both - alone)];
  const total = 'client first token';
  return {
    head: ['', 'undivided, ms', 'pair, ms', 'more, ms'],
    rows: [
      ...intervals.map(({ name, undivided: alone, pair: both }) => row(name, alone, both)),
      row('time to first token', undivided[total] ?? 0, pair[total] ?? 0),
    ],
  };
}

/** Each stage of both ways, by time. */
export function stageTable({ undivided, pair }: BreakdownResult): Table {
  const names = [...new Set([...Object.keys(pair), ...Object.keys(undivided)])];
  const cell = (value: number | undefined) => (value === undefined ? '' : ms(value));
  return {
    head: ['stage, ms since the client sent its request', 'undivided', 'pair'],
    rows: names.map((name) => [name, cell(undivided[name]), cell(pair[name])]),
  };
}

function ms(value: number): string {
  return value.toFixed(2);
}
