/** The result of `check` for one model, and the page for several. */
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { type Environment, hardwareName, type Machine } from '../measure/machine.ts';
import { hardwareLines, problemLines, writeResults } from '../measure/results.ts';
import { markdownTable } from '../measure/table.ts';
import type { LoadCheck } from './checks.ts';
import { EXTRA_MS, extraMs, type FirstTokenTimes } from './times.ts';

export type Mode = 'batch-invariant' | 'usual';

export interface PairCheck extends LoadCheck {
  readonly mode: Mode;
  readonly sendType: string;
}

export interface PairResult {
  readonly startedAt: string;
  readonly seconds: number;
  readonly model: string;
  readonly device: 'host' | 'cuda';
  readonly small: boolean;
  readonly machine: Machine;
  readonly environment: Environment;
  readonly flags: Readonly<Record<Mode, readonly string[]>>;
  readonly noise?: { readonly noise: number; readonly positions: number };
  readonly checks: readonly PairCheck[];
  readonly times: readonly FirstTokenTimes[];
  /** What ended a part early. */
  readonly errors: readonly string[];
}

export function problemsOf({ checks, times, errors, device, small }: PairResult): string[] {
  // A limit for GPUs only: on a host the two workers share its cores.
  const timed = device === 'cuda' && !small ? times : [];
  return [
    ...errors,
    ...checks.flatMap(({ mode, sendType, load, problems }) =>
      problems.map((problem) => `${mode}, ${sendType}, ${load}: ${problem}`),
    ),
    ...timed
      .filter((time) => extraMs(time) > EXTRA_MS)
      .map((time) => `${time.sendType}: the first token takes a step and ${ms(extraMs(time))} ms longer`),
  ];
}

/** Reads the files `names` of `folder`. */
export function readResults(folder: string, names: readonly string[]): PairResult[] {
  return names.map((name) => JSON.parse(readFileSync(join(folder, name), 'utf8')) as PairResult);
}

/** Writes `<date>-<hardware>-pair.md` and `.json`; returns their paths without the ending. */
export function writeReport(results: readonly PairResult[], out: string, command: string): string {
  const { startedAt, device, machine, environment } = results[0]!;
  const page = {
    ...{ kind: 'pair', title: 'A pair compared with an undivided worker', date: startedAt.slice(0, 10) },
    hardware: device === 'host' ? 'host' : hardwareName(environment.gpus),
    machine: [`- ${machine.program}, Node ${machine.node}`, ...hardwareLines(machine, environment)],
    command,
    body: [
      'The same requests, as token ids, go to an undivided worker and to a proxy with a producer and a consumer. Consumers run with',
      '`--kv-load-failure fail`. A load passes only if the metrics show one KV load per request, none recomputed or failed, one computed prompt',
      'token per request (natively none; any after preemption), and the expected bytes of KV (except where prefix caches held some).',
      ...results.flatMap(modelLines),
    ],
    json: { command, results },
  };
  return writeResults(page, out);
}

function modelLines(result: PairResult): string[] {
  const { model, checks, noise, times, seconds, flags } = result;
  const modes = [...new Set(checks.map(({ mode }) => mode))];
  return [
    '',
    `## ${model}: ${seconds} s`,
    '',
    ...problemLines(problemsOf(result)),
    ...modes.flatMap((mode) => [
      '',
      `### ${mode === 'usual' ? 'As usual' : '`--batch-invariant`: equal to the token'}`,
      '',
      `Workers: \`${flags[mode].join(' ')}\`.`,
      ...(mode === 'usual' && noise
        ? [
            '',
            'Greedy. Where two answers differ, the undivided worker, teacher-forced, must rate the two tokens closer together (in log-probability)',
            `than its own noise of ${noise.noise.toFixed(4)}: the largest change of the gap between the two likeliest tokens, at ${noise.positions.toLocaleString('en')}`,
            'positions of its answers, computed one, four and 32 at a time, or as the end of a prompt.',
          ]
        : []),
      '',
      checkTable(checks.filter((check) => check.mode === mode)),
    ]),
    ...(times.length > 0 ? ['', '### Time to first token', '', timeTable(times)] : []),
  ];
}

function checkTable(checks: readonly PairCheck[]): string {
  return markdownTable({
    prose: true,
    head: ['', 'send type', 'load', 'requests', 'prompt tokens', 'generated', 'KV moved', 'same tokens', ''],
    rows: checks.map((check) => [
      check.problems.length === 0 ? 'ok' : 'FAILED',
      check.sendType,
      check.load,
      String(check.requests),
      check.promptTokens.toLocaleString('en'),
      check.outputTokens.toLocaleString('en'),
      `${(check.kvBytes / 1e6).toLocaleString('en', { maximumFractionDigits: 1 })} MB`,
      `${check.same} of ${check.requests}`,
      [
        ...(check.effect === undefined ? [] : [check.effect]),
        ...(check.gaps.length > 0 ? [`gaps up to ${Math.max(...check.gaps).toFixed(4)}`] : []),
      ].join('; '),
    ]),
  });
}

function timeTable(times: readonly FirstTokenTimes[]): string {
  return markdownTable({
    head: [
      ...['prompt', 'send type', 'undivided, ms', 'pair, ms', 'one decode step, ms', 'more than a step, ms'],
      'decode step of the pair, ms',
    ],
    rows: times.map((time) => [
      `${time.promptTokens.toLocaleString('en')} tokens`,
      time.sendType,
      ms(time.undividedMs),
      ms(time.pairMs),
      ms(time.stepMs),
      ms(extraMs(time)),
      ms(time.pairStepMs),
    ]),
  });
}

function ms(value: number): string {
  return value.toFixed(2);
}
