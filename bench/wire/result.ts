/** What the two programs of wire-results.sh leave, put together: JSON for programs, Markdown for people, a few lines for the terminal. */
import { mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { type Environment, hardwareName, type Machine } from '../measure/machine.ts';
import { markdownTable } from '../measure/table.ts';
import type { WireRow } from './rig.ts';

/** Of the Python peer, `peer.json`. */
export interface PeerResult {
  readonly startedAt: string;
  readonly seconds: number;
  readonly devices: readonly string[];
  readonly machine: Machine;
  readonly environment: Environment;
  /** The Python peer's own words. */
  readonly peer: Readonly<Record<string, string>>;
  readonly rows: readonly WireRow[];
  /** It could not be run to its end. */
  readonly error?: string;
}

/** A row of experiment-matrix.sh --json. */
interface MatrixRow {
  readonly sendType: string;
  readonly kvKey: string;
  readonly randomized: boolean;
  readonly result: string;
  readonly expected: string;
  readonly asExpected: boolean;
  readonly bytes: number;
  readonly computed: number;
  readonly code: string;
  readonly milliseconds: number;
}

export interface WireResult {
  readonly date: string;
  readonly hardware: string;
  readonly command: string;
  readonly peer?: PeerResult;
  readonly matrix?: readonly MatrixRow[];
  readonly problems: readonly string[];
}

const TAIL_LINES = 15;

export const PARTS = ['peer', 'matrix'] as const;
type Part = (typeof PARTS)[number];

/** From a folder with `PART.json` and `PART.log`; a part that left nothing is a problem. */
export function readWireResult(folder: string, command: string, parts: readonly string[]): WireResult {
  const problems: string[] = [];
  const read = <T>(name: Part): T | undefined => {
    if (!parts.includes(name)) return undefined;
    try {
      return JSON.parse(readFileSync(join(folder, `${name}.json`), 'utf8')) as T;
    } catch {
      problems.push(`${name} left no result:\n${tailOf(join(folder, `${name}.log`))}`);
      return undefined;
    }
  };
  const peer = read<PeerResult>('peer');
  const matrix = read<readonly MatrixRow[]>('matrix');
  if (peer?.error !== undefined) problems.push(`the checks with the Python peer ended early: ${peer.error}`);
  for (const row of peer?.rows ?? []) {
    if (!row.ok && !row.observed) problems.push(`${row.group}: ${row.name}: ${row.value}`);
  }
  for (const row of matrix?.filter(({ asExpected }) => !asExpected) ?? []) {
    problems.push(
      `matrix: ${settingOf(row).join(', ')}: ${row.result}, ${row.expected} was expected ${row.code}`,
    );
  }
  return {
    date: (peer?.startedAt ?? new Date().toISOString()).slice(0, 10),
    hardware: hardwareName(peer?.environment.gpus ?? []),
    command,
    ...(peer && { peer }),
    ...(matrix && { matrix }),
    problems,
  };
}

/** Writes `<date>-<hardware>-wire.json` and `.md`; returns their paths without the ending. */
export function writeWireResult(result: WireResult, folder: string): string {
  mkdirSync(folder, { recursive: true });
  const base = join(folder, `${result.date}-${result.hardware}-wire`);
  writeFileSync(`${base}.json`, `${JSON.stringify(result, undefined, 1)}\n`);
  writeFileSync(`${base}.md`, renderWireResult(result));
  return base;
}

export function summarize({ peer, matrix, problems }: WireResult): string {
  const rows = peer?.rows ?? [];
  const required = rows.filter(({ observed }) => !observed);
  return [
    `Python peer: ${required.filter(({ ok }) => ok).length} of ${required.length} as it should be`,
    ...rows
      .filter(({ observed }) => observed)
      .map(({ name, ok, value }) => `  seen, ${name}: ${ok ? '' : 'no KV: '}${value.split('\n')[0]}`),
    ...(matrix
      ? [`matrix: ${matrix.filter(({ asExpected }) => asExpected).length} of ${matrix.length} as expected`]
      : []),
    ...problems.map((problem) => `FAILED ${problem}`),
    problems.length === 0 ? 'all as it should be' : `${problems.length} FAILED`,
  ].join('\n');
}

function renderWireResult(result: WireResult): string {
  const { peer, matrix, problems } = result;
  return `${[
    `# The wire beside another make, ${result.hardware}, ${result.date}`,
    '',
    ...(peer ? machineLines(peer) : []),
    `Command: \`${result.command}\``,
    '',
    problems.length === 0
      ? 'All as it should be.'
      : problems.map((problem) => `- FAILED: ${problem}`).join('\n'),
    '',
    ...(peer ? peerLines(peer) : []),
    ...(matrix ? matrixLines(matrix) : []),
  ].join('\n')}\n`;
}

function machineLines({ machine, environment, devices, peer }: PeerResult): string[] {
  const words = Object.entries(peer).map(([name, value]) => `${name} ${value}`);
  return [
    `- ours: ${machine.program}, Node ${machine.node}, ${devices[0]}`,
    `- theirs: support/peers/peer.py, ${devices[1]}: ${words.join(', ')}`,
    ...environment.gpus.map((gpu) => `- ${gpu}`),
    ...(environment.link ? [`- link: ${environment.link}`] : []),
    `- ${machine.cores} x ${machine.cpu}, ${machine.memoryGib} GiB`,
    ...(machine.driver ? [`- NVIDIA driver ${machine.driver}`] : []),
    ...environment.libraries.map((library) => `- ours: ${library}`),
    '',
  ];
}

function peerLines({ rows, seconds }: PeerResult): string[] {
  const groups = [...new Set(rows.map(({ group }) => group))];
  return [
    `## A Python peer: ${seconds} s`,
    '',
    'It has been written from docs/protocol.md, keeps one communicator per address and blocks in NCCL, as vLLM does. Every byte that came was',
    'compared with what both ends make of a seed. Times are of the whole check, with what it makes and compares.',
    '',
    ...groups.flatMap((group) => [
      `### ${group}`,
      '',
      markdownTable({
        head: ['', '', 'result', 'ms'],
        prose: true,
        rows: rows
          .filter((row) => row.group === group)
          .map((row) => [outcome(row), row.name, oneLine(row.value), String(row.milliseconds)]),
      }),
      '',
    ]),
  ];
}

