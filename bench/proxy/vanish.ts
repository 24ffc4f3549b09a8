/**
 * How much of a prompt is still computed after its client has gone away, and for how long: pd-launch with one producer and one consumer, and
 * clients that break off in the middle of a long prompt. The bound is one step of the producer: a chunk of `--max-num-batched-tokens`.
 *
 *   ./scripts/build.sh && node dist/bench/proxy/vanish.js [--rounds 10] [--prompt-tokens 1500] [--chunk 64]
 *   node dist/bench/proxy/vanish.js --device cuda --model DIR --prompt-tokens 60000 --chunk 8192      on two GPUs
 */
import { setTimeout as sleep } from 'node:timers/promises';
import { parseArgs } from 'node:util';
import { programFile } from '../../support/root.ts';
import { type Addresses, metricsOf } from '../../support/serving.ts';
import { monotonicMs, readMachine } from '../measure/machine.ts';
import { spreadOf } from '../measure/statistics.ts';
import { markdownTable } from '../measure/table.ts';
import { linesOf, startProgram, stopProgram } from './programs.ts';

const { values: options } = parseArgs({
  options: {
    rounds: { type: 'string', default: '10' },
    device: { type: 'string', default: 'host' },
    model: { type: 'string' },
    'prompt-tokens': { type: 'string', default: '1500' },
    chunk: { type: 'string', default: '64' },
  },
});

const length = Number(options['prompt-tokens']);
const chunk = Number(options.chunk);
/** Of a round. */
const ROUND_MS = 120_000;

interface Left {
  /** Tokens of the producer's steps that ended after the client had gone. */
  readonly tokens: number;
  /** Until the producer had nothing to do. */
  readonly ms: number;
}

const stepTokens = async (url: string) => (await metricsOf(url)).get('pd_step_tokens_total') ?? 0;

/** Undefined where the prompt was computed before the client could leave. */
async function round(seed: number, proxy: string, producer: string): Promise<Left | undefined> {
  const until = monotonicMs() + ROUND_MS;
  const before = await stepTokens(producer);
  // Ids that every vocabulary has, and no prefix that was there before.
  const prompt = Array.from(
    { length },
    (_, i) => 100 + ((Math.imul(seed * 7_919 + i, 0x9e3779b1) >>> 8) % 150),
  );
  const gone = new AbortController();
  const asked = fetch(`${proxy}/v1/completions`, {
    method: 'POST',
    headers: { 'content-type': 'application/json' },
    body: JSON.stringify({ prompt, max_tokens: 4, stream: true }),
    signal: gone.signal,
  }).then(
    (response) => response.text(),
    () => '',
  );
  // A different part of the prompt in each round.
  const wanted = before + ((1 + (seed % 5)) * length) / 8;
  while ((await stepTokens(producer)) < wanted && monotonicMs() < until);
  gone.abort();
  const begin = monotonicMs();
  const atLeave = await stepTokens(producer);
  if ((await asked) !== '' || atLeave - before >= length) return undefined;
  for (;;) {
    const metrics = await metricsOf(producer);
    const busy =
      (metrics.get('vllm:num_requests_running') ?? 0) + (metrics.get('vllm:num_requests_waiting') ?? 0);
    const ms = monotonicMs() - begin;
    if (busy === 0) return { tokens: (metrics.get('pd_step_tokens_total') ?? 0) - atLeave, ms };
    if (monotonicMs() > until)
      throw new Error(`the producer is busy ${ROUND_MS} ms after its client has gone`);
  }
}

const workerFlags = ['--max-num-batched-tokens', options.chunk];
const child = startProgram(programFile('pd-launch'), [
  ...['--json', '--free-ports', '--device', options.device, '--log-level', 'warn'],
  ...(options.model ? ['--model', options.model] : []),
  '--',
  ...workerFlags,
]);
const [line] = await linesOf(child, [/^(\{"proxy".*)$/]);
const { proxy, producers } = JSON.parse(line!) as Addresses;
const lefts: Left[] = [];
let early = 0;
for (let at = 0; at < Number(options.rounds); at++) {
  const left = await round(at, proxy.url, producers[0]!.url);
  if (left) lefts.push(left);
  else early++;
  await sleep(100);
}
await stopProgram(child);
const { cpu, cores } = await readMachine();
const device = options.device === 'host' ? `on the host (${cpu}, ${cores} cores)` : `on ${options.device}`;
process.stdout.write(
  `prompts of ${length} tokens in chunks of ${chunk}, ${device}: ${lefts.length} clients left in the middle` +
    `${early > 0 ? `, ${early} too late to count` : ''}\n\n`,
);
const rows = (['tokens', 'ms'] as const).map((what) => {
  const spread = spreadOf(lefts.map((left) => left[what]));
  const cells = spread ? [spread.p50, spread.p90, spread.max] : [];
  return [
    what === 'tokens' ? 'tokens computed after that' : 'ms until nothing was',
    ...cells.map((n) => n.toFixed(0)),
  ];
});
process.stdout.write(`${markdownTable({ head: ['', 'p50', 'p90', 'max'], rows })}\n`);
process.exit(0);
