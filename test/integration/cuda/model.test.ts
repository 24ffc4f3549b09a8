import { afterAll, afterEach, beforeAll, describe, expect, test } from 'vitest';
import { demoModelDir } from '../../../src/config/demo-model.ts';
import type { CudaDevice } from '../../../src/device/cuda/device.ts';
import { createCudaDevice } from '../../../src/device/cuda.ts';
import type { CudaExecutor } from '../../../src/model/cuda/executor.ts';
import { uniform } from '../../../src/model/random.ts';
import { GREEDY } from '../../../src/model/sampler.ts';
import type { SamplingParams } from '../../../src/scheduler/types.ts';
import { writeRandomModel } from '../../../support/random-model.ts';
import { type StandIns, useStandIns } from '../../stand-ins/build.ts';
import { batchOf, generate, sequenceOf } from '../../support/batches.ts';
import { error, onCuda, onHost, randomModel, TOLERANCE, tokensOf } from '../../support/cuda-model.ts';
import { sharedTempDir } from '../../support/temp-dir.ts';

let standIns: StandIns;
let device: CudaDevice;
/** A random checkpoint, and an executor of it for whatever does not ask for another. */
const dir = sharedTempDir();
let executor: CudaExecutor;
const executors: CudaExecutor[] = [];

beforeAll(async () => {
  standIns = useStandIns();
  device = await createCudaDevice(0);
  await writeRandomModel(dir, { architecture: 'LlamaForCausalLM' });
  executor = await started(dir);
});
afterEach(() => standIns.faults(''));
afterAll(() => {
  for (const each of executors) each.dispose();
  device.dispose();
});

async function started(dir: string, options: Parameters<typeof onCuda>[2] = {}): Promise<CudaExecutor> {
  const { executor } = await onCuda(device, dir, options);
  executors.push(executor);
  return executor;
}

test('the demo model says what it says on the host, prompts in chunks, many at a time', async () => {
  const host = await onHost(demoModelDir());
  const executor = await started(demoModelDir());
  for (const [seed, chunk] of [
    [1, 100],
    [2, 7],
    [3, 1],
  ] as const) {
    const prompt = [0, ...tokensOf(12, seed, 1_000)];
    const options = { blocks: [seed, seed + 10, seed + 20], chunk };
    expect(await generate(executor, prompt, 12, options)).toEqual(await generate(host, prompt, 12, options));
  }
});

test('batch-invariant: the same bits alone, in chunks and in any batch', async () => {
  const executor = await started(dir, { batchInvariant: true });
  const tokens = tokensOf(90, 5);
  const whole = batchOf(sequenceOf({ tokens, blocks: [1, 2, 3, 4, 5, 6] }));
  const wanted = await executor.logits(whole);
  await executor.logits(batchOf(sequenceOf({ tokens: tokens.slice(0, 89), blocks: [7, 8, 9, 10, 11, 12] })));
  const others = [1, 2, 3].map((i) => sequenceOf({ id: `${i}`, tokens: [i], blocks: [20 + i] }));
  const last = sequenceOf({ tokens: tokens.slice(89), start: 89, blocks: [7, 8, 9, 10, 11, 12] });
  const logits = await executor.logits(batchOf(...others, last));
  expect(Buffer.compare(Buffer.from(logits.buffer, 3 * 320, 320), Buffer.from(wanted.buffer))).toBe(0);
});

