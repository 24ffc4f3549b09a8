/** Random small models in random steps: the GPU against the host's float32 reference, and batch-invariance to the bit. */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { HostDevice } from '../../src/device/host.ts';
import { ARCHITECTURES, readModelConfig } from '../../src/model/config.ts';
import type { CudaExecutor } from '../../src/model/cuda/executor.ts';
import { HostExecutor } from '../../src/model/host/executor.ts';
import { uniform } from '../../src/model/random.ts';
import type { ScheduledSequence } from '../../src/scheduler/types.ts';
import { writeRandomModel } from '../../support/random-model.ts';
import { batch, distance, makeExecutor, sequence } from './model-rig.ts';
import { row } from './rows.ts';

const random = (below: number) => Math.floor(Math.random() * below);
const pick = <T>(values: readonly T[]): T => values[random(values.length)]!;
const NUM_BLOCKS = 512;

interface Running {
  readonly id: string;
  readonly tokens: readonly number[];
  readonly blocks: readonly number[];
  done: number;
}

/** A few steps of sequences that begin, go on in chunks and decode, as a scheduler mixes them. */
function* steps(vocab: number, blockSize: number, maxRows: number): Generator<ScheduledSequence[]> {
  const free = Array.from({ length: NUM_BLOCKS }, (_, i) => i).sort(() => Math.random() - 0.5);
  const running: Running[] = [];
  for (let step = 0; step < 12; step++) {
    if (running.length < 14) {
      for (let i = random(4); i >= 0; i--) {
        const length = 1 + random(pick([3, 40, 200, 400]));
        const blocks = free.splice(0, Math.ceil((length + 12) / blockSize));
        if (blocks.length * blockSize < length + 12) break;
        const tokens = Array.from({ length: length + 12 }, () => random(vocab));
        running.push({ id: `${step}-${i}`, tokens, blocks, done: 0 });
      }
    }
    let budget = maxRows;
    const scheduled: ScheduledSequence[] = [];
    for (const one of running) {
      const left = one.tokens.length - one.done;
      // prompts in pieces now and then, the last tokens one by one
      const count = Math.min(
        budget,
        left <= 12 ? Math.min(1, left) : pick([left - 12, 1 + random(left - 12)]),
      );
      if (count <= 0) continue;
      budget -= count;
      scheduled.push(sequence(one.id, one.tokens.slice(one.done, one.done + count), one.done, one.blocks));
      one.done += count;
    }
    yield scheduled;
  }
}

async function compare(dir: string, blockSize: number, batchInvariant: boolean) {
  const config = await readModelConfig(dir);
  const host = await HostExecutor.create({
    dir,
    config,
    device: new HostDevice(),
    blockSize,
    numBlocks: NUM_BLOCKS,
  });
  const { executor, dispose } = await makeExecutor(dir, {
    blockSize,
    batchInvariant,
    numBlocks: NUM_BLOCKS,
    maxNumSeqs: 24,
    maxNumBatchedTokens: 640,
  });
  const { vocab } = config;
  let worst = 0;
  let tokens = 0;
  let agreed = 0;
  let draws = 0;
  for (const scheduled of steps(vocab, blockSize, 640)) {
    if (scheduled.length === 0) continue;
    const step = batch(...scheduled);
    const wanted = await host.logits(step);
    const got = await executor.logits(step);
    const { sampled } = await executor.forward(step, {});
    for (let i = 0; i < scheduled.length; i++) {
      const of = (all: Float32Array) => all.subarray(i * vocab, (i + 1) * vocab);
      const relative = distance(of(got), of(wanted)) / distance(of(wanted), new Float32Array(vocab));
      worst = Math.max(worst, Number.isNaN(relative) ? Number.POSITIVE_INFINITY : relative);
      tokens++;
      draws += await drawn(executor, scheduled[i]!);
      // not the very same token: the step was computed anew, and other products round two near ones otherwise
      const highest = Math.max(...of(got));
      if (highest - of(got)[sampled[i]!.token]! < 0.02 * Math.abs(highest)) agreed++;
    }
  }
  dispose();
  return { worst, tokens, agreed, draws };
}

