/** What `check` found of one model, and the page made of several. */
import { mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { type Environment, hardwareName, type Machine } from '../measure/machine.ts';
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
  /** What ended it early. */
  readonly errors: readonly string[];
}

export function problemsOf({ checks, times, errors, device, small }: PairResult): string[] {
  // A bound for GPUs: on a host the two share its cores.
  const timed = device === 'cuda' && !small ? times : [];
  return [
    ...errors,
    ...checks.flatMap(({ mode, sendType, load, problems }) =>
      problems.map((problem) => `${mode}, ${sendType}, ${load}: ${problem}`),
    ),
    ...timed
      .filter((time) => extraMs(time) > EXTRA_MS)
      .map(
        (time) => `${time.sendType}: the first token takes ${ms(extraMs(time))} ms more than a step longer`,
      ),
  ];
}

/** Writes `<date>-<hardware>-pair.md` and `.json` from every `*.pair.json` in `folder`; returns their path without the ending. */
export function writeReport(folder: string, names: readonly string[], out: string, command: string): string {
  const results = names.map((name) => JSON.parse(readFileSync(join(folder, name), 'utf8')) as PairResult);
  const { startedAt, device, environment } = results[0]!;
  const hardware = device === 'host' ? 'host' : hardwareName(environment.gpus);
  mkdirSync(out, { recursive: true });
  const base = join(out, `${startedAt.slice(0, 10)}-${hardware}-pair`);
  writeFileSync(`${base}.json`, `${JSON.stringify({ command, results }, undefined, 1)}\n`);
  writeFileSync(`${base}.md`, `${page(results, hardware, command)}\n`);
  return base;
}

function page(results: readonly PairResult[], hardware: string, command: string): string {
  const { startedAt, machine, environment } = results[0]!;
  return [
    `# A pair beside an undivided worker, ${hardware}, ${startedAt.slice(0, 10)}`,
    '',
    `- ${machine.program}, Node ${machine.node}; ${machine.cores} x ${machine.cpu}, ${machine.memoryGib} GiB`,
    ...environment.gpus.map((gpu) => `- ${gpu}`),
    ...(environment.link ? [`- link: ${environment.link}`] : []),
    ...(machine.driver ? [`- NVIDIA driver ${machine.driver}; ${environment.libraries.join(', ')}`] : []),
    '',
    `Command: \`${command}\``,
    '',
    'A proxy, a producer and a consumer, and one undivided worker, each with the same requests by token ids. Consumers run with',
    '`--kv-load-failure fail`; each load counts only where the metrics show one load per request, none recomputed or failed, one computed prompt',
    'token per request (but after preemption), and the bytes of the formula (but where prefix caches had some).',
    ...results.flatMap(modelLines),
  ].join('\n');
}

function modelLines(result: PairResult): string[] {
  const { model, checks, noise, times, seconds, flags } = result;
  const problems = problemsOf(result);
  const modes = [...new Set(checks.map(({ mode }) => mode))];
  return [
    '',
    `## ${model}: ${seconds} s`,
    '',
    problems.length === 0 ? 'All as it should be.' : problems.map((line) => `- FAILED: ${line}`).join('\n'),
    ...modes.flatMap((mode) => [
      '',
      `### ${mode === 'usual' ? 'As usual' : '`--batch-invariant`: equal to the token'}`,
      '',
      `Workers: \`${flags[mode].join(' ')}\`.`,
      ...(mode === 'usual' && noise
        ? [
            '',
            'Greedy. Where two answers part, the undivided worker, teacher-forced, must hold the two tokens closer together (in log-probability)',
            `than noise: ${noise.noise.toFixed(4)}, the largest change of the gap between the two likeliest tokens at ${noise.positions.toLocaleString('en')}`,
            'positions of its own answers, computed one, four and 32 at a time, or as the end of a prompt.',
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
