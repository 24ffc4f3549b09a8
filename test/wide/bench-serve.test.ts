import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import type { ServeResult } from '../../bench/serve/serve.ts';
import { metricsOf, startWorker, type WorkerHandle } from '../support/cluster.ts';
import { Program } from '../support/process.ts';
import { eventually } from '../support/requests.ts';

const SHORT = ['--prompt-tokens', '20-60', '--output-tokens', '4'];

/** What it prints and how it ends. */
async function bench(args: readonly string[], beforeEnd?: (program: Program) => Promise<unknown>) {
  const program = new Program('pd-bench', ['serve', ...args]);
  let out = '';
  program.child.stdout!.on('data', (chunk: Buffer) => {
    out += chunk;
  });
  const ended = new Promise<number | null>((resolve) => program.child.once('close', resolve));
  await beforeEnd?.(program);
  const code = await ended;
  return { code, out, tail: program.tail() };
}

describe('pd-bench serve on an undivided worker', () => {
  let worker: WorkerHandle;
  beforeAll(async () => {
    worker = await startWorker('both', undefined);
  });
  afterAll(() => worker.program.stop());

  test('prompts and answers have the lengths that were asked for, by the count of the worker', async () => {
    for (const endpoint of ['completions', 'chat']) {
      const { code, out, tail } = await bench([
        ...['--url', worker.url, '--endpoint', endpoint, '--num-requests', '8', '--concurrency', '4'],
        ...[...SHORT, '--slo-ttft', '60s', '--slo-itl', '60s', '--json', '--details', '--api-key', 'hush'],
      ]);
      expect(code, tail).toBe(0);
      expect(out).not.toContain('hush');
      const result = JSON.parse(out) as ServeResult & { readonly machine: { readonly cores: number } };
      expect(result).toMatchObject({ model: 'demo', sizedBy: 'tokenizer', interrupted: false });
      expect(result.machine.cores).toBeGreaterThan(0);
      expect(result.summary).toMatchObject({
        requests: { planned: 8, done: 8, failed: 0, interrupted: 0 },
        ...{ otherOutputLength: 0, otherPromptLength: 0, countedByServer: true, outputTokens: 32 },
      });
      expect(result.summary.goodput?.good).toBe(8 - result.summary.withoutText);
      expect(result.records).toHaveLength(8);
    }
  });

  test('a failure is told, and is the exit status', async () => {
    const { code, out } = await bench([
      ...['--url', worker.url, '--num-requests', '3', '--warm-up', '0', '--concurrency', '3', ...SHORT],
      ...['--extra-body', '{"top_p":7}'],
    ]);
    expect(code).toBe(1);
    expect(out).toContain('0 of 3 requests answered');
    expect(out).toMatch(/failed +3 x 400 REQUEST_INVALID: top_p/);
  });

  /** By the worker's own count, as the benchmark prints nothing where stderr is no terminal. */
  const answered = async () =>
    [...(await metricsOf(worker))].reduce(
      (sum, [name, value]) => sum + (name.startsWith('vllm:request_success_total') ? value : 0),
      0,
    );

  test('Ctrl-C prints what there is so far', async () => {
    const before = await answered();
    const { code, out, tail } = await bench(
      [
        ...['--url', worker.url, '--num-requests', '400', '--warm-up', '0', '--concurrency', '2'],
        // Long answers: all of them take far longer than any interrupt.
        ...['--prompt-tokens', '20', '--output-tokens', '200'],
      ],
      async (program) => {
        await eventually('five answers', 60_000, async () => (await answered()) >= before + 5);
        program.child.kill('SIGINT');
      },
    );
    expect(code, tail).toBe(130);
    expect(out).toMatch(/\d+ of 400 requests answered in .*interrupted/);
    expect(out).toContain('interrupted: these are the numbers up to then');
  });
});