test('samples as the host does from equal logits: temperature, log-probabilities, banned stop tokens, prompts', async () => {
  const prompt = tokensOf(20, 8);
  const probe = batchOf(sequenceOf({ tokens: prompt, blocks: [1, 2] }));
  const logits = await executor.logits(probe);
  const { sample } = await import('../../../src/model/sampler.ts');
  const likeliest = logits.indexOf(Math.max(...logits));
  const variants = [
    { ...GREEDY, temperature: 0.8, seed: 3 },
    { ...GREEDY, temperature: 1.5, seed: 4, topK: 1 },
    { ...GREEDY, temperature: 1.5, seed: 5, topP: 0.01 },
    { ...GREEDY, logprobs: 3 },
    { ...GREEDY, minTokens: 4, stopTokenIds: [likeliest] },
    GREEDY,
  ];
  const sequences = variants.map((params, i) =>
    sequenceOf({ id: `${i}`, tokens: prompt, blocks: [2 * i + 3, 2 * i + 4], position: 0, params }),
  );
  const { sampled } = await executor.forward(batchOf(...sequences), {});
  sampled.forEach(({ token }, i) => {
    expect(token).toBe(sample(logits, { params: variants[i]!, outputPosition: 0, index: 0 })?.token);
  });
  expect(sampled[3]?.logprob?.top).toHaveLength(3);
  expect(sampled[4]?.token).not.toBe(likeliest);
  // the next step is a graph, and one of its sequences wants more than the likeliest token
  const next = sequences.map((sequence, i) => ({
    ...sequence,
    tokens: Int32Array.of(5),
    start: 20,
    blockTable: Int32Array.of(2 * i + 3, 2 * i + 4),
  }));
  const second = await executor.forward(batchOf(...next), {});
  expect(new Set([1, 2, 3, 5].map((i) => second.sampled[i]!.token)).size).toBe(1);
  const echo = { ...sequences[5]!, promptLogprobs: { count: 2, targets: Int32Array.from(prompt.slice(1)) } };
  const { promptLogprobs } = await executor.forward(batchOf(echo), {});
  expect(promptLogprobs.get('5')?.map(({ token }) => token)).toEqual(prompt.slice(1));
});

