/** Executors on stand-in GPUs, and random checkpoints for them. */

import type { CudaDevice } from '../../src/device/cuda/device.ts';
import { HostDevice } from '../../src/device/host.ts';
import { readModelConfig } from '../../src/model/config.ts';
import { createCudaExecutor } from '../../src/model/cuda/create.ts';
import { elementTypeOf } from '../../src/model/cuda/weights.ts';
import { HostExecutor } from '../../src/model/host/executor.ts';
import { uniform } from '../../src/model/random.ts';
import { type RandomModel, writeRandomModel } from '../../support/random-model.ts';
import { tempDir } from './temp-dir.ts';

interface Options {
  readonly batchInvariant?: boolean;
  readonly blockSize?: number;
  readonly maxNumSeqs?: number;
  readonly numBlocks?: number | undefined;
}

/** The caller disposes the executor. */
export async function onCuda(
  device: CudaDevice,
  dir: string,
  { batchInvariant = false, blockSize = 16, maxNumSeqs = 6, ...given }: Options = {},
) {
  const config = await readModelConfig(dir);
  return createCudaExecutor({
    dir,
    config,
    device,
    type: await elementTypeOf(dir, config),
    blockSize,
    numBlocks: 'numBlocks' in given ? given.numBlocks : 64,
    maxModelLen: Math.min(512, config.maxPositionEmbeddings),
    maxNumSeqs,
    maxNumBatchedTokens: 256,
    utilization: 0.9,
    sharers: 1,
    reserved: 0,
    batchInvariant,
  });
}

export async function onHost(dir: string, blockSize = 16) {
  const config = await readModelConfig(dir);
  return HostExecutor.create({ dir, config, device: new HostDevice(), blockSize, numBlocks: 64 });
}

export async function randomModel(model: RandomModel): Promise<string> {
  const dir = await tempDir();
  await writeRandomModel(dir, model);
  return dir;
}

export const tokensOf = (count: number, seed: number, vocab = 80) =>
  Array.from({ length: count }, (_, i) => Math.floor(uniform(seed, 0, i) * vocab));

/** L2 norm of the difference over that of the reference. */
export function error(got: Float32Array, wanted: Float32Array): number {
  let difference = 0;
  let norm = 0;
  for (let i = 0; i < wanted.length; i++) {
    difference += (got[i]! - wanted[i]!) ** 2;
    norm += wanted[i]! ** 2;
  }
  return Math.sqrt(difference / norm);
}

/** bfloat16 has 8 bits: two layers of it stay well below this, and a wrong index or a forgotten bias is far above. */
export const TOLERANCE = 0.04;
