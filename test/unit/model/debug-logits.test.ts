import { readdirSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { expect, it } from 'vitest';
import type { WorkerConfig } from '../../../src/config/worker-config.ts';
import { HostDevice } from '../../../src/device/host.ts';
import { createExecutor } from '../../../src/model/create-executor.ts';
import { DebugLogits, LogitsFiles } from '../../../src/model/debug-logits.ts';
import type { Executor } from '../../../src/model/executor.ts';
import { GREEDY } from '../../../src/model/sampler.ts';
import type { Logger } from '../../../src/observability/log.ts';
import { writeRandomModel } from '../../../support/random-model.ts';
import { batchOf, generate, sequenceOf } from '../../support/batches.ts';
import { argmax, readLogits } from '../../support/logits-files.ts';
import { tempDir } from '../../support/temp-dir.ts';

const VOCAB = 80;
const PROMPT = Array.from({ length: 21 }, (_, i) => (i * 11 + 3) % VOCAB);
const BLOCKS = [4, 1, 3];

async function open(modelDir: string, debugLogits?: string) {
  const warnings: string[] = [];
  const log = { warn: (_: object, message: string) => warnings.push(message) } as unknown as Logger;
  const read = { modelDir, executor: 'host', role: 'both', maxNumSeqs: 4, blockSize: 16 };
  const config = { ...read, ...(debugLogits && { debugLogits }) } as WorkerConfig;
  const { executor } = await createExecutor({ config, device: new HostDevice(), log });
  return { executor, warnings };
}

async function model(): Promise<string> {
  const dir = await tempDir();
  await writeRandomModel(dir, { architecture: 'LlamaForCausalLM' });
  return dir;
}

it('writes the row of each sampled token and what it is, and changes no answer', async () => {
  const modelDir = await model();
  const dir = join(await tempDir(), 'made', 'here');
  const plain = await open(modelDir);
  const wanted = await generate(plain.executor, PROMPT, 6, { blocks: BLOCKS });
  const { executor, warnings } = await open(modelDir, dir);
  expect(warnings).toEqual([expect.stringMatching(/--debug-logits: each sampled token writes 320 bytes to/)]);
  const id = 'cmpl-a-0-0123abcd';
  expect(await generate(executor, PROMPT, 6, { blocks: BLOCKS, chunk: 8, id })).toEqual(wanted);

  const { lines, rows } = readLogits(dir, `${id}.both`, VOCAB);
  expect(rows.map(argmax)).toEqual(wanted);
  expect(lines).toEqual(
    wanted.map((sampled, i) => ({
      request: 'cmpl-a-0',
      sequence: id,
      index: 0,
      position: 20 + i,
      // the chunk that ends the prompt, then one by one
      tokens: i === 0 ? PROMPT.slice(16) : [wanted[i - 1]],
      sampled,
    })),
  );
  // what a reader compares with: the logits after all tokens up to that position
  for (const [i, { position }] of lines.entries()) {
    const tokens = [...PROMPT, ...wanted].slice(0, position + 1);
    expect(rows[i]).toEqual(await plain.executor.logits(batchOf(sequenceOf({ tokens, blocks: BLOCKS }))));
  }
});

it('keeps sequences of a batch apart, inside the directory whatever their ids, and takes raw logits', async () => {
  const dir = await tempDir();
  const { executor } = await open(await model(), dir);
  const ids = ['/../../x/1', `${'long'.repeat(100)}-0`, '..'];
  const params = { ...GREEDY, temperature: 0.7, minTokens: 3, stopTokenIds: [5, 6] };
  const sequences = ids.map((id, i) =>
    sequenceOf({ id, tokens: PROMPT.slice(i), blocks: [2 * i, 2 * i + 1], position: 0, params }),
  );
  const chunk = sequenceOf({ id: 'chunk', tokens: PROMPT, blocks: [9, 10] });
  await executor.forward(batchOf(sequences[0]!, chunk, ...sequences.slice(1)), {});
  expect(readdirSync(dir).filter((name) => name.endsWith('.f32'))).toHaveLength(3);
  for (const [i, name] of ['_.._.._x_1', ids[1]!.slice(-200), '..'].entries()) {
    const { lines, rows } = readLogits(dir, `${name}.both`, VOCAB);
    expect(lines).toMatchObject([{ sequence: ids[i], position: 20 - i }]);
    expect(rows).toEqual([await executor.logits(batchOf(sequences[i]!))]);
  }
});

it('writes the row that no token could be sampled from', async () => {
  const dir = await tempDir();
  const row = new Float32Array(4).fill(Number.NaN);
  const broken = {
    layers: [],
    vocabSize: 4,
    forward: async ({ sequences }, hooks) => {
      hooks.sampling?.(sequences[0]!, row);
      throw new Error('no usable distribution');
    },
    logits: async () => row,
    dispose: () => undefined,
  } satisfies Executor as Executor;
  const executor = new DebugLogits(broken, new LogitsFiles(dir, 'consumer'));
  const step = batchOf(sequenceOf({ tokens: [1, 2], blocks: [0], position: 0 }));
  await expect(executor.forward(step, {})).rejects.toThrow('no usable distribution');
  expect(readLogits(dir, 'a.consumer', 4)).toMatchObject({
    lines: [{ tokens: [1, 2], sampled: null }],
    rows: [row],
  });
});

it('goes on answering where it can write no more, and says so once', async () => {
  const modelDir = await model();
  const dir = await tempDir();
  const { executor, warnings } = await open(modelDir, dir);
  const wanted = await generate(executor, PROMPT, 4, { blocks: BLOCKS });
  rmSync(dir, { recursive: true });
  expect(await generate(executor, PROMPT, 4, { blocks: BLOCKS })).toEqual(wanted);
  expect(warnings.slice(1)).toEqual([expect.stringMatching(/a\.both\.f32 cannot be written.*ENOENT/)]);
});

it('refuses a directory that cannot be, before it reads the model', async () => {
  const file = join(await tempDir(), 'file');
  writeFileSync(file, '');
  for (const dir of [file, join(file, 'below')]) {
    await expect(open('/nonexistent', dir)).rejects.toMatchObject({
      code: 'CONFIG_INVALID',
      message: expect.stringContaining(`--debug-logits ${dir}: expected a directory that can be written`),
    });
  }
});
