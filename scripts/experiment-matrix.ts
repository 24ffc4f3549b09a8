/**
 * Shows why vLLM's P/D hangs from 0.14 on, and what fixes it: {ids randomized, not} x {PUT, PUT_ASYNC, GET} x {KV
 * keyed by transfer id, by full id}. Each cell is one prompt through a producer and a consumer. It passes if the consumer's
 * metrics show that it loaded KV; it stops at the deadline if the awaited key never arrives, and names the near miss that did.
 */
import { randomBytes } from 'node:crypto';
import { Command, Option } from 'commander';
import { duration } from '../src/config/kinds.ts';
import { KV_KEYS } from '../src/config/transfer-options.ts';
import { SEND_TYPES } from '../src/wire/messages.ts';
import { createMatrixPair, type MatrixCell, type MatrixPair } from './experiment-pair.ts';

interface Options {
  readonly device: 'host' | 'cuda';
  readonly executor: 'host' | 'cuda';
  readonly deadline: string;
  readonly json?: true;
}

const options = new Command('experiment-matrix.sh')
  .description(
    'Sends one prompt through a producer and a consumer in each of twelve settings, and says which find their KV.',
  )
  .addOption(
    new Option('--device <device>', 'host, or cuda for a GPU each').choices(['host', 'cuda']).default('host'),
  )
  .addOption(new Option('--executor <executor>', 'what computes').choices(['host', 'cuda']).default('host'))
  .option('--deadline <time>', 'for KV that should not come', '2s')
  .option('--json', 'the cells as JSON')
  .allowExcessArguments(false)
  .parse()
  .opts<Options>();

const deadlineMs = duration(100).schema.parse(options.deadline);

/** Only randomized ids that are matched as a whole never meet. */
const shouldPass = ({ randomized, kvKey }: Pick<MatrixCell, 'randomized' | 'kvKey'>) =>
  !(randomized && kvKey === 'engine');

interface Row extends MatrixCell {
  readonly expected: 'passes' | 'stops';
  readonly asExpected: boolean;
}

/** A stop counts only if its error names the awaited key and what arrived instead. */
function rowOf(cell: MatrixCell): Row {
  const expected = shouldPass(cell) ? 'passes' : 'stops';
  const explained =
    cell.result === 'passes' ||
    (cell.code === 'KV_LOAD_TIMEOUT' &&
      cell.message.includes(`waited for ${cell.consumerId}#`) &&
      cell.message.includes(`held instead: ${cell.producerId}#`));
  return { ...cell, expected, asExpected: cell.result === expected && explained };
}

async function run(): Promise<Row[]> {
  const rows: Row[] = [];
  for (const sendType of SEND_TYPES) {
    // The pairs of a send type run together, as most of the time is spent on deadlines.
    const pairs = await Promise.all(
      KV_KEYS.map((kvKey) => createMatrixPair({ ...options, sendType, kvKey, deadlineMs })),
    );
    try {
      rows.push(...(await Promise.all(pairs.map(cellsOf))).flat());
    } finally {
      await Promise.all(pairs.map((pair) => pair.close()));
    }
  }
  return rows;
}

async function cellsOf(pair: MatrixPair): Promise<Row[]> {
  const rows: Row[] = [];
  for (const randomized of [false, true]) {
    const suffix = () => (randomized ? randomBytes(4).toString('hex') : undefined);
    const suffixes = [suffix(), suffix()] as const;
    const expected = shouldPass({ randomized, kvKey: pair.kvKey });
    rows.push(rowOf(await pair.request({ randomized, shouldPass: expected, suffixes })));
  }
  return rows;
}

const WIDTHS = [15, 11, 13, 8] as const;
const line = (...cells: readonly string[]) =>
  cells
    .map((text, i) => text.padEnd(WIDTHS[i] ?? 0))
    .join('')
    .trimEnd();

/** Shortens the part of ids made by the proxy, which is long and the same on both ends. */
const short = (text: string) => text.replace(/___prefill_addr_\S+?_[0-9a-f]{32}/g, '…');

function table(rows: readonly Row[]): string {
  const ordered = [false, true].flatMap((randomized) => rows.filter((row) => row.randomized === randomized));
  const lines = ordered.map((row) => {
    const keyed = row.kvKey === 'engine' ? 'full id' : 'transfer id';
    const found =
      row.result === 'passes'
        ? `KV moved: ${row.bytes.toLocaleString('en')} bytes, ${row.computed} token computed`
        : `${row.code} after ${Math.round(row.milliseconds)} ms`;
    const mark = row.asExpected ? '' : `   NOT AS EXPECTED (${row.expected}): ${short(row.message)}`;
    return (
      line(row.randomized ? 'randomized' : 'not randomized', row.sendType, keyed, row.result, found) + mark
    );
  });
  const stops = ordered
    .filter((row) => row.result === 'stops')
    .map((row) => `${row.sendType}: ${short(row.message)}`);
  return [
    line('ids', 'send type', 'keyed by', '', ''),
    ...lines,
    ...(stops.length > 0
      ? ['', 'What the consumer said where it stopped:', ...stops.map((text) => `  ${text}`)]
      : []),
    '',
    rows.every(({ asExpected }) => asExpected)
      ? `all ${rows.length} as expected: full ids match only where neither end randomizes, transfer ids always`
      : `${rows.filter(({ asExpected }) => !asExpected).length} of ${rows.length} not as expected`,
  ].join('\n');
}

const rows = await run();
process.stdout.write(`${options.json ? JSON.stringify(rows, undefined, 2) : table(rows)}\n`);
process.exitCode = rows.every(({ asExpected }) => asExpected) ? 0 : 1;
