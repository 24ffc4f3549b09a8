/** Errors of logits, teacher-forced, against a float32 run of transformers, beside the error of transformers' own 16-bit run. */
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { batch, distance, makeExecutor, range, sequence } from './model-rig.ts';
import { row } from './rows.ts';

interface Reference {
  readonly ids: readonly number[];
  readonly prompt: number;
  readonly positions: readonly number[];
  readonly norm: number;
  readonly error: number;
}

/** Largest allowed ratio of the two errors. */
const MOST = 1.5;

export async function logitErrors(dir: string): Promise<Record<string, number>> {
  const reference = JSON.parse(readFileSync(join(dir, 'reference.json'), 'utf8')) as Reference;
  const bytes = readFileSync(join(dir, 'reference.bin'));
  const wanted = new Float32Array(bytes.buffer, bytes.byteOffset, bytes.byteLength / 4);
  const vocab = wanted.length / reference.positions.length;
  const result: Record<string, number> = { transformers: reference.error, norm: reference.norm };
  for (const batchInvariant of [false, true]) {
    const errors = await errorsOf(dir, reference, wanted, vocab, batchInvariant);
    const mean = errors.reduce((sum, error) => sum + error, 0) / errors.length;
    const ratio = mean / reference.error;
    result[batchInvariant ? 'batchInvariant' : 'ours'] = mean;
    row(
      `${dir.split('/').at(-1)}${batchInvariant ? ', invariant' : ''}: error beside transformers'`,
      `${mean.toFixed(4)} / ${reference.error.toFixed(4)} = ${ratio.toFixed(2)} (norm ${reference.norm.toFixed(1)})`,
      ratio <= MOST,
    );
  }
  return result;
}

async function errorsOf(
  dir: string,
  { ids, prompt, positions }: Reference,
  wanted: Float32Array,
  vocab: number,
  batchInvariant: boolean,
): Promise<number[]> {
  const perSequence = Math.ceil(ids.length / 16);
  const prefixes = positions.filter((position) => position < prompt);
  const { executor, dispose } = await makeExecutor(dir, {
    batchInvariant,
    numBlocks: perSequence * prefixes.length,
    maxNumSeqs: prefixes.length,
    maxNumBatchedTokens: prompt * prefixes.length,
    maxModelLen: ids.length,
  });
  const blocks = (i: number) => range(i * perSequence, perSequence);
  const errors: number[] = [];
  const of = (logits: Float32Array, i: number) => logits.subarray(i * vocab, (i + 1) * vocab);
  const prefilled = await executor.logits(
    batch(...prefixes.map((position, i) => sequence(`${i}`, ids.slice(0, position + 1), 0, blocks(i)))),
  );
  prefixes.forEach((_, i) => {
    errors.push(distance(of(prefilled, i), of(wanted, i)));
  });
  // the last prefix is the whole prompt, from which it continues token by token
  const at = blocks(prefixes.length - 1);
  for (let position = prompt; position < ids.length; position++) {
    const logits = await executor.logits(batch(sequence('d', [ids[position]!], position, at)));
    errors.push(distance(logits, of(wanted, errors.length)));
  }
  dispose();
  return errors;
}
