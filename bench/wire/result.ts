/** The results of wire-results.sh: JSON for programs, Markdown for people, a few lines for the terminal. */
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { type Environment, hardwareName, type Machine } from '../measure/machine.ts';
import { hardwareLines, logTail, problemLines, writeResults } from '../measure/results.ts';
import { markdownTable } from '../measure/table.ts';
import type { WireRow } from './rig.ts';

/** `peer.json`: the checks with the Python peer. */
export interface PeerResult {
  readonly startedAt: string;
  readonly seconds: number;
  readonly devices: readonly string[];
  readonly machine: Machine;
  readonly environment: Environment;
  /** What the Python peer reports about itself. */
  readonly peer: Readonly<Record<string, string>>;
  readonly rows: readonly WireRow[];
  /** Why the checks ended early. */
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

export const PARTS = ['peer', 'matrix'] as const;
type Part = (typeof PARTS)[number];

/** Reads `PART.json` and `PART.log` from a folder; a part without a result is a problem. */
export function readWireResult(folder: string, command: string, parts: readonly string[]): WireResult {
  const problems: string[] = [];
  const read = <T>(name: Part): T | undefined => {
    if (!parts.includes(name)) return undefined;
    try {
      return JSON.parse(readFileSync(join(folder, `${name}.json`), 'utf8')) as T;
    } catch {
      problems.push(`${name} left no result:\n${logTail(join(folder, `${name}.log`)) || 'no log either'}`);
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
      `matrix: ${settingOf(row).join(', ')}: ${row.result}, expected ${row.expected} ${row.code}`,
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
  const { date, hardware, command, peer, matrix, problems } = result;
  const results = {
    ...{
      kind: 'wire',
      title: 'Wire compatibility with a Python peer',
      date,
      hardware,
      command,
      json: result,
    },
    machine: peer ? machineLines(peer) : [],
    body: [
      ...problemLines(problems),
      '',
      ...(peer ? peerLines(peer) : []),
      ...(matrix ? matrixLines(matrix) : []),
    ],
  };
  return writeResults(results, folder);
}

export function summarize({ peer, matrix, problems }: WireResult): string {
  const rows = peer?.rows ?? [];
  const required = rows.filter(({ observed }) => !observed);
  return [
    `Python peer: ${required.filter(({ ok }) => ok).length} of ${required.length} passed`,
    ...rows
      .filter(({ observed }) => observed)
      .map(({ name, ok, value }) => `  observed, ${name}: ${ok ? '' : 'no KV: '}${value.split('\n')[0]}`),
    ...(matrix
      ? [`matrix: ${matrix.filter(({ asExpected }) => asExpected).length} of ${matrix.length} as expected`]
      : []),
    ...problems.map((problem) => `FAILED ${problem}`),
    problems.length === 0 ? 'all passed' : `${problems.length} FAILED`,
  ].join('\n');
}

function machineLines({ machine, environment, devices, peer }: PeerResult): string[] {
  const words = Object.entries(peer).map(([name, value]) => `${name} ${value}`);
  return [
    `- ours: ${machine.program}, Node ${machine.node}, ${devices[0]}`,
    `- theirs: support/peers/peer.py, ${devices[1]}: ${words.join(', ')}`,
    ...hardwareLines(machine, environment, 'ours: '),
  ];
}

function peerLines({ rows, seconds }: PeerResult): string[] {
  const groups = [...new Set(rows.map(({ group }) => group))];
  return [
    `## A Python peer: ${seconds} s`,
    '',
    'Written from docs/protocol.md, it keeps one communicator per address and blocks in NCCL, as vLLM does. Every byte that arrived was compared',
    'with what both ends generate from a seed. Times are of the whole check, including generating and comparing the data.',
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
    'Ids randomized or not, each send type, KV keyed by transfer id or by full id (docs/operations.md).',
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
  if (observed) return ok ? 'observed: KV' : 'observed: no KV';
  return ok ? 'ok' : 'FAILED';
}

/** Stacks and logs are in the JSON. */
function oneLine(text: string): string {
  return (text.split('\n')[0] ?? '').replaceAll('|', '\\|').slice(0, 300);
}
