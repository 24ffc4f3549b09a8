/** Results of `pd-bench goodput`: a page, its plot, and JSON beside them. */
import { readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { type Environment, hardwareName, type Machine } from '../measure/machine.ts';
import { hardwareLines, problemLines, writeResults } from '../measure/results.ts';
import type { Spread } from '../measure/statistics.ts';
import { markdownTable } from '../measure/table.ts';
import { type Bounds, BROKEN } from './bounds.ts';
import { type Line, plotSvg } from './plot.ts';
import type { RateOptions, RateResult } from './rate.ts';
import type { TurnsResult } from './turns.ts';

export type SystemKind = 'pair' | 'undivided' | 'server';

export interface SystemResult {
  /** `pair, chunk 8192`. */
  readonly name: string;
  readonly kind: SystemKind;
  /** What it was started with; for a server, its URL. */
  readonly about: string;
  readonly rates: readonly RateResult[];
  readonly turns?: TurnsResult;
  /** Until it served, seconds. */
  readonly startSeconds?: number;
}

export interface GoodputResult {
  readonly startedAt: string;
  readonly seconds: number;
  /** Of the server, as it names it. */
  readonly model: string;
  readonly device: 'host' | 'cuda' | 'server';
  readonly machine: Machine;
  readonly environment: Environment;
  readonly load: Pick<RateOptions, 'bounds' | 'phases' | 'promptTokens' | 'outputTokens' | 'seed'>;
  readonly systems: readonly SystemResult[];
  readonly problems: readonly string[];
  /** For want of time. */
  readonly leftOut: readonly string[];
}

export function readParts(folder: string, names: readonly string[]): GoodputResult[] {
  const results = names.map((name) => JSON.parse(readFileSync(join(folder, name), 'utf8')) as GoodputResult);
  return results.sort((a, b) => a.startedAt.localeCompare(b.startedAt));
}

/** Runs of one load at different times, as one: systems of one name are joined. */
export function joinParts(parts: readonly GoodputResult[]): GoodputResult {
  const systems = new Map<string, SystemResult>();
  for (const system of parts.flatMap((part) => part.systems)) {
    const known = systems.get(system.name);
    systems.set(
      system.name,
      known ? { ...known, ...system, rates: joined(known.rates, system.rates) } : system,
    );
  }
  return {
    ...parts[0]!,
    seconds: parts.reduce((sum, { seconds }) => sum + seconds, 0),
    systems: [...systems.values()],
    problems: parts.flatMap(({ problems }) => problems),
    leftOut: parts.flatMap(({ leftOut }) => leftOut),
  };
}

/** The later measurement of a rate stands. */
function joined(before: readonly RateResult[], after: readonly RateResult[]): RateResult[] {
  const again = new Set(after.map(({ asked }) => asked));
  return [...before.filter(({ asked }) => !again.has(asked)), ...after];
}

/** Writes `<date>-<hardware>-goodput.{md,json,svg}`; returns their path without the ending. */
export function writePage(result: GoodputResult, out: string, command: string): string {
  const { startedAt, device, machine, environment } = result;
  const date = startedAt.slice(0, 10);
  const hardware = device === 'cuda' ? hardwareName(environment.gpus) : device;
  const svg = plotOf(result);
  const base = writeResults(
    {
      ...{ kind: 'goodput', title: 'Good requests per second', date, hardware },
      machine: [`- ${machine.program}, Node ${machine.node}`, ...hardwareLines(machine, environment)],
      command,
      body: body(result, svg === undefined ? undefined : `${date}-${hardware}-goodput.svg`),
      json: { command, ...result },
    },
    out,
  );
  if (svg !== undefined) writeFileSync(`${base}.svg`, svg);
  return base;
}

function plotOf({ systems, load }: GoodputResult): string | undefined {
  const measured = systems.filter(({ rates }) => rates.length > 0);
  if (measured.length === 0) return undefined;
  const lines = measured.map(({ name, kind, rates }): Line => {
    const points = byRate(rates).map(({ asked, bounds }) => ({
      asked,
      good: bounds.map(({ goodPerSecond }) => goodPerSecond),
    }));
    return { name, points, ...(kind === 'pair' && { main: true }) };
  });
  return plotSvg('Good requests per second', boundNames(load.bounds), lines);
}

function boundNames({ ttftMs, itlMs }: Bounds): string[] {
  return itlMs.map((itl) => `first token in ${ttftMs} ms, ${itl} ms per token`);
}

function body(result: GoodputResult, plot: string | undefined): string[] {
  const { load, systems, problems, leftOut, seconds, model } = result;
  const { bounds, phases, promptTokens, outputTokens } = load;
  const measured = systems.filter(({ rates }) => rates.length > 0);
  const turned = systems.flatMap(({ name, turns }) => (turns ? [{ name, turns }] : []));
  return [
    `Model ${model}. Prompts of ${promptTokens.toLocaleString('en')} tokens, all different, answers of ${outputTokens}; Poisson arrivals that do not wait for answers, the same for every`,
    `system. Of each rate ${phases.windowMs / 1_000} s count; arrivals begin ${phases.leadMs / 1_000} s before and go on until the last counted request has ended (${phases.drainMs / 1_000} s at most; what`,
    'is unfinished then is cut off). A request is good if its first token came in time and if its mean time per output token after that kept the bound.',
    `All of it took ${Math.round(seconds)} s. Definitions: [benchmarks.md](../../docs/benchmarks.md#good-requests-per-second).`,
    '',
    ...(problems.length > 0 ? [...problemLines(problems), ''] : []),
    ...(leftOut.length > 0 ? [`Left out for want of time: ${leftOut.join('; ')}.`, ''] : []),
    ...(measured.length > 0 ? ['## Best of each system', '', bestTable(measured, bounds), ''] : []),
    ...bounds.itlMs.flatMap((_, i) => ratioLines(measured, bounds, i)),
    ...(plot ? ['', `![Good requests per second over the rate asked for](${plot})`, ''] : []),
    ...(measured.length > 0
      ? [
          '## Every rate',
          '',
          'Milliseconds. Misses are counted by the bound that was broken: first token / per token / both / failed.',
          '',
          ratesTable(measured, bounds),
          '',
          '## Long gaps between tokens',
          '',
          'Gaps of more than one and a half medians, as shares of all gaps. *Joining*: the first gap of a request. *Batch*: most of those who got a token at the',
          'same moment waited as long, and another request got its first token meanwhile, or none did. *Alone*: nobody else waited.',
          '',
          gapsTable(measured),
          '',
          '## The load generator',
          '',
          'How late it sent, and how late its timers fired, in milliseconds (the times above may be off by as much); CPU as a share of one core.',
          '',
          generatorTable(measured),
          '',
        ]
      : []),
    ...(turned.length > 0 ? ['## Conversations', '', ...turnsLines(turned)] : []),
    '## Systems',
    '',
    ...systems.map(({ name, about, startSeconds }) => {
      const took = startSeconds === undefined ? '' : `; served after ${startSeconds.toFixed(0)} s`;
      return `- ${name}: \`${about}\`${took}`;
    }),
  ];
}

export interface Best {
  readonly system: SystemResult;
  readonly rate: RateResult;
  readonly perSecond: number;
}

/** Of the bound `index`; undefined where nothing was measured. */
export function bestOf(systems: readonly SystemResult[], index: number): Best | undefined {
  let best: Best | undefined;
  for (const system of systems) {
    for (const rate of system.rates) {
      const perSecond = rate.bounds[index]!.goodPerSecond;
      if (!best || perSecond > best.perSecond) best = { system, rate, perSecond };
    }
  }
  return best;
}

function bestTable(systems: readonly SystemResult[], bounds: Bounds): string {
  return markdownTable({
    head: ['system', ...bounds.itlMs.flatMap((ms) => [`good/s at ${ms} ms`, 'asked/s'])],
    rows: systems.map((system) => [
      system.name,
      ...bounds.itlMs.flatMap((_, i) => {
        const best = bestOf([system], i);
        return best ? [best.perSecond.toFixed(2), String(best.rate.asked)] : ['-', '-'];
      }),
    ]),
  });
}

function ratioLines(systems: readonly SystemResult[], { itlMs }: Bounds, i: number): string[] {
  const pair = bestOf(
    systems.filter(({ kind }) => kind === 'pair'),
    i,
  );
  const undivided = bestOf(
    systems.filter(({ kind }) => kind === 'undivided'),
    i,
  );
  if (!pair || !undivided) return [];
  const ratio =
    undivided.perSecond === 0
      ? 'none of the undivided'
      : `${(pair.perSecond / undivided.perSecond).toFixed(2)} times`;
  return [
    `- **${itlMs[i]} ms per token: ${ratio}**: ${pair.perSecond.toFixed(2)} good requests/s (${pair.system.name}, ${pair.rate.asked} asked) and ${undivided.perSecond.toFixed(2)} (${undivided.system.name}, ${undivided.rate.asked} asked).`,
  ];
}

function byRate(rates: readonly RateResult[]): RateResult[] {
  return [...rates].sort((a, b) => a.asked - b.asked);
}

function eachRate(
  systems: readonly SystemResult[],
  row: (rate: RateResult, name: string) => readonly string[],
): (readonly string[])[] {
  return systems.flatMap(({ name, rates }) => byRate(rates).map((rate) => row(rate, name)));
}

function ratesTable(systems: readonly SystemResult[], bounds: Bounds): string {
  return markdownTable({
    head: [
      ...['system', 'asked/s', 'requests', 'most at once'],
      ...bounds.itlMs.flatMap((ms) => [`good/s at ${ms} ms`, 'missed']),
      ...['TTFT p50', 'p90', 'p99', 'inter-token p50', 'p90', 'p99', 'p99 / p50', 'per token p50', 'p99'],
    ],
    rows: eachRate(systems, (rate, name) => {
      const { ttftMs, itlMs, tpotMs } = rate;
      return [
        ...[name, String(rate.asked), String(rate.counted), String(rate.mostRunning)],
        ...rate.bounds.flatMap(({ goodPerSecond, broke }) => [
          goodPerSecond.toFixed(2),
          BROKEN.map((why) => broke[why]).join(' / '),
        ]),
        ...[ms(ttftMs?.p50, 0), ms(ttftMs?.p90, 0), ms(ttftMs?.p99, 0)],
        ...[
          ms(itlMs?.p50),
          ms(itlMs?.p90),
          ms(itlMs?.p99),
          itlMs && itlMs.p50 > 0 ? (itlMs.p99 / itlMs.p50).toFixed(2) : '-',
        ],
        ...[ms(tpotMs?.p50), ms(tpotMs?.p99)],
      ];
    }),
  });
}

function gapsTable(systems: readonly SystemResult[]): string {
  return markdownTable({
    head: [
      ...['system', 'asked/s', 'gaps', 'long beyond, ms', 'long', 'joining', 'batch, first token', 'batch'],
      ...['alone', 'mean of long, ms'],
    ],
    rows: eachRate(systems, ({ asked, longGaps }, name) => {
      if (!longGaps) return [name, String(asked), '-', '-', '-', '-', '-', '-', '-', '-'];
      const { gaps, beyondMs, joined: own, sharedWithFirstToken, shared, alone, meanMs } = longGaps;
      const kinds = [own + sharedWithFirstToken + shared + alone, own, sharedWithFirstToken, shared, alone];
      return [
        ...[name, String(asked), gaps.toLocaleString('en'), ms(beyondMs)],
        ...kinds.map((count) => `${((100 * count) / gaps).toFixed(2)} %`),
        ms(meanMs),
      ];
    }),
  });
}

function generatorTable(systems: readonly SystemResult[]): string {
  return markdownTable({
    head: ['system', 'asked/s', 'sent late p50', 'p99', 'max', 'timers late p50', 'p99', 'max', 'CPU'],
    rows: eachRate(systems, ({ asked, generator: { sentLateMs, timerLateMs, cpu } }, name) => [
      ...[name, String(asked), ms(sentLateMs?.p50), ms(sentLateMs?.p99), ms(sentLateMs?.max)],
      ...[ms(timerLateMs.p50), ms(timerLateMs.p99), ms(timerLateMs.max), `${(100 * cpu).toFixed(0)} %`],
    ]),
  });
}

function turnsLines(systems: readonly { readonly name: string; readonly turns: TurnsResult }[]): string[] {
  const { conversations, width, turns, first, more, outputTokens } = systems[0]!.turns;
  return [
    `${conversations} conversations, ${width} at a time, of ${turns} turns each: a first prompt of ${first.toLocaleString('en')} tokens, each further one the last prompt, its answer and new text,`,
    `${more.toLocaleString('en')} tokens longer in all; answers of ${outputTokens} tokens. Tokens per second are of prompts (cached or not) and answers.`,
    '',
    markdownTable({
      head: [
        ...[
          'system',
          'TTFT mean, ms',
          'by turn',
          'TTFT p99',
          'per token p50',
          'p99',
          'inter-token p50',
          'p99',
        ],
        ...['tokens/s', 'answered', 'failed'],
      ],
      rows: systems.map(({ name, turns: result }) => {
        const { ttftMs, tpotMs, itlMs, ttftByTurnMs, failures, answered } = result;
        return [
          ...[
            name,
            ms(ttftMs?.mean, 0),
            ttftByTurnMs.map((each) => each.toFixed(0)).join(' '),
            ms(ttftMs?.p99, 0),
          ],
          ...[ms(tpotMs?.p50), ms(tpotMs?.p99), ms(itlMs?.p50), ms(itlMs?.p99)],
          Math.round(result.tokensPerSecond).toLocaleString('en'),
          ...[String(answered), failures.map(({ code, count }) => `${count} x ${code}`).join(', ') || '0'],
        ];
      }),
    }),
    '',
  ];
}

/** One line for a terminal. */
export function rateLine(name: string, { asked, counted, bounds, ttftMs, itlMs }: RateResult): string {
  const good = bounds.map(({ itlMs: bound, goodPerSecond }) => `${goodPerSecond.toFixed(2)} (${bound} ms)`);
  return `${name}: ${asked} asked/s, ${counted} requests, good/s ${good.join(', ')}; TTFT ${spread(ttftMs)}, inter-token ${spread(itlMs)} ms`;
}

function spread(values: Spread | undefined): string {
  return values ? `${values.p50.toFixed(1)}/${values.p99.toFixed(1)}` : '-';
}

function ms(value: number | undefined, digits = 2): string {
  return value === undefined ? '-' : value.toFixed(digits);
}
