/** Makes a CudaExecutor: weights, activations, KV cache from what memory is left, graphs. In the order in which memory is claimed. */
import { Cublas } from '../../../ffi/libcublas.ts';
import { CudaDevice } from '../../device/cuda/device.ts';
import type { Device, DevicePointer } from '../../device/device.ts';
import type { CacheAllocator, NamedLayer } from '../../device/paged-cache.ts';
import { PdError } from '../../errors.ts';
import { blockBytes, runBytes } from '../../kv/layout.ts';
import { binarySize } from '../../observability/bytes.ts';
import type { Logger } from '../../observability/log.ts';
import type { ModelConfig } from '../config.ts';
import { allocateKvCache, kvLayout } from '../kv-cache.ts';
import { uploadAngles } from './angles.ts';
import { CudaExecutor } from './executor.ts';
import { DecodeGraphs, graphSizes } from './graphs.ts';
import { type CachePointers, type ElementType, ModelKernels } from './kernels.ts';
import { CudaLlama } from './llama.ts';
import { Products } from './products.ts';
import { shapedRows, takeSamplerMemory } from './sampling.ts';
import { blocksThatFit, CONTEXT_BYTES, GRAPH_BYTES } from './sizes.ts';
import { type PlanLimits, planCapacity } from './step-plan.ts';
import { loadCudaWeights } from './weights.ts';

export interface CudaExecutorOptions {
  readonly dir: string;
  readonly config: ModelConfig;
  readonly device: Device;
  readonly type: ElementType;
  readonly blockSize: number;
  /** Absent: as many as fit. */
  readonly numBlocks: number | undefined;
  readonly maxModelLen: number;
  readonly maxNumSeqs: number;
  readonly maxNumBatchedTokens: number;
  readonly utilization: number;
  /** Workers that divide it. */
  readonly sharers: number;
  /** Bytes that will be needed on this GPU later: received KV, communicators. */
  readonly reserved: number;
  readonly batchInvariant: boolean;
  readonly allocateCache?: CacheAllocator | undefined;
  readonly log?: Logger;
}

/** NVIDIA's recommendation for Hopper; partial sums of small products (split-K) are kept there. */
const WORKSPACE_BYTES = 32 * 2 ** 20;
/** Most rows of logits on the GPU at a time. */
const LOGIT_ROWS = 256;

/** Share of a GPU from which on it is worth a warning that others hold it: more than what a driver keeps for itself. */
const MUCH_OF_OTHERS = 0.05;

/**
 * Throws MODEL_UNSUPPORTED for shapes without a kernel, OUT_OF_DEVICE_MEMORY where weights or one full sequence do not fit, saying by
 * how much, and what loading libraries, kernels and the checkpoint throws. The caller disposes the executor, then the device.
 */
export async function createCudaExecutor(
  options: CudaExecutorOptions,
): Promise<{ readonly executor: CudaExecutor; readonly numBlocks: number }> {
  const { config, type, blockSize, maxNumSeqs, maxModelLen, log, batchInvariant } = options;
  const device = cudaDevice(options.device);
  checkShape(config);
  device.enter();
  const stream = device.createStream();
  const undo: (() => void)[] = [() => stream.dispose()];
  const dispose = () => {
    for (let last = undo.pop(); last; last = undo.pop()) last();
  };
  try {
    const angles = uploadAngles(device, config, maxModelLen);
    const { heads, kvHeads, headDim, rmsNormEps: eps } = config;
    const shape = { type, heads, kvHeads, headDim, blockSize, eps };
    const kernels = new ModelKernels(device.target, stream.handle, shape, angles);
    let cublas: Cublas | undefined;
    if (!batchInvariant) {
      const made = Cublas.create(stream.handle, device.allocate(WORKSPACE_BYTES, 'workspace of cuBLAS'));
      undo.push(() => made.dispose());
      cublas = made;
    }
    const weights = await loadCudaWeights(options.dir, config, type, device, log);
    const rows = Math.max(options.maxNumBatchedTokens, maxNumSeqs);
    const logitRows = Math.min(maxNumSeqs, LOGIT_ROWS);
    const products = new Products(kernels, cublas);
    const limits = { rows, sequences: maxNumSeqs, logitRows, moreTokens: shapedRows(logitRows) };
    const model = new CudaLlama(device, config, weights, kernels, products, limits);
    const buffers = await takeBuffers(device, options, rows);
    const sampler = await takeSamplerMemory(device, logitRows, config.vocab, maxModelLen);
    const { numBlocks, layers } = await takeCache(device, options);
    model.useCaches(layers.map(pointersOf));
    const graphs = new DecodeGraphs(device.runtime, stream.handle);
    undo.push(() => graphs.dispose());
    const executor = new CudaExecutor({
      device,
      stream,
      model,
      kernels,
      sampler,
      layers,
      limits: { ...buffers.limits, numBlocks },
      batchInvariant,
      logitRows,
      ...buffers.memory,
      graphs,
      dispose,
    });
    // whatever loads at first use (cuBLAS's kernels) loads before the first pair opens
    for (const count of new Set([rows, Math.min(rows, 512), Math.min(rows, 64)]))
      await executor.warmUp(count);
    await executor.warmUpSampling();
    await executor.capture(graphSizes(logitRows));
    log?.info(
      { model: config.name, device: device.name, type, numBlocks, kernels: kernels.image },
      `${config.name} on ${device.name}: ${type}, ${binarySize(weights.bytes)} of weights, ${numBlocks} KV blocks of ${blockSize} tokens`,
    );
    return { executor, numBlocks };
  } catch (error) {
    dispose();
    throw error;
  }
}

