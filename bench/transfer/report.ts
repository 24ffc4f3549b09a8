/** All parts of one run as one document: JSON for programs, Markdown for people, and a few lines for the end of a script. */
import { readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { PdError } from '../../src/errors.ts';
import { hardwareName } from '../measure/machine.ts';
import { hardwareLines, logTail, writeResults } from '../measure/results.ts';
import { markdownTable, plainTable } from '../measure/table.ts';
import type { PartResult } from './result.ts';
import { ceilingTable, checkTable, ms, nativeTable, slowerThanVllm, transferTable } from './tables.ts';
import type { TransferResult } from './transfer.ts';

/** A step of the script that is not a part of pd-bench, or a part that left no result. */
export interface StepResult {
  readonly step: string;
  readonly status: number;
  readonly seconds: number;
  /** Last lines of its output. */
  readonly tail: string;
}

export interface Report {
  readonly date: string;
  readonly hardware: string;
  readonly command: string;
  readonly parts: readonly PartResult[];
  readonly steps: readonly StepResult[];
}

const SUMMARY_WIDTH = 240;
/** Exit status of `timeout`. */
const TIMED_OUT = 124;

/** Reads `<name>.json` (results) and `<name>.step` (`status seconds`) with `<name>.log` from a directory. */
export function readReport(folder: string, command: string): Report {
  const files = readdirSync(folder).sort();
  const parts = files
    .filter((file) => file.endsWith('.json'))
    .flatMap((file) => {
      try {
        return [JSON.parse(readFileSync(join(folder, file), 'utf8')) as PartResult];
      } catch {
        return []; // truncated: its step shows why
      }
    })
    .sort((a, b) => a.startedAt.localeCompare(b.startedAt));
  const steps = files
    .filter((file) => file.endsWith('.step'))
    .map((file) => stepOf(folder, file.slice(0, -'.step'.length)));
  if (parts.length + steps.length === 0) {
    throw new PdError('CONFIG_INVALID', `${folder} contains no results (*.json, *.step)`);
  }
  return {
    date: (parts[0]?.startedAt ?? new Date().toISOString()).slice(0, 10),
    hardware: hardwareOf(parts),
    command,
    parts,
    steps,
  };
}

/** Writes `<date>-<hardware>-transfer.json` and `.md`; returns their path without the extension. */
export function writeReport(report: Report, folder: string): string {
  const { date, hardware, command, parts, steps } = report;
  const [first] = parts;
  const results = {
    ...{ kind: 'transfer', title: 'KV transfer', date, hardware, command, json: report },
    machine: first ? machineLines(first) : [],
    body: [...parts.flatMap(renderPart), ...renderSteps(steps)],
  };
  return writeResults(results, folder);
}

export function isSound({ parts, steps }: Report): boolean {
  return parts.every((part) => part.ok) && steps.every((step) => step.status === 0);
}

/** At most thirty lines. */
export function renderSummary(report: Report): string {
  const lines: string[] = [];
  for (const part of report.parts) {
    if (part.transfer) {
      if (part.transfer.native) lines.push(plainTable(nativeTable(part.transfer)));
      const { head, rows } = transferTable(part, part.transfer);
      lines.push(plainTable({ head, rows: rows.filter((row) => row[1] === 'paged' || row[4] === 'FAILED') }));
      const slower = slowerThanVllm(part);
      for (const row of slower) {
        lines.push(
          `slower than vLLM: ${row.sendType}, ${row.source}, ${row.tokens} tokens: ${ms(row.bestMs)}`,
        );
      }
    }
    for (const row of part.rows ?? [])
      lines.push(shortened(`${row.ok ? 'ok    ' : 'FAILED'} ${row.name}: ${row.value}`));
    if (part.error) lines.push(shortened(`FAILED ${part.part}: ${part.error}`));
  }
  for (const step of report.steps) {
    if (step.status !== 0) lines.push(`${step.step}: ${outcome(step)} after ${step.seconds} s`);
  }
  const bad =
    report.parts.filter((part) => !part.ok).length + report.steps.filter((step) => step.status !== 0).length;
  lines.push(bad === 0 ? 'all passed' : `${bad} parts or steps FAILED`);
  return lines.join('\n');
}

function machineLines({ machine, environment, devices, clock }: PartResult): string[] {
  return [
    `- ${machine.program}, Node ${machine.node}; ${devices.join(' to ')}`,
    ...hardwareLines(machine, environment),
    `- clock: CLOCK_MONOTONIC of one machine; a peer's reading is within ${clock.withinMs.toFixed(3)} ms of ours`,
  ];
}

function renderPart(part: PartResult): string[] {
  const lines = [
    `## ${part.part}: ${part.ok ? 'ok' : 'FAILED'}`,
    '',
    `\`${part.command}\`, ${part.seconds} s`,
    '',
  ];
  if (part.error) lines.push(part.error, '');
  if (part.transfer) lines.push(...renderTransfer(part, part.transfer));
  if (part.rows) lines.push(markdownTable(checkTable(part.rows)), '');
  return lines;
}

/** Tables of both wires, with what their columns mean, and the ceilings. */
export function renderTransfer(part: PartResult, transfer: TransferResult): string[] {
  const { rounds, warmUp } = transfer.settings;
  return [
    ...(transfer.native ? renderNative(transfer) : []),
    markdownTable(ceilingTable(transfer, part.devices.includes('host'))),
    '',
    ...transfer.ceilingErrors.map((error) => `Ceilings: ${error}`),
    ...(transfer.rows.length > 0
      ? [
          `The frozen wire, engine to engine: from the first send on the producer to the last tensor usable on the consumer; best and median of ${rounds} consecutive rounds after ${2 * warmUp + rounds} warm-up rounds, and 40 small ones at the start.`,
          '`paged`: random blocks gathered and scattered; `flat`: dense tensors. GB/s and its fraction of the grouped raw send are of the best round.',
          'Every byte of every round was compared.',
          '',
          markdownTable(transferTable(part, transfer)),
          '',
        ]
      : []),
    ...transfer.rows.flatMap(({ error, sendType, source, tokens }) =>
      error === undefined ? [] : [`- ${sendType}, ${source}, ${tokens} tokens: ${error}`],
    ),
  ];
}

function renderNative(transfer: TransferResult): string[] {
  const { rounds, warmUp } = transfer.settings;
  return [
    `The native hand-over, connector to connector between two processes: ${rounds} rounds after ${warmUp}, and 40 small ones at the start. A round ends when the consumer's core`,
    'thread has the KV of all its requests in place and knows it, with the first token. `kept`: computed before it is asked for; from WANT bound,',
    "which is the first launch. `layers`: asked for before; each layer is written behind its event, and the time runs from the last layer's, as the",
    "producer's core thread sees it fire. *From the call*: from the consumer's connector being told to load, WANT's way and in `layers` the",
    'prompt included. *Step keeps*: a step that nobody has asked for takes so much of the time of one that is handed over. *decode*: the',
    "consumer's GPU reads memory all the time, as in decoding. *GPU: write*: from the begin of the write that sets the flag, on the GPU's clock, which in",
    '`layers` is when the last layer was computed, to its end; *KV known*: until the core thread sees the flag; *token known*: until it has the first token too. That clock is set by the soonest look at a flag of the row. After each row one more round goes into other bytes, and all of it is compared.',
    '',
    markdownTable(nativeTable(transfer)),
    '',
    ...(transfer.native ?? []).flatMap(({ error, transport, path, tokens, inFlight }) =>
      error === undefined ? [] : [`- ${transport}, ${path}, ${inFlight} x ${tokens} tokens: ${error}`],
    ),
  ];
}

function renderSteps(steps: readonly StepResult[]): string[] {
  if (steps.length === 0) return [];
  const rows = steps.map((step) => [step.step, outcome(step), `${step.seconds} s`]);
  const failed = steps.filter((step) => step.status !== 0);
  return [
    '## Steps',
    '',
    markdownTable({ head: ['step', 'outcome', 'time'], rows, prose: true }),
    '',
    ...failed.flatMap((step) => [`${step.step}:`, '', '```', step.tail, '```', '']),
  ];
}

function shortened(text: string): string {
  return text.length <= SUMMARY_WIDTH ? text : `${text.slice(0, SUMMARY_WIDTH - 3)}...`;
}

function outcome({ status }: StepResult): string {
  if (status === 0) return 'ok';
  return status === TIMED_OUT ? 'FAILED: timed out' : `FAILED, status ${status}`;
}

function stepOf(folder: string, step: string): StepResult {
  const [status = '1', seconds = '0'] = readFileSync(join(folder, `${step}.step`), 'utf8')
    .trim()
    .split(/\s+/);
  const tail = logTail(join(folder, `${step}.log`));
  return { step, status: Number(status), seconds: Number(seconds), tail };
}

function hardwareOf(parts: readonly PartResult[]): string {
  return hardwareName(parts.find((part) => part.environment.gpus.length > 0)?.environment.gpus ?? []);
}
