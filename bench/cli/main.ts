/** pd-bench: measures KV transfers with every byte checked, the faults they survive, and what clients of a server see. */
import { readFileSync, writeFileSync } from 'node:fs';
import { Command, Option } from 'commander';
import { print } from '../../src/cli/run.ts';
import { addOptions, type OptionTable, resolveOptions, type ValuesOf } from '../../src/config/options.ts';
import { packageVersion } from '../../src/version.ts';
import { NO_PROGRESS, terminalProgress } from '../measure/progress.ts';
import { conclude } from '../measure/results.ts';
import { plainTable } from '../measure/table.ts';
import type { BenchOptions } from '../transfer/bench.ts';
import { exchange } from '../transfer/exchange.ts';
import { faults } from '../transfer/faults.ts';
import { interference } from '../transfer/interference.ts';
import { isSound, type Report, readReport, renderSummary, writeReport } from '../transfer/report.ts';
import { type Part, type PartResult, type PartWork, runPart } from '../transfer/result.ts';
import { soak } from '../transfer/soak.ts';
import { ceilingTable, checkLines, nativeTable, slowerThanVllm, transferTable } from '../transfer/tables.ts';
import { measureTransfer } from '../transfer/transfer.ts';
import { goodputCommand } from './goodput.ts';
import {
  benchOptions,
  EXCHANGE_OPTIONS,
  FAULTS_OPTIONS,
  INTERFERENCE_OPTIONS,
  nativeSettingsOf,
  SOAK_OPTIONS,
  TRANSFER_OPTIONS,
  tokensOf,
} from './options.ts';
import { serveCommand } from './serve.ts';

const EXAMPLES = `
Examples:
  pd-bench transfer                                  two GPUs, both wires, 16 to 16,384 tokens of Llama-3-8B KV
  pd-bench transfer --wire native --transport direct the product's hand-over by direct writes alone
  pd-bench transfer --device host --tokens 16,1024   two processes without a GPU
  pd-bench transfer --send-type PUT_ASYNC --source paged --json
  pd-bench serve --url http://localhost:10002 --concurrency 8
  pd-bench goodput --url http://localhost:10002 --slo-ttft 400ms --slo-itl 12ms,10ms
  scripts/gpu-results.sh                             every part, into bench/results/

Exit status 1 if a byte was wrong, a transfer failed, or a limit was exceeded.`;

type CommonValues = Parameters<typeof benchOptions>[0];

export function benchCommand(): Command {
  const program = new Command('pd-bench')
    .description(
      'Measures the transfer engine between two processes with every byte checked, injects faults, and load-tests servers.',
    )
    .version(packageVersion())
    .showHelpAfterError('(--help lists the options)')
    .addHelpText('after', EXAMPLES);

  part(
    program,
    'transfer',
    'time and GB/s of one request, compared with the raw transport and the device copy',
    TRANSFER_OPTIONS,
    (options, values) => async () => {
      const { wire: wires, sendType: sendTypes, source: sources, rounds, warmUp } = values;
      const tokens = tokensOf(values.tokens, options);
      const native = nativeSettingsOf(values, options);
      const settings = { wires, sendTypes, sources, tokens, rounds, warmUp, native };
      return { transfer: await measureTransfer(options, settings) };
    },
  );
  part(
    program,
    'exchange',
    'engines that send to each other at once, in both directions and crosswise',
    EXCHANGE_OPTIONS,
    (options, values) => async () => ({ rows: await exchange(options, values) }),
  );
  part(
    program,
    'soak',
    'many requests of mixed sizes: memory must not grow',
    SOAK_OPTIONS,
    (options, values) => async () => ({ rows: await soak(options, values) }),
  );
  part(
    program,
    'faults',
    'kill -9 of either end, and of two at once: the survivor serves again',
    FAULTS_OPTIONS,
    (options, { tokens, deadline, kernel }) =>
      async () => ({
        rows: await faults(options, { tokens, deadlineMs: deadline, kernelMs: kernel }),
      }),
  );
  part(
    program,
    'interference',
    'how much transfers slow down computation on the same GPU',
    INTERFERENCE_OPTIONS,
    (options, { loop, time, tokens, window }) =>
      async () => ({
        rows: await interference(options, { loops: loop, ms: time, tokens, window }),
      }),
  );

  program.addCommand(serveCommand());
  program.addCommand(goodputCommand());
  program
    .command('report')
    .description('combines the results in a directory into JSON, Markdown and a short table')
    .argument('<dir>', 'with the files of --output')
    .addOption(new Option('--out <dir>', 'where the report goes').default('bench/results'))
    .addOption(new Option('--command <text>', 'the command that produced the results').default('pd-bench'))
    .action((folder: string, { out, command }: { out: string; command: string }) => {
      const report = readReport(folder, command);
      const base = writeReport(report, out);
      conclude(`${renderSummary(report)}\n${base}.{json,md}`, isSound(report));
    });
  program
    .command('show')
    .description('prints the short table of an earlier report')
    .argument('<file>', 'its JSON')
    .action((file: string) => console.log(renderSummary(JSON.parse(readFileSync(file, 'utf8')) as Report)));
  return program;
}