test('shapes, draws and reports as the host does from the logits of the very step, more rows than fit at a time', async () => {
  // its memory goes with it
  const on = await createCudaDevice(0);
  const { executor } = await onCuda(on, dir, { maxNumSeqs: 70, numBlocks: 80 });
  const { sample } = await import('../../../src/model/sampler.ts');
  const random = (seed: number, index: number, below: number) => Math.floor(uniform(seed, index, 0) * below);
  const mask = Uint32Array.of(0xff0ff0f0, 0x0f0ff00f, 0x1234);
  const paramsOf = (i: number): SamplingParams => ({
    ...GREEDY,
    temperature: i % 3 === 0 ? 0 : 0.8,
    seed: i,
    ...(i % 4 === 1 && { topK: 5, topP: 0.9 }),
    ...(i % 5 === 1 && { minP: 0.3 }),
    ...(i % 2 === 0 && { repetitionPenalty: 1.4, presencePenalty: 0.3 }),
    ...(i % 3 === 1 && { frequencyPenalty: 0.25 }),
    ...(i % 7 === 0 && {
      logitBias: [
        [i, 1.5],
        [i + 3, -100],
        [500, 3],
      ],
    }),
    ...(i % 6 === 5 && { allowedTokenIds: [4, 40, 41, 79] }),
    ...(i % 8 === 4 && { badWords: [[7], [5, 9]], minTokens: 2, stopTokenIds: [11, 900] }),
    ...(i % 3 === 2 && { logprobs: i % 21 }),
  });
  const tokens = Array.from({ length: 70 }, (_, i) => [random(i, 1, 80), random(i, 2, 80), random(i, 3, 80)]);
  const histories = tokens.map((known) => ({
    promptLength: 3,
    get length() {
      return known.length;
    },
    tokens: (start: number, end: number) => Int32Array.from(known.slice(start, end)),
  }));
  for (let step = 0; step < 4; step++) {
    // a prompt and then graphs; of every other step a part alone, so that counting has gaps
    const indices = tokens.map((_, i) => i).filter((i) => step !== 2 || i % 2 === 0);
    const sequences = indices.map((i) => {
      const start = step === 0 ? 0 : tokens[i]!.length - 1;
      const given = sequenceOf({ id: `${i}`, tokens: tokens[i]!.slice(start), start, blocks: [i] });
      return {
        ...given,
        sample: {
          params: paramsOf(i),
          outputPosition: tokens[i]!.length - 3,
          index: 0,
          history: histories[i]!,
        },
      };
    });
    const logits = new Map<string, Float32Array>();
    const maskOf = (id: string) =>
      Number(id) % 5 === 2 ? mask : Number(id) === 69 ? new Uint32Array(3) : undefined;
    const { sampled, failed } = await executor.forward(batchOf(...sequences), {
      sampling: ({ sequenceId }, row) => logits.set(sequenceId, row.slice()),
      mask: ({ sequenceId }) => maskOf(sequenceId),
    });
    expect([...(failed ?? [])].map(([id, { code }]) => [id, code])).toEqual(
      step === 2 ? [] : [['69', 'REQUEST_INVALID']],
    );
    expect(sampled).toHaveLength(indices.length - (failed?.size ?? 0));
    for (const { sequenceId, token, logprob } of sampled) {
      const { sample: spec } = sequences.find((sequence) => sequence.sequenceId === sequenceId)!;
      const wanted = sample(logits.get(sequenceId)!, spec, maskOf(sequenceId));
      expect([sequenceId, token]).toEqual([sequenceId, wanted?.token]);
      expect(logprob?.top.map((entry) => entry.token)).toEqual(
        wanted?.logprob?.top.map((entry) => entry.token),
      );
      if (logprob) expect(logprob.logprob).toBeCloseTo(wanted!.logprob!.logprob, 4);
      tokens[Number(sequenceId)]!.push(token);
    }
    // of prompts too, rank and all
    const prompt = { ...sequences[0]!, promptLogprobs: { count: 4, targets: Int32Array.of(5, 6, 7) } };
    if (step === 0) {
      const { promptLogprobs } = await executor.forward(batchOf(prompt), {});
      expect(promptLogprobs.get('0')?.map((entry) => entry.token)).toEqual([5, 6, 7]);
      const { promptLogprobOf } = await import('../../../src/model/sampler.ts');
      const last = await executor.logits(batchOf(sequences[0]!));
      const wanted = promptLogprobOf(last, 7, 4);
      const got = promptLogprobs.get('0')![2]!;
      expect({ rank: got.rank, top: got.top.map((entry) => entry.token) }).toEqual({
        rank: wanted.rank,
        top: wanted.top.map((entry) => entry.token),
      });
    }
  }
  executor.dispose();
  on.dispose();
});

test('tells the logits that each token is sampled from, of prompts and of a graph, and samples the same', async () => {
  const executor = await started(dir, { maxNumSeqs: 20 });
  const steps = [tokensOf(10, 8), [5]].map((tokens, step) =>
    batchOf(
      // more than are read at a time, one of them sampled on the host
      ...Array.from({ length: 18 }, (_, i) =>
        sequenceOf({
          id: `${i}`,
          tokens: tokens.map((token) => (token + i) % 80),
          start: 10 * step,
          blocks: [i],
          position: step,
          params: i === 3 ? { ...GREEDY, logprobs: 2 } : GREEDY,
        }),
      ),
      sequenceOf({ id: 'chunk', tokens, start: 10 * step, blocks: [20] }),
    ),
  );
  for (const step of steps) {
    const { sampled } = await executor.forward(step, {});
    const rows = new Map<string, Float32Array>();
    const told = await executor.forward(step, {
      sampling: ({ sequenceId }, logits) => rows.set(sequenceId, logits.slice()),
    });
    expect(told.sampled).toEqual(sampled);
    expect([...rows].map(([id, row]) => [id, row.indexOf(Math.max(...row))])).toEqual(
      sampled.map(({ sequenceId, token }) => [sequenceId, token]),
    );
  }
});