function cudaDevice(device: Device): CudaDevice {
  if (device instanceof CudaDevice) return device;
  throw new PdError('CONFIG_INVALID', `--executor cuda needs --device cuda:N, not ${device.name}`);
}

/** Rows are read 16 bytes at a time. */
function checkShape(config: ModelConfig): void {
  const { hidden, intermediate, vocab } = config;
  for (const [name, width] of Object.entries({ hidden_size: hidden, intermediate_size: intermediate })) {
    if (width % 8 !== 0) {
      throw new PdError(
        'MODEL_UNSUPPORTED',
        `${config.name}: ${name} ${width} is no multiple of 8, which the kernels on cuda need; --executor host computes it`,
      );
    }
  }
  if (vocab < 1) throw new PdError('MODEL_UNSUPPORTED', `${config.name} has no vocabulary`);
}

async function takeBuffers(
  device: CudaDevice,
  { config, maxModelLen, maxNumSeqs, blockSize }: CudaExecutorOptions,
  maxRows: number,
) {
  const limits: Omit<PlanLimits, 'numBlocks'> = {
    maxRows,
    maxSequences: maxNumSeqs,
    maxBlocks: Math.ceil(maxModelLen / blockSize),
    blockSize,
    vocab: config.vocab,
  };
  const planBytes = 4 * planCapacity({ ...limits, numBlocks: 0 });
  return {
    limits,
    memory: {
      planHost: await device.allocatePinned(planBytes, 'plan of a step'),
      planDevice: device.allocate(planBytes, 'plan of a step'),
    },
  };
}

async function takeCache(
  device: CudaDevice,
  options: CudaExecutorOptions,
): Promise<{ readonly numBlocks: number; readonly layers: readonly NamedLayer[] }> {
  const { config, type, blockSize, maxModelLen, utilization, sharers, reserved, log } = options;
  const format = { dtype: type, blockSize };
  const { free, total } = device.runtime.memoryInfo();
  const others = total - free - device.allocatedBytes - CONTEXT_BYTES;
  if (options.numBlocks === undefined && sharers === 1 && others > total * MUCH_OF_OTHERS)
    // a producer that is stopped keeps the cache of a dead consumer mapped, and nothing tells its memory from any other program's
    log?.warn(
      { device: device.name, others, total },
      `${binarySize(others)} of ${device.name} are held by other processes, or for one that has died: the KV cache is so much smaller. With --num-blocks a start waits for its memory`,
    );
  const numBlocks =
    options.numBlocks ??
    blocksThatFit({
      total,
      // what the others hold is theirs, whoever has started first
      free: sharers > 1 ? total - device.allocatedBytes - CONTEXT_BYTES : free,
      utilization,
      sharers,
      reserved: reserved + GRAPH_BYTES,
      blockBytes: blockBytes(kvLayout(config, format)) * config.layers,
      perSequence: Math.ceil(maxModelLen / blockSize),
      model: config.name,
      device: device.name,
    });
  const layers = await allocateKvCache(device, config, format, numBlocks, options.allocateCache);
  return { numBlocks, layers };
}

/** `kv-first`: all of K, then all of V. */
function pointersOf({ cache: { memory, layout } }: NamedLayer): CachePointers {
  if (memory.kind !== 'cuda') throw new PdError('INTERNAL', `a cache in ${memory.kind} memory`);
  const values = memory.pointer + BigInt(runBytes(layout) * layout.numBlocks);
  return { keys: memory.pointer, values: values as DevicePointer };
}