function matrixLines(matrix: readonly MatrixRow[]): string[] {
  return [
    '## The experiment matrix',
    '',
    'Ids randomized or not, each way of sending, KV keyed by transfer id or by full id (docs/operations.md).',
    '',
    markdownTable({
      head: ['ids', 'send type', 'keyed by', 'result', 'KV', ''],
      prose: true,
      rows: matrix.map((row) => [
        ...settingOf(row),
        row.result,
        row.result === 'passes'
          ? `${row.bytes.toLocaleString('en')} bytes`
          : `${row.code} after ${Math.round(row.milliseconds)} ms`,
        row.asExpected ? 'as expected' : `NOT AS EXPECTED (${row.expected})`,
      ]),
    }),
  ];
}

function settingOf({ randomized, sendType, kvKey }: MatrixRow): [string, string, string] {
  return [
    randomized ? 'randomized' : 'not randomized',
    sendType,
    kvKey === 'engine' ? 'full id' : 'transfer id',
  ];
}

function outcome({ ok, observed }: WireRow): string {
  if (observed) return ok ? 'seen: KV' : 'seen: no KV';
  return ok ? 'ok' : 'FAILED';
}

/** Stacks and logs stay in the JSON. */
function oneLine(text: string): string {
  return (text.split('\n')[0] ?? '').replaceAll('|', '\\|').slice(0, 300);
}

function tailOf(path: string): string {
  try {
    return readFileSync(path, 'utf8').trimEnd().split('\n').slice(-TAIL_LINES).join('\n');
  } catch {
    return 'nor a word';
  }
}
