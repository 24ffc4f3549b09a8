/** One load through a pair: the tokens must be those of the undivided worker, and the metrics must show that KV moved. */

import { metricsOf } from '../../support/serving.ts';
import { inParallel } from '../measure/parallel.ts';
import type { Client } from './client.ts';
import { gapChanges, gapOf, type Parting, partingOf } from './compare.ts';
import { BLOCK_SIZE, type Effect, type Load, type LoadRequest } from './loads.ts';
import { NATIVE, type Pair, type Undivided } from './systems.ts';

export interface LoadCheck {
  readonly load: string;
  readonly requests: number;
  readonly promptTokens: number;
  readonly outputTokens: number;
  readonly kvBytes: number;
  /** Answers equal to the undivided worker's, to the last token. */
  readonly same: number;
  /** For the others: the undivided worker's own gap (in log-probability) between the two tokens at which they differ. */
  readonly gaps: readonly number[];
  /** Preempted sequences or tokens found in prefix caches, if that is what the load is for. */
  readonly effect?: string;
  /** Empty: right. */
  readonly problems: readonly string[];
}

export interface CheckOptions {
  readonly load: Load;
  readonly expected: readonly (readonly number[])[];
  readonly undivided: Undivided;
  readonly pair: Pair;
  /** How KV travels: `NATIVE`, or a send type of the frozen wire. */
  readonly way: string;
  /** Bytes of KV of one block, over all layers. */
  readonly blockBytes: number;
  /** A difference at a gap of at least this is wrong; undefined: every difference is. */
  readonly noise: number | undefined;
}

type Metrics = ReadonlyMap<string, number>;

export function answersOf(client: Client, { requests, width }: Load): Promise<(readonly number[])[]> {
  return inParallel(requests, width, (request) => client.tokens(request));
}

export async function checkLoad(options: CheckOptions): Promise<LoadCheck> {
  const { load, expected, undivided, pair, noise } = options;
  const before = [await metricsOf(pair.producerUrl), await metricsOf(pair.consumerUrl)] as const;
  const answers = await answersOf(pair.client, load);
  const after = [await metricsOf(pair.producerUrl), await metricsOf(pair.consumerUrl)] as const;
  const producer = riseOf(before[0], after[0]);
  const consumer = riseOf(before[1], after[1]);

  const problems = movedProblems(options, consumer);
  const effect = load.effect && effectOf(load.effect, producer, consumer);
  if (effect && !effect.seen) problems.push(`the load did not have its intended effect: ${effect.text}`);
  const partings = load.requests.flatMap((request, i) => partingOf(request, expected[i]!, answers[i]!) ?? []);
  const gaps: number[] = [];
  for (const parting of partings) {
    const gap = noise === undefined ? undefined : await gapAt(undivided.client, parting);
    if (gap !== undefined) gaps.push(gap);
    if (gap === undefined || noise === undefined || !(gap < noise)) problems.push(describe(parting, gap));
  }
  return {
    load: load.name,
    requests: load.requests.length,
    promptTokens: sum(load.requests.map(({ prompt }) => prompt.length)),
    outputTokens: sum(answers.map(({ length }) => length)),
    kvBytes: consumer('pd_kv_received_bytes_total'),
    same: load.requests.length - partings.length,
    gaps,
    ...(effect && { effect: effect.text }),
    problems,
  };
}

/**
 * The noise against which differences are judged: how much the gap between the two likeliest tokens changes when the same requests run
 * one, four and `widest` at a time, and when some of their positions are computed as the end of a prompt, as `gapAt` does. Returns the
 * largest change and the number of positions.
 */