/** 1 where the GPU draws what its own logits say, counted out here. Alone in both steps, so that their logits have the same bits. */
async function drawn(executor: CudaExecutor, step: ScheduledSequence): Promise<number> {
  const logits = await executor.logits(batch(step));
  const params = {
    ...step.sample!.params,
    temperature: 0.3 + Math.random(),
    topK: pick([0, 0, 1, 5, 20, logits.length + 5]),
    topP: pick([1, 1, 0.9, 0.5, 0.01]),
    seed: random(2 ** 30),
  };
  const sample = { params, outputPosition: random(1_000), index: random(3) };
  const { sampled } = await executor.forward(batch({ ...step, sample }), {});
  const highest = Math.max(...logits);
  const weights = Array.from(logits, (logit) => Math.exp((logit - highest) / params.temperature));
  let order = [...weights.keys()].sort((a, b) => weights[b]! - weights[a]!);
  if (params.topK > 0) order = order.slice(0, params.topK);
  const mass = (ids: readonly number[]) => ids.reduce((sum, id) => sum + weights[id]!, 0);
  const wanted = params.topP * mass(order);
  let kept = order;
  for (let count = 1, sum = 0; params.topP < 1 && count <= order.length; count++) {
    sum += weights[order[count - 1]!]!;
    if (sum < wanted) continue;
    kept = order.slice(0, count);
    break;
  }
  const ids = [...kept].sort((a, b) => a - b);
  const target = uniform(params.seed, sample.index, sample.outputPosition) * mass(ids);
  let passed = 0;
  const token = ids.find((id) => {
    passed += weights[id]!;
    return passed > target;
  });
  return token === sampled[0]!.token ? 1 : 0;
}

/** One sequence alone, in chunks, among others, and as the last token of a decode step: equal bits. */
async function invariance(dir: string, vocab: number): Promise<number> {
  const { executor, dispose } = await makeExecutor(dir, {
    batchInvariant: true,
    numBlocks: NUM_BLOCKS,
    maxNumSeqs: 24,
    maxNumBatchedTokens: 640,
  });
  let different = 0;
  for (let round = 0; round < 6; round++) {
    const length = 2 + random(300);
    const tokens = Array.from({ length }, () => random(vocab));
    const blocks = (first: number) => Array.from({ length: 20 }, (_, i) => first + i);
    const wanted = await executor.logits(batch(sequence('a', tokens, 0, blocks(0))));
    const cut = 1 + random(length - 1);
    const others = Array.from({ length: random(20) }, (_, i) => {
      const other = Array.from({ length: 1 + random(20) }, () => random(vocab));
      return sequence(`o${i}`, other, 0, [400 + 2 * i, 401 + 2 * i]);
    });
    await executor.logits(batch(...others, sequence('b', tokens.slice(0, cut), 0, blocks(40))));
    if (cut < length - 1) {
      await executor.logits(batch(sequence('b', tokens.slice(cut, -1), cut, blocks(40)), ...others));
    }
    const last = sequence('b', tokens.slice(-1), length - 1, blocks(40));
    const singles = others.map((one) => ({ ...one, tokens: one.tokens.subarray(0, 1) }));
    const got = await executor.logits(batch(...(cut === length ? [] : singles), last));
    const mine = got.subarray(got.length - vocab);
    if (wanted.some((value, i) => value !== mine[i])) different++;
  }
  dispose();
  return different;
}

export async function randomModels(count: number): Promise<void> {
  for (let i = 0; i < count; i++) {
    const dir = mkdtempSync(join(tmpdir(), 'pd-model-'));
    const kvHeads = pick([1, 2, 3]);
    const model = {
      architecture: ARCHITECTURES[i % ARCHITECTURES.length]!,
      type: i % 3 === 2 ? ('F16' as const) : ('BF16' as const),
      tied: i % 2 === 1,
      layers: 2,
      hidden: 8 * (4 + random(30)),
      kvHeads,
      heads: kvHeads * pick([1, 2, 3, 4, 7, 12]),
      headDim: pick([32, 64, 128]),
      intermediate: 8 * (4 + random(40)),
      vocab: 50 + random(300),
    };
    const blockSize = pick([16, 16, 8, 12, 64]);
    await writeRandomModel(dir, model);
    const text = `${model.architecture.replace('ForCausalLM', '')} ${model.type} hidden ${model.hidden}, heads ${model.heads}/${kvHeads} x ${model.headDim}, blocks of ${blockSize}`;
    for (const batchInvariant of [false, true]) {
      const { worst, tokens, agreed, draws } = await compare(dir, blockSize, batchInvariant);
      row(
        `${text}${batchInvariant ? ', invariant' : ''}`,
        `worst ${worst.toExponential(1)} of ${tokens}, argmax ${agreed}, drawn ${draws}`,
        worst < 0.03 && agreed === tokens && draws === tokens,
      );
    }
    const different = await invariance(dir, model.vocab);
    row('   same bits alone, in chunks, in batches', `${6 - different} of 6`, different === 0);
    rmSync(dir, { recursive: true });
  }
}
