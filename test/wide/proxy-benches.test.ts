/** The benchmarks of placement and protection, in small: that they run, and that what they measure is there at all. */
import { execFile } from 'node:child_process';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import { expect, test } from 'vitest';

async function run(bench: string, ...args: string[]): Promise<string> {
  const file = fileURLToPath(new URL(`../../dist/bench/proxy/${bench}.js`, import.meta.url));
  const { stdout } = await promisify(execFile)(process.execPath, [file, ...args], { timeout: 280_000 });
  return stdout;
}

/** Cells of the row of a Markdown table that begins with `name`. */
const rowOf = (table: string, name: string) =>
  table
    .split('\n')
    .find((line) => line.startsWith(`| ${name} |`))!
    .split('|')
    .slice(2, -1)
    .map((cell) => cell.trim());

const SMALL = [
  '--conversations',
  '4',
  '--lanes',
  '4',
  '--turns',
  '3',
  '--system',
  '60',
  '--turn',
  '30',
  '--output',
  '4',
];

test.each([[[]], [['--real']]])(
  'policies %j: by tokens, turns find what was computed before',
  async (how) => {
    const rows = ['--row', 'kv-aware, by tokens', '--producers', '2', '--consumers', '2'];
    const table = await run('policies', ...SMALL, ...rows, ...how);
    const [prefillHits, decodeHits, , , , failed] = rowOf(table, 'kv-aware, by tokens');
    expect(failed).toBe('0');
    expect(Number.parseInt(prefillHits!, 10)).toBeGreaterThan(20);
    expect(Number.parseInt(decodeHits!, 10)).toBeGreaterThan(20);
  },
);

test('overload: what is too much is turned away', async () => {
  const { results } = JSON.parse(await run('overload', '--seconds', '1', '--json')) as {
    results: { limited: boolean; load: string; turnedAway: number; offered: number }[];
  };
  const most = results.filter(({ load }) => load.startsWith('3 x'));
  expect(most.map(({ limited, turnedAway }) => [limited, turnedAway > 0])).toEqual([
    [true, true],
    [false, false],
  ]);
});

test('vanish: a prompt whose client has gone is not computed to its end', async () => {
  const table = await run('vanish', '--rounds', '2');
  const [, , most] = rowOf(table, 'tokens computed after that');
  expect(Number(most)).toBeLessThan(1_000);
});
