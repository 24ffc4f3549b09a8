/**
 * The hand-over's results: what pd-bench has measured of it, and where the time to a first token goes (scripts/hand-over-results.sh).
 *
 *   breakdown --model DIR --output FILE             one model, one request at a time
 *   report DIR --out DIR --command LINE             a page from transfer.json and the *.breakdown.json files in DIR
 */
import { existsSync, readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { basename, join } from 'node:path';
import { Command, Option } from 'commander';
import { hardwareName } from '../measure/machine.ts';
import { conclude, hardwareLines, problemLines, writeResults } from '../measure/results.ts';
import { markdownTable, plainTable } from '../measure/table.ts';
import { renderTransfer } from '../transfer/report.ts';
import type { PartResult } from '../transfer/result.ts';
import { nativeTable } from '../transfer/tables.ts';
import { type BreakdownResult, breakDown, intervalTable, stageTable } from './breakdown.ts';

interface BreakdownCommand {
  readonly model: string;
  readonly name?: string;
  readonly device: 'host' | 'cuda';
  readonly tokens: string;
  readonly rounds: string;
  readonly warmUp: string;
  readonly output: string;
  readonly verbose?: true;
}

interface ReportCommand {
  readonly out: string;
  readonly command: string;
  readonly only?: string;
}

const program = new Command('hand-over');
program
  .command('breakdown')
  .requiredOption('--model <dir>')
  .option('--name <name>', 'name in the report (default: that of its directory)')
  .addOption(new Option('--device <device>').choices(['host', 'cuda']).default('cuda'))
  .option('--tokens <n>', 'of a prompt', '2016')
  .option('--rounds <n>', 'requests to each system that count, at most 60', '40')
  .option('--warm-up <n>', 'before them', '20')
  .requiredOption('--output <file>')
  .option('--verbose', 'print every line of the workers')
  .action(async ({ name, tokens, rounds, warmUp, output, verbose, ...options }: BreakdownCommand) => {
    const result = await breakDown({
      ...options,
      name: name ?? basename(options.model),
      tokens: Number(tokens),
      rounds: Number(rounds),
      warmUp: Number(warmUp),
      ...(verbose && { onLine: (line: string) => console.error(line) }),
    });
    writeFileSync(output, JSON.stringify(result, undefined, 1));
    console.log(plainTable(intervalTable(result)));
  });
program
  .command('report <dir>')
  .requiredOption('--out <dir>')
  .requiredOption('--command <line>')
  .addOption(new Option('--only <part>', 'the other is not missing').choices(['transfer', 'first-token']))
  .action((folder: string, { out, command, only }: ReportCommand) => {
    const transfer = readJson<PartResult>(join(folder, 'transfer.json'));
    const breakdowns = readdirSync(folder)
      .filter((name) => name.endsWith('.breakdown.json'))
      .flatMap((name) => readJson<BreakdownResult>(join(folder, name)) ?? []);
    const missing = [
      ...(transfer?.transfer || only === 'first-token' ? [] : ['there are no transfers']),
      ...(breakdowns.length > 0 || only === 'transfer' ? [] : ['there is no breakdown']),
    ];
    report({ transfer, breakdowns, missing, out, command });
  });
await program.parseAsync();

/** Undefined where a step has left none, or half of one. */
function readJson<T>(file: string): T | undefined {
  try {
    return existsSync(file) ? (JSON.parse(readFileSync(file, 'utf8')) as T) : undefined;
  } catch {
    return undefined;
  }
}

interface Found {
  readonly transfer: PartResult | undefined;
  readonly breakdowns: readonly BreakdownResult[];
  readonly missing: readonly string[];
  readonly out: string;
  readonly command: string;
}

function report({ transfer: part, breakdowns, missing, out, command }: Found): void {
  const first = part ?? breakdowns[0];
  if (!first) throw new Error('there is no result');
  const problems = [...missing, ...(part && !part.ok ? [part.error ?? 'a row of the transfers'] : [])];
  const base = writeResults(
    {
      kind: 'hand-over',
      title: 'The hand-over between ours',
      date: first.startedAt.slice(0, 10),
      hardware: hardwareName(first.environment.gpus),
      machine: [`- ${first.machine.program}`, ...hardwareLines(first.machine, first.environment)],
      command,
      body: [
        ...problemLines(problems),
        ...breakdowns.flatMap(renderBreakdown),
        '',
        '## Transfers',
        '',
        ...(part?.transfer ? renderTransfer(part, part.transfer) : []),
      ],
      json: { command, transfer: part, breakdowns },
    },
    out,
  );
  const tables = [
    ...(part?.transfer ? [plainTable(nativeTable(part.transfer))] : []),
    ...breakdowns.map((one) => `${one.model}, ${one.promptTokens} tokens\n${plainTable(intervalTable(one))}`),
  ];
  const problem = problems.map((one) => `FAILED: ${one}\n`).join('');
  conclude(`${tables.join('\n\n')}\n\n${problem}${base}.md`, problems.length === 0);
}

function renderBreakdown(result: BreakdownResult): string[] {
  const { model, promptTokens, rounds } = result;
  return [
    '',
    `## First token: ${model}, ${promptTokens.toLocaleString('en')} tokens`,
    '',
    `One streamed request at a time, medians of ${rounds}. *Undivided*: behind a proxy of the same kind whose consumer computes every prompt itself`,
    '(`--bypass-tokens`). *Pair*: the native hand-over. Each line begins where the one above has ended.',
    '',
    markdownTable(intervalTable(result)),
    '',
    'All stages, as proxy and workers stamp them (`GET /debug/state`, `recentRequests`):',
    '',
    markdownTable(stageTable(result)),
  ];
}