export async function measureNoise(
  client: Client,
  requests: readonly LoadRequest[],
  widest: number,
): Promise<{ readonly noise: number; readonly positions: number }> {
  const run = (width: number) => inParallel(requests, width, (request) => client.generate(request));
  const alone = await run(1);
  const changes = [await run(4), await run(widest)].flatMap((others) =>
    others.flatMap((other, i) => gapChanges(alone[i]!, other)),
  );
  const forced = requests.flatMap((request, i) => {
    const { tokens, top } = alone[i]!;
    return [1, 2, 3].map((third) => {
      const at = Math.ceil((tokens.length * third) / 3) - 1;
      const prompt = [...request.prompt, ...tokens.slice(0, at)];
      const before = { tokens: tokens.slice(at, at + 1), top: top.slice(at, at + 1) };
      return { before, request: { ...request, prompt, maxTokens: 1 } };
    });
  });
  const found = await inParallel(forced, 4, async ({ before, request }) =>
    gapChanges(before, await client.generate(request)),
  );
  changes.push(...found.flat());
  return { noise: Math.max(0, ...changes), positions: changes.length };
}

/** Teacher-forced on what both generated before: the gap between the two tokens; undefined if one is not even among the likeliest. */
async function gapAt(
  client: Client,
  { request, before, undivided, pair }: Parting,
): Promise<number | undefined> {
  const prompt = [...request.prompt, ...before];
  const { top } = await client.generate({ ...request, prompt, maxTokens: 1 });
  const gap = top[0] && gapOf(top[0], undivided, pair);
  return gap === undefined ? undefined : Math.abs(gap);
}

function movedProblems({ load, blockBytes, way }: CheckOptions, rise: (name: string) => number): string[] {
  const { requests, effect } = load;
  const expected: [string, number][] = [
    ['pd_kv_loads_total{result="ok"}', requests.length],
    ['pd_kv_loads_total{result="recomputed"}', 0],
    ['pd_kv_loads_total{result="failed"}', 0],
  ];
  // A preempted sequence computes its prompt again.
  if (effect !== 'preemption') {
    // By the native hand-over the first token comes along; else each computes its last position.
    expected.push(['pd_prompt_tokens_total{source="computed"}', way === NATIVE ? 0 : requests.length]);
  }
  const blocks = sum(requests.map(({ prompt }) => Math.ceil(prompt.length / BLOCK_SIZE)));
  const bytes = 'pd_kv_received_bytes_total';
  if (effect !== 'prefix hits') expected.push([bytes, blocks * blockBytes]);
  // A block that a chunk of the prompt fills in part comes natively again, with the next one.
  const isRight = (name: string, value: number) =>
    name === bytes && way === NATIVE ? rise(name) >= value : rise(name) === value;
  return expected
    .filter(([name, value]) => !isRight(name, value))
    .map(([name, value]) => `the consumer's ${name} rose by ${rise(name)}, not ${value}`);
}

function effectOf(
  effect: Effect,
  producer: (name: string) => number,
  consumer: (name: string) => number,
): { readonly seen: boolean; readonly text: string } | undefined {
  switch (effect) {
    case 'chunks': // longer than a step by construction
      return undefined;
    case 'prefix hits': {
      const [at, there] = [producer, consumer].map((rise) => rise('vllm:prefix_cache_hits_total')) as [
        number,
        number,
      ];
      const text = `${at.toLocaleString('en')} tokens cached at the producer, ${there.toLocaleString('en')} at the consumer`;
      return { seen: at > 0 && there > 0, text };
    }
    case 'preemption': {
      const count = consumer('vllm:num_preemptions_total');
      return { seen: count > 0, text: `${count} preempted at the consumer` };
    }
  }
}

function describe({ request, before, undivided, pair }: Parting, gap: number | undefined): string {
  const worth = gap === undefined ? '' : `, ${gap.toFixed(4)} apart`;
  return `prompt of ${request.prompt.length} tokens, seed ${request.seed}: token ${before.length} is ${pair}, the undivided worker's ${undivided}${worth}`;
}

function riseOf(before: Metrics, after: Metrics): (name: string) => number {
  return (name) => (after.get(name) ?? Number.NaN) - (before.get(name) ?? Number.NaN);
}

function sum(values: readonly number[]): number {
  return values.reduce((total, value) => total + value, 0);
}