function part<T extends OptionTable>(
  program: Command,
  name: Part,
  description: string,
  table: T,
  work: (options: BenchOptions, values: ValuesOf<T>) => PartWork,
): void {
  const command = addOptions(program.command(name), table)
    .description(description)
    .allowExcessArguments(false);
  command.action(async () => {
    const values = resolveOptions(table, command, process.env);
    const common = values as unknown as CommonValues;
    const progress = common.json ? NO_PROGRESS : terminalProgress();
    const options = benchOptions(common, progress);
    // where the results were written is of no interest to a reader
    const line = `pd-bench ${process.argv.slice(2).join(' ')}`.replace(/ --output[ =]\S+/, '');
    const result = await runPart(name, line, options, work(options, values));
    const json = `${JSON.stringify(result, undefined, 1)}\n`;
    if (common.output !== undefined) writeFileSync(common.output, json);
    await print(common.json ? json : render(result));
    process.exitCode = result.ok ? 0 : 1;
  });
}

function render(result: PartResult): string {
  const { machine, environment, devices, transfer, rows, error } = result;
  const lines = [
    `${machine.program}, Node ${machine.node}, ${machine.cores} x ${machine.cpu}; ${devices.join(' to ')}`,
    ...environment.gpus,
    ...(environment.libraries.length > 0 ? [environment.libraries.join('; ')] : []),
    '',
  ];
  if (transfer) {
    lines.push(plainTable(ceilingTable(transfer, devices.includes('host'))));
    lines.push(...transfer.ceilingErrors.map((text) => `ceilings: ${text}`), '');
    if (transfer.native) lines.push(plainTable(nativeTable(transfer)), '');
    for (const { error, transport, path, beside, inFlight, tokens } of transfer.native ?? []) {
      if (error !== undefined)
        lines.push(
          `FAILED ${transport}, ${path}, beside ${beside}, ${inFlight} x ${tokens} tokens: ${error}`,
        );
    }
    if (transfer.rows.length > 0) lines.push(plainTable(transferTable(result, transfer)), '');
    for (const row of transfer.rows) {
      if (row.error !== undefined)
        lines.push(`FAILED ${row.sendType}, ${row.source}, ${row.tokens} tokens: ${row.error}`);
    }
    for (const row of slowerThanVllm(result)) {
      lines.push(`slower than vLLM's engine: ${row.sendType}, ${row.source}, ${row.tokens} tokens`);
    }
  }
  if (rows) lines.push(checkLines(rows));
  if (error !== undefined) lines.push(`FAILED: ${error}`);
  lines.push(result.ok ? 'all passed' : 'FAILED');
  return `${lines.join('\n')}\n`;
}

export async function main(argv: readonly string[] = process.argv.slice(2)): Promise<void> {
  await benchCommand().parseAsync(argv, { from: 'user' });
}
