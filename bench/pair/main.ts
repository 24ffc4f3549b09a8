/**
 * Does a pair give the same answers as an undivided worker, and how much later? On two GPUs (or the host), with a real checkpoint.
 *
 *   check --model DIR --output FILE                 one model: all loads in all send types, then times to first token
 *   report DIR --out DIR --command LINE             a page from the *.pair.json files of `check` in DIR
 */
import { readdirSync, writeFileSync } from 'node:fs';
import { basename } from 'node:path';
import { Command, Option } from 'commander';
import { conclude } from '../measure/results.ts';
import { type Mode, problemsOf, readResults, writeReport } from './result.ts';
import { PairRun } from './run.ts';

interface CheckCommand {
  readonly model: string;
  readonly name?: string;
  readonly device: 'host' | 'cuda';
  readonly output: string;
  readonly sendTypes: readonly string[];
  readonly modes?: readonly Mode[];
  readonly times: boolean;
  readonly small?: true;
  readonly verbose?: true;
}

const list = (text: string) => text.split(',');
const program = new Command('pair');
program
  .command('check')
  .requiredOption('--model <dir>')
  .option('--name <name>', 'name in the report (default: that of its directory)')
  .addOption(new Option('--device <device>').choices(['host', 'cuda']).default('cuda'))
  .requiredOption('--output <file>')
  .option('--send-types <list>', 'native, and send types of the frozen wire, separated by commas', list, [
    'native',
    'PUT',
    'PUT_ASYNC',
    'GET',
  ])
  .option(
    '--modes <list>',
    'batch-invariant, usual (default: both; on the host, where they are one, usual)',
    list,
  )
  .option('--no-times')
  .option('--small', 'few and short requests, to see that everything is in place')
  .option('--verbose', 'print every line of the workers')
  .action(check);
program
  .command('report <dir>')
  .requiredOption('--out <dir>')
  .requiredOption('--command <line>')
  .action((folder: string, { out, command }: { readonly out: string; readonly command: string }) => {
    const names = readdirSync(folder).filter((name) => name.endsWith('.pair.json'));
    if (names.length === 0) throw new Error(`there is no result in ${folder}`);
    const results = readResults(folder, names);
    const ok = results.every((result) => problemsOf(result).length === 0);
    conclude(`${writeReport(results, out, command)}.md`, ok);
  });
await program.parseAsync();

async function check({ output, modes, ...options }: CheckCommand): Promise<void> {
  const run = new PairRun({
    ...options,
    name: options.name ?? basename(options.model),
    modes: modes ?? (options.device === 'cuda' ? ['batch-invariant', 'usual'] : ['usual']),
    small: options.small ?? false,
    say: (text) => console.log(text),
    ...(options.verbose && { onLine: (line: string) => console.error(line) }),
  });
  const result = await run.run();
  writeFileSync(output, JSON.stringify(result, undefined, 1));
  const problems = problemsOf(result);
  console.log(`${result.model}: ${problems.length === 0 ? 'all passed' : `${problems.length} FAILED`}`);
  process.exitCode = problems.length === 0 ? 0 : 1;
}
