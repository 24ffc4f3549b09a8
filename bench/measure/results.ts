/** What all results scripts leave: `<date>-<hardware>-<kind>.md` for people, with one heading, and JSON beside it for programs. */
import { mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import type { Environment, Machine } from './machine.ts';

const TAIL_LINES = 15;

export interface Results {
  /** Of the file's name: `transfer`, `wire`, `pair`, `serve`. */
  readonly kind: string;
  readonly title: string;
  /** `2026-11-21`. */
  readonly date: string;
  /** `2x-nvidia-h200`, `host`. */
  readonly hardware: string;
  /** List items on what it was measured on. */
  readonly machine: readonly string[];
  /** With which it can be repeated. */
  readonly command: string;
  /** Lines below the heading. */
  readonly body: readonly string[];
  /** For programs; absent: a page alone. */
  readonly json?: object;
}

/** Returns the paths without their ending. */
export function writeResults(results: Results, folder: string): string {
  const { kind, date, hardware, json } = results;
  mkdirSync(folder, { recursive: true });
  const base = join(folder, `${date}-${hardware}-${kind}`);
  if (json) writeFileSync(`${base}.json`, `${JSON.stringify(json, undefined, 1)}\n`);
  writeFileSync(`${base}.md`, renderResults(results));
  return base;
}

export function renderResults({ title, hardware, date, machine, command, body }: Results): string {
  return `${[
    `# ${title}, ${hardware}, ${date}`,
    '',
    ...(machine.length > 0 ? [...machine, ''] : []),
    `Command: \`${command}\``,
    '',
    ...body,
  ].join('\n')}\n`;
}

/** List items: GPUs and the link between them, processors, driver and libraries. `ours`: in front of libraries, where there are others. */
export function hardwareLines(machine: Machine, { gpus, link, libraries }: Environment, ours = ''): string[] {
  return [
    ...gpus.map((gpu) => `- ${gpu}`),
    ...(link ? [`- link: ${link}`] : []),
    `- ${machine.cores} x ${machine.cpu}, ${machine.memoryGib} GiB`,
    ...(machine.driver ? [`- NVIDIA driver ${machine.driver}`] : []),
    ...libraries.map((library) => `- ${ours}${library}`),
  ];
}

/** One line that it is right, or an item for each problem. */
export function problemLines(problems: readonly string[]): string[] {
  return problems.length === 0 ? ['All as it should be.'] : problems.map((problem) => `- FAILED: ${problem}`);
}

/** The last lines of what a program of a results script has said; empty where it left no log. */
export function logTail(path: string): string {
  try {
    return readFileSync(path, 'utf8').trimEnd().split('\n').slice(-TAIL_LINES).join('\n');
  } catch {
    return '';
  }
}

/** What a results script ends with, and its exit status: 1 where anything failed. */
export function conclude(text: string, ok: boolean): void {
  console.log(text);
  process.exitCode = ok ? 0 : 1;
}
