/**
 * The program behind scripts/goodput-results.sh: a pair and two undivided workers on the same two GPUs (or the host), the same load for
 * each. Failures are results, too.
 *
 *   run --model DIR --output FILE --seconds N      what fits into that time
 *   report DIR --out DIR --command LINE            a page of the *.goodput.json files in DIR
 */
import { readdirSync, writeFileSync } from 'node:fs';
import { Command, Option } from 'commander';
import { joinParts, readParts, writePage } from '../goodput/page.ts';
import { conclude } from '../measure/results.ts';
import { type Bypass, GoodputRun, PARTS, type RunOptions } from './goodput-run.ts';

interface RunCommand extends RunOptions {
  readonly output: string;
}

const list = (text: string) => text.split(',').filter((one) => one !== '');
const numbers = (text: string) => list(text).map(Number);
const bypassList = (text: string) =>
  list(text).map((one): Bypass => {
    const [chunk, waitMs, consumerChunk] = one.split(':').map(Number);
    return { chunk: chunk!, waitMs: waitMs!, consumerChunk: consumerChunk! };
  });
const program = new Command('goodput');
program
  .command('run')
  .requiredOption('--model <dir>')
  .option('--name <name>', 'name in the report (default: that of its directory)')
  .addOption(new Option('--device <device>').choices(['host', 'cuda']).default('cuda'))
  .requiredOption('--output <file>')
  .option('--seconds <n>', 'for all of it', Number, 460)
  .option('--only <list>', 'pair, undivided, turns', list, [...PARTS])
  .option(
    '--chunks <list>',
    '--max-num-batched-tokens of undivided workers, the likeliest best first',
    numbers,
  )
  .option('--pair-chunks <list>', 'the same of the pair', numbers)
  .option('--bypasses <list>', 'pairs with --bypass-wait, each chunk:ms:chunk of the consumer', bypassList)
  .option('--rates <list>', 'requests per second that are measured first', numbers)
  .option('--runs <n>', 'rates of a pair', Number)
  .option('--more-runs <n>', 'further rates of the best undivided workers', Number)
  .option('--ttft <ms>', 'limit on the time to first token', Number)
  .option('--itl <list>', "limits on a request's mean time per token, ms", numbers)
  .option('--small', 'few and short requests, to see that everything is in place')
  .option('--verbose', 'print every line of the workers')
  .action(run);
program
  .command('report <dir>')
  .requiredOption('--out <dir>')
  .requiredOption('--command <line>')
  .action((folder: string, { out, command }: { readonly out: string; readonly command: string }) => {
    const names = readdirSync(folder).filter((name) => name.endsWith('.goodput.json'));
    if (names.length === 0) throw new Error(`there is no result in ${folder}`);
    const result = joinParts(readParts(folder, names));
    conclude(`${writePage(result, out, command)}.md`, result.problems.length === 0);
  });
await program.parseAsync();

async function run(command: RunCommand): Promise<void> {
  const stop = new AbortController();
  const onSignal = () => stop.abort(new Error('stopped by a signal'));
  process.on('SIGINT', onSignal).on('SIGTERM', onSignal);
  const timer = setTimeout(() => stop.abort(new Error('no time is left')), command.seconds * 1_000);
  const bench = new GoodputRun(command, stop.signal);
  await bench.run();
  clearTimeout(timer);
  const result = await bench.result();
  writeFileSync(command.output, JSON.stringify(result, undefined, 1));
  for (const problem of result.problems) console.error(`FAILED ${problem}`);
  process.exit(result.problems.length === 0 ? 0 : 1); // whatever a system has left open
}