test('a step that fails ends with its error, and the next one runs', async () => {
  const step = batchOf(sequenceOf({ tokens: tokensOf(20, 3), blocks: [1, 2], position: 0 }));
  const wanted = await executor.forward(step, {});
  standIns.faults('cublasGemmEx=13@3');
  await expect(executor.forward(step, {})).rejects.toMatchObject({
    code: 'CUDA_ERROR',
    message: expect.stringContaining('cublasGemmEx failed with 13'),
  });
  standIns.faults('');
  expect(await executor.forward(step, {})).toEqual(wanted);
});

test('draws among the likeliest alone, as often as they are likely', async () => {
  const tokens = tokensOf(10, 4);
  const logits = await executor.logits(batchOf(sequenceOf({ tokens, blocks: [1] })));
  const order = [...logits.keys()].sort((a, b) => logits[b]! - logits[a]!);
  const counts = new Map<number, number>();
  const params = { ...GREEDY, temperature: 2, topK: 3, topP: 0.999 };
  for (let seed = 0; seed < 80; seed++) {
    const sequences = [0, 1, 2, 3, 4, 5].map((i) =>
      sequenceOf({
        id: `${i}`,
        tokens: tokens.slice(-1),
        start: 9,
        blocks: [1],
        position: i,
        params: { ...params, seed },
      }),
    );
    for (const { token } of (await executor.forward(batchOf(...sequences), {})).sampled) {
      counts.set(token, (counts.get(token) ?? 0) + 1);
    }
  }
  expect(new Set(counts.keys())).toEqual(new Set(order.slice(0, 3)));
  const weights = order.slice(0, 3).map((id) => Math.exp((logits[id]! - logits[order[0]!]!) / 2));
  const total = weights.reduce((sum, weight) => sum + weight, 0);
  // 480 draws: five standard deviations are 0.11
  weights.forEach((weight, i) => {
    expect(Math.abs(counts.get(order[i]!)! / 480 - weight / total)).toBeLessThan(0.11);
  });
});

test('tells each layer in order with an event, in a prompt and in a graph, and copies blocks first', async () => {
  const prompt = tokensOf(16, 9);
  const wanted = await executor.logits(batchOf(sequenceOf({ tokens: [...prompt, 7], blocks: [1, 2] })));
  for (const [tokens, start] of [
    [prompt, 0],
    [[7], 16],
  ] as const) {
    const told: [number, string | undefined][] = [];
    const step = batchOf(sequenceOf({ tokens, start, blocks: [5, 6], position: 0 }));
    await executor.forward(step, { afterLayer: (layer, ready) => told.push([layer, ready?.kind]) });
    expect(told).toEqual([
      [0, 'cuda'],
      [1, 'cuda'],
    ]);
  }
  const copied = {
    ...batchOf(sequenceOf({ tokens: [7], start: 16, blocks: [9, 10] })),
    blockCopies: [{ source: 5, target: 9 }],
  };
  expect(error(await executor.logits(copied), wanted)).toBeLessThan(TOLERANCE);
});

describe('memory', () => {
  test('blocks from what is free, and by how much it is too little', async () => {
    const { executor, numBlocks } = await onCuda(device, dir, { numBlocks: undefined });
    executors.push(executor);
    // a block of two layers: 2 * 2 * 16 tokens * 2 heads * 32 * 2 bytes
    expect(numBlocks).toBeGreaterThan(10_000);
    expect(numBlocks * 2 * 2 * 16 * 2 * 32 * 2).toBeLessThan(0.9 * 2 ** 30);
    await expect(onCuda(device, dir, { numBlocks: undefined })).rejects.toMatchObject({
      code: 'OUT_OF_DEVICE_MEMORY',
      message: expect.stringMatching(/one sequence of full length.*too little.*--max-model-len/s),
    });
  });

  test('refuses by name what has no kernel', async () => {
    const dir = await randomModel({ architecture: 'LlamaForCausalLM', headDim: 16 });
    await expect(onCuda(device, dir)).rejects.toMatchObject({
      code: 'MODEL_UNSUPPORTED',
      message: expect.stringContaining('heads of 16'),
    });
  });
});
