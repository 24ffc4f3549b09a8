/**
 * Sampling on one GPU: every kernel against the host's sampler, and what it costs a decode step of an 8B model at batch 16 and 64.
 * `node dist/bench/gpu/sampling.js [DIR]`, which needs no checkpoint; DIR has room for 16 GB. Results as JSON to the file that PD_RESULTS names.
 */
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { GREEDY } from '../../src/model/sampler.ts';
import type { SamplingParams } from '../../src/scheduler/types.ts';
import { writeRandomModel } from '../../support/random-model.ts';
import { median } from '../measure/statistics.ts';
import { writeLargeModel } from './large-model.ts';
import { batch, makeExecutor, type Rig, range, sequence } from './model-rig.ts';
import { conclude, part, row } from './rows.ts';
import { checkInvariance, checkPromptLogprobs, checkSampling, randomMask } from './sampling-checks.ts';

const PROMPT = 512;
const STEPS = 40;
const PENALTIES = { repetitionPenalty: 1.1, presencePenalty: 0.2, frequencyPenalty: 0.2 };
const CUTS = { temperature: 0.8, topP: 0.9, topK: 50 };

interface Variant {
  readonly name: string;
  readonly params: Partial<SamplingParams>;
  readonly masked?: true;
  /** Of the plain step's time, at most. */
  readonly most?: number;
}

const VARIANTS: readonly Variant[] = [
  { name: 'plain', params: {} },
  { name: 'temperature', params: { temperature: 0.8 } },
  { name: 'top-k, top-p', params: CUTS, most: 1.15 },
  { name: 'penalties', params: PENALTIES, most: 1.15 },
  { name: 'logprobs 5', params: { logprobs: 5 }, most: 1.15 },
  { name: 'mask', params: {}, masked: true, most: 1.3 },
  {
    name: 'all',
    params: {
      ...CUTS,
      ...PENALTIES,
      minP: 0.01,
      logprobs: 5,
      logitBias: range(0, 20).map((i) => [i, 1]),
      badWords: [[5, 6], [7]],
    },
    masked: true,
    most: 1.3,
  },
];

/** Milliseconds of a decode step of `size` sequences, which go on from step to step. */
async function decode({ executor }: Rig, size: number, { params, masked }: Variant): Promise<number> {
  const vocab = executor.vocabSize;
  const token = () => Math.floor(Math.random() * vocab);
  const perSequence = Math.ceil((PROMPT + STEPS + 1) / 16);
  const masks = range(0, size).map(() => randomMask(vocab));
  const sequences = range(0, size).map((i) => {
    const tokens = Int32Array.from({ length: PROMPT + STEPS }, token);
    const history = {
      promptLength: PROMPT,
      length: PROMPT,
      tokens: (from: number, to: number) => tokens.slice(from, to),
    };
    return {
      history,
      tokens,
      blocks: range(i * perSequence, perSequence),
      // one object for as long as the request lives, as served
      params: { ...GREEDY, ...params, seed: i },
    };
  });
  for (const [i, { tokens, blocks }] of sequences.entries()) {
    await executor.forward(batch(sequence(`${i}`, tokens.slice(0, PROMPT), 0, blocks)), {});
  }
  const times: number[] = [];
  for (let step = 0; step < STEPS; step++) {
    const at = PROMPT + step;
    const scheduled = sequences.map(({ tokens, blocks, history, params: own }, i) => {
      history.length = at + 1;
      const sample = { params: own, outputPosition: step, index: 0, history };
      return { ...sequence(`${i}`, tokens.slice(at, at + 1), at, blocks), sample };
    });
    const began = performance.now();
    await executor.forward(
      batch(...scheduled),
      masked ? { mask: ({ sequenceId }) => masks[Number(sequenceId)]! } : {},
    );
    times.push(performance.now() - began);
  }
  return median(times.slice(4));
}

async function smallChecks(folder: string): Promise<void> {
  for (const batchInvariant of [false, true]) {
    const dir = mkdtempSync(join(folder, 'small-'));
    await writeRandomModel(dir, { architecture: 'LlamaForCausalLM', vocab: 5_003 });
    const rig = await makeExecutor(dir, {
      batchInvariant,
      numBlocks: 512,
      maxNumSeqs: 96,
      maxNumBatchedTokens: 4_096,
    });
    const name = batchInvariant ? 'small model, invariant' : 'small model';
    // more sequences than are counted at a time
    await checkSampling(name, rig.executor, 90, 6);
    if (batchInvariant) {
      await checkInvariance(name, rig.executor, 24);
      await checkPromptLogprobs(name, rig.executor);
    }
    rig.dispose();
  }
}

async function large(folder: string): Promise<unknown> {
  const dir = join(folder, 'large');
  mkdirSync(dir);
  let began = performance.now();
  const seconds = () => `${((performance.now() - began) / 1e3).toFixed(1)} s`;
  writeLargeModel(dir);
  row('8B written', seconds());
  began = performance.now();
  const rig = await makeExecutor(dir, {
    numBlocks: 4_096,
    maxNumSeqs: 64,
    maxNumBatchedTokens: 2_048,
    maxModelLen: 4_096,
  });
  row('8B ready', seconds());
  const results: Record<string, number> = {};
  for (const size of [16, 64]) {
    let plain = Number.NaN;
    for (const variant of VARIANTS) {
      const time = await decode(rig, size, variant);
      if (variant.name === 'plain') plain = time;
      const { most = Number.POSITIVE_INFINITY } = variant;
      results[`${variant.name} x ${size}`] = time;
      row(
        `decode batch ${size}, ${variant.name}`,
        `${time.toFixed(2)} ms, ${(time / plain).toFixed(3)} of plain`,
        time / plain <= most,
      );
    }
    const again = await decode(rig, size, VARIANTS[0]!);
    row(
      `decode batch ${size}, plain again`,
      `${again.toFixed(2)} ms, ${(again / plain).toFixed(3)} of plain`,
    );
  }
  await checkSampling('8B', rig.executor, 24, 3);
  rig.dispose();
  return results;
}

const folder = mkdtempSync(join(process.argv[2] ?? tmpdir(), 'pd-sampling-'));
await part('small models', () => smallChecks(folder));
const results = await part('8B', () => large(folder));
rmSync(folder, { recursive: true, force: true });
if (process.env['PD_RESULTS']) writeFileSync(process.env['PD_RESULTS'], JSON.stringify(results, null, 1));
conclude();
