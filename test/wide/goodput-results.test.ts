/** goodput-results.sh as people run it, with few and short requests on the host; and pd-bench goodput against a server that is there. */
import { execFile } from 'node:child_process';
import { readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import { expect, test } from 'vitest';
import type { GoodputResult } from '../../bench/goodput/page.ts';
import { startWorker } from '../support/cluster.ts';
import { tempDir } from '../support/temp-dir.ts';

const ROOT = fileURLToPath(new URL('../../', import.meta.url));
/** The build is there: all tests share it. */
const env = { ...process.env, PD_SKIP_BUILD: '1' };

function read(folder: string): {
  readonly result: GoodputResult;
  readonly page: string;
  readonly svg: string;
} {
  const file = (ending: string) =>
    readFileSync(
      join(folder, readdirSync(folder).find((name) => name.endsWith(`-goodput${ending}`))!),
      'utf8',
    );
  return { result: JSON.parse(file('.json')) as GoodputResult, page: file('.md'), svg: file('.svg') };
}

test('a pair and two undivided workers get the same load, and every request is accounted for', async () => {
  const out = await tempDir();
  const args = ['--device', 'host', '--small', '--out', out];
  const { stderr } = await promisify(execFile)(join(ROOT, 'scripts/goodput-results.sh'), args, { env }).catch(
    (error: Error & { stderr: string }) => error,
  );
  const { result, page, svg } = read(out);
  expect(result.problems, stderr).toEqual([]);
  expect(result.systems.map(({ name }) => name)).toEqual([
    'pair, chunk 512',
    'pair, chunk 512, bypass after 1 ms with chunk 64',
    'two undivided, chunk 64',
    'two undivided, chunk 128',
  ]);
  const counted = new Map<number, number>();
  for (const { rates } of result.systems) {
    expect(rates.length).toBeGreaterThan(0);
    for (const { asked, counted: requests, bounds, failures, otherLengths, ttftMs } of rates) {
      expect(failures).toEqual([]);
      expect(otherLengths).toBe(0);
      expect(ttftMs?.count).toBe(requests);
      expect(counted.get(asked) ?? requests).toBe(requests);
      counted.set(asked, requests);
      for (const { good, broke } of bounds) {
        expect(Object.values(broke).reduce((sum, misses) => sum + misses, good)).toBe(requests);
      }
    }
  }
  const turned = result.systems.flatMap(({ turns }) => turns ?? []);
  expect(turned).toHaveLength(2);
  for (const turns of turned) expect(turns).toMatchObject({ answered: 6, failures: [] });
  expect(page).toContain('## Every rate');
  expect(page).not.toContain(out);
  expect(svg).toContain('</svg>');
});

test('pd-bench goodput measures a server that is there, and says what one that is not lacks', async () => {
  const worker = await startWorker('both', undefined);
  try {
    const out = await tempDir();
    const load = ['--prompt-tokens', '40', '--output-tokens', '6', '--rates', '5', '--runs', '1'];
    const times = ['--window', '1s', '--lead', '200ms', '--slo-ttft', '60s', '--slo-itl', '60s'];
    const urls = ['--url', worker.url, '--name', 'here', '--url', 'http://127.0.0.1:9', '--name', 'gone'];
    const args = [join(ROOT, 'bin/pd-bench'), 'goodput', ...urls, ...load, ...times, '--out', out];
    await expect(promisify(execFile)(process.execPath, args, { env })).rejects.toMatchObject({ code: 1 });
    const { result, page } = read(out);
    expect(result.problems).toHaveLength(1);
    expect(result.problems[0]).toMatch(/^gone: .*ECONNREFUSED/);
    const [rate] = result.systems[0]!.rates;
    expect(rate!.bounds[0]!.good).toBe(rate!.counted);
    expect(page).toContain('| here |');
  } finally {
    await worker.program.stop();
  }
});
