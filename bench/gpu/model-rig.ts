/** What the GPU checks of the model share. */
import type { CudaDevice } from '../../src/device/cuda/device.ts';
import { createCudaDevice } from '../../src/device/cuda.ts';
import { readModelConfig } from '../../src/model/config.ts';
import { createCudaExecutor } from '../../src/model/cuda/create.ts';
import type { CudaExecutor } from '../../src/model/cuda/executor.ts';
import { elementTypeOf } from '../../src/model/cuda/weights.ts';
import { GREEDY } from '../../src/model/sampler.ts';
import type { ForwardBatch, ScheduledSequence } from '../../src/scheduler/types.ts';
import { engineRequestId, transferIdOf } from '../../src/wire/ids.ts';

export interface RigOptions {
  readonly batchInvariant?: boolean;
  readonly blockSize?: number;
  readonly maxNumSeqs?: number;
  readonly maxNumBatchedTokens?: number;
  readonly numBlocks: number | undefined;
  readonly maxModelLen?: number;
}

export interface Rig {
  readonly executor: CudaExecutor;
  readonly numBlocks: number;
  readonly device: CudaDevice;
  /** Releases all GPU memory. */
  dispose(): void;
}

/** With its own device object, since a device releases its memory as a whole. */
export async function makeExecutor(dir: string, options: RigOptions): Promise<Rig> {
  const config = await readModelConfig(dir);
  const device = await createCudaDevice(0);
  const { executor, numBlocks } = await createCudaExecutor({
    dir,
    config,
    device,
    type: await elementTypeOf(dir, config),
    blockSize: options.blockSize ?? 16,
    numBlocks: options.numBlocks,
    maxModelLen: options.maxModelLen ?? config.maxPositionEmbeddings,
    maxNumSeqs: options.maxNumSeqs ?? 16,
    maxNumBatchedTokens: options.maxNumBatchedTokens ?? 2_048,
    utilization: 0.9,
    sharers: 1,
    reserved: 0,
    batchInvariant: options.batchInvariant ?? false,
  });
  const dispose = () => {
    executor.dispose();
    device.dispose();
  };
  return { executor, numBlocks, device, dispose };
}

export function sequence(
  id: string,
  tokens: ArrayLike<number>,
  start: number,
  blocks: ArrayLike<number>,
): ScheduledSequence {
  return {
    sequenceId: id,
    requestId: engineRequestId(id),
    transferId: transferIdOf(id),
    tokens: Int32Array.from(tokens),
    start,
    blockTable: Int32Array.from(blocks),
    sample: { params: GREEDY, outputPosition: 0, index: 0 },
  };
}

export function batch(...sequences: ScheduledSequence[]): ForwardBatch {
  return { sequences, blockCopies: [] };
}

export function range(first: number, count: number): number[] {
  return Array.from({ length: count }, (_, i) => first + i);
}

/** L2 norm of the difference. */
export function distance(got: Float32Array, wanted: Float32Array): number {
  let sum = 0;
  for (let i = 0; i < wanted.length; i++) sum += (got[i]! - wanted[i]!) ** 2;
  return Math.sqrt(sum);
}
