/** Times of prefill and decode of an 8B model, beside those of transformers on the same machine. */
import type { CudaExecutor } from '../../src/model/cuda/executor.ts';
import { median } from '../measure/statistics.ts';
import { batch, makeExecutor, range, sequence } from './model-rig.ts';
import { row } from './rows.ts';

export interface Times {
  /** Milliseconds, by tokens. */
  readonly prefill: Readonly<Record<string, number>>;
  /** Milliseconds per step, by batch size. */
  readonly decode: Readonly<Record<string, number>>;
}

const PROMPT = 512;
const STEPS = 48;

async function prefill(executor: CudaExecutor, tokens: number): Promise<number> {
  const ids = Array.from({ length: tokens }, () => Math.floor(Math.random() * executor.vocabSize));
  const times: number[] = [];
  for (let i = 0; i < 5; i++) {
    const began = performance.now();
    await executor.forward(batch(sequence('p', ids, 0, range(0, Math.ceil(tokens / 16)))), {});
    times.push(performance.now() - began);
  }
  return median(times.slice(1));
}

async function decode(executor: CudaExecutor, size: number): Promise<number> {
  const perSequence = Math.ceil((PROMPT + STEPS + 16) / 16);
  const blocks = (i: number) => range(i * perSequence, perSequence);
  const random = () => Math.floor(Math.random() * executor.vocabSize);
  for (let i = 0; i < size; i++) {
    const ids = Array.from({ length: PROMPT }, random);
    await executor.forward(batch(sequence(`${i}`, ids, 0, blocks(i))), {});
  }
  const times: number[] = [];
  for (let step = 0; step < STEPS; step++) {
    const sequences = range(0, size).map((i) => sequence(`${i}`, [random()], PROMPT + step, blocks(i)));
    const began = performance.now();
    await executor.forward(batch(...sequences), {});
    times.push(performance.now() - began);
  }
  return median(times.slice(4));
}

export async function modelTimes(dir: string, theirs: Times): Promise<unknown> {
  const result: Record<string, unknown> = {};
  for (const batchInvariant of [false, true]) {
    const began = performance.now();
    const { executor, numBlocks, dispose } = await makeExecutor(dir, {
      batchInvariant,
      numBlocks: batchInvariant ? 4_096 : 8_192,
      maxNumSeqs: 64,
      maxNumBatchedTokens: 8_192,
      maxModelLen: 16_384,
    });
    const ready = (performance.now() - began) / 1e3;
    row(`8B ready${batchInvariant ? ', invariant' : ''}`, `${ready.toFixed(1)} s, ${numBlocks} blocks`);
    const ours = { ready, prefill: {} as Record<string, number>, decode: {} as Record<string, number> };
    for (const tokens of batchInvariant ? [2_048] : [512, 2_048, 8_192]) {
      const time = await prefill(executor, tokens);
      ours.prefill[tokens] = time;
      const other = theirs.prefill[tokens];
      const ratio = other === undefined ? Number.NaN : time / other;
      row(
        `prefill ${tokens}${batchInvariant ? ', invariant' : ''}`,
        `${time.toFixed(1)} ms, transformers ${other?.toFixed(1)} ms: ${ratio.toFixed(2)} of its time`,
        batchInvariant || tokens !== 2_048 || ratio <= 1.3,
      );
    }
    for (const size of batchInvariant ? [1, 16] : [1, 2, 4, 8, 16, 32, 64]) {
      const time = await decode(executor, size);
      ours.decode[size] = time;
      const other = theirs.decode[size];
      const times = other === undefined ? Number.NaN : other / time;
      const least = size === 1 ? 5 : 3;
      row(
        `decode batch ${size}${batchInvariant ? ', invariant' : ''}`,
        `${time.toFixed(2)} ms, ${((1e3 * size) / time).toFixed(0)} tok/s, transformers ${other?.toFixed(1) ?? '-'} ms: ${times.toFixed(1)} times as fast`,
        batchInvariant || other === undefined || times >= least,
      );
    }
    result[batchInvariant ? 'batchInvariant' : 'default'] = ours;
    dispose();
  }
  return result;
}
