/** What each architecture computes on a GPU, against the host. */
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import type { CudaDevice } from '../../../src/device/cuda/device.ts';
import { createCudaDevice } from '../../../src/device/cuda.ts';
import type { Architecture } from '../../../src/model/config.ts';
import type { RandomModel } from '../../../support/random-model.ts';
import { useStandIns } from '../../stand-ins/build.ts';
import { batchOf, sequenceOf } from '../../support/batches.ts';
import { error, onCuda, onHost, randomModel, TOLERANCE, tokensOf } from '../../support/cuda-model.ts';
import { rows } from '../../support/rows.ts';

let device: CudaDevice;
beforeAll(async () => {
  useStandIns();
  device = await createCudaDevice(0);
});
afterAll(() => device.dispose());

interface Row {
  readonly what: string;
  readonly model: RandomModel;
  readonly blockSize: number;
}
const row = (what: string, model: RandomModel, blockSize = 16): Row => ({ what, model, blockSize });
const plain = (architecture: Architecture) => row(architecture, { architecture });
const FLOAT16 = row('float16', { architecture: 'Qwen3ForCausalLM', type: 'F16' });
const FLOAT32 = row('float32, kept as bfloat16', { architecture: 'LlamaForCausalLM', type: 'F32' });
const TIED = row('a tied head, heads of 64', { architecture: 'Qwen2ForCausalLM', tied: true, headDim: 64 });
const SEVEN = row('seven query heads to one, heads of 128', {
  architecture: 'LlamaForCausalLM',
  ...{ heads: 7, kvHeads: 1, headDim: 128 },
});
const TWELVE = row(
  'twelve query heads to one',
  { architecture: 'LlamaForCausalLM', heads: 12, kvHeads: 1 },
  8,
);
const UNSHARED = row(
  'no shared heads, blocks of 12',
  { architecture: 'MistralForCausalLM', heads: 3, kvHeads: 3 },
  12,
);

/** Of each way to compute, and of each architecture's own parts, one. */
const few = [
  { ...plain('LlamaForCausalLM'), batchInvariant: true },
  { ...FLOAT16, batchInvariant: false },
  { ...TIED, batchInvariant: true },
  { ...TWELVE, batchInvariant: false },
];
const others = [
  { ...plain('LlamaForCausalLM'), batchInvariant: false },
  ...[plain('MistralForCausalLM'), plain('Qwen2ForCausalLM'), plain('Qwen3ForCausalLM'), FLOAT32].flatMap(
    (each) => [false, true].map((batchInvariant) => ({ ...each, batchInvariant })),
  ),
  { ...FLOAT16, batchInvariant: true },
  { ...TIED, batchInvariant: false },
  { ...TWELVE, batchInvariant: true },
  ...[SEVEN, UNSHARED].flatMap((each) =>
    [false, true].map((batchInvariant) => ({ ...each, batchInvariant })),
  ),
];

describe('logits equal the host', () => {
  test.each(rows(few, others))(
    '$what, batch-invariant: $batchInvariant',
    async ({ model, blockSize, batchInvariant }) => {
      const dir = await randomModel(model);
      const host = await onHost(dir, blockSize);
      const { executor } = await onCuda(device, dir, { batchInvariant, blockSize });
      const [a, b] = [tokensOf(150, 1), tokensOf(9, 2)];
      const blocks = [...Array(20).keys()].map((i) => (i * 7 + 3) % 40);
      const [blocksOfA, blocksOfB] = [blocks, [50, 41, 47]];
      const steps = [
        // a prompt whose last tile is not full; then its next chunk of one token beside another prompt; then both one by one
        batchOf(sequenceOf({ id: 'a', tokens: a.slice(0, 140), blocks: blocksOfA })),
        batchOf(
          sequenceOf({ id: 'a', tokens: a.slice(140, 141), start: 140, blocks: blocksOfA }),
          sequenceOf({ id: 'b', tokens: b.slice(0, 6), blocks: blocksOfB }),
        ),
        batchOf(
          sequenceOf({ id: 'b', tokens: b.slice(6, 7), start: 6, blocks: blocksOfB }),
          sequenceOf({ id: 'a', tokens: a.slice(141, 142), start: 141, blocks: blocksOfA }),
        ),
      ];
      // five in a graph for six: padding must touch nobody's row
      const five = [30, 31, 32, 33, 34].map((block, i) =>
        sequenceOf({ id: `${i}`, tokens: [i], blocks: [block] }),
      );
      for (const step of [...steps, batchOf(...five)]) {
        expect(error(await executor.logits(step), await host.logits(step))).toBeLessThan(TOLERANCE);
      }
      executor.dispose();
    },
  );
});
