/** From a worker's configuration to an executor: reads the checkpoint and sizes the KV cache. */
import type { WorkerConfig } from '../config/worker-config.ts';
import type { Device } from '../device/device.ts';
import type { CacheAllocator } from '../device/paged-cache.ts';
import { PdError, unreachable } from '../errors.ts';
import { blockBytes } from '../kv/layout.ts';
import type { Logger } from '../observability/log.ts';
import type { Fingerprint } from '../wire/fingerprint.ts';
import { type ModelConfig, readModelConfig } from './config.ts';
import { DebugLogits, LogitsFiles } from './debug-logits.ts';
import type { Executor } from './executor.ts';
import { fingerprintOf } from './fingerprint.ts';
import { HostExecutor } from './host/executor.ts';
import { kvLayout } from './kv-cache.ts';

/** Limit of the default size of the KV cache on the host, all layers together. */
const HOST_KV_BYTES = 2 ** 30;
/** The default cache holds at most this many full-length sequences. */
const FULL_SEQUENCES = 64;

export interface CreatedExecutor {
  readonly executor: Executor;
  readonly fingerprint: Fingerprint;
  /** Most tokens of one sequence, prompt and output. */
  readonly maxModelLen: number;
  readonly numBlocks: number;
}

export interface CreateExecutorOptions {
  readonly config: WorkerConfig;
  readonly device: Device;
  /** Allocates the cache, if it is not plain memory of the device. */
  readonly allocateCache?: CacheAllocator;
  /** Reports the progress of loading. */
  readonly log?: Logger;
}

/**
 * Throws CHECKPOINT_INVALID or MODEL_UNSUPPORTED for what cannot be read or computed, CONFIG_INVALID for lengths the model does not
 * have or a --debug-logits that cannot be written, OUT_OF_DEVICE_MEMORY for a cache that does not fit. The caller disposes the executor.
 */
export async function createExecutor(options: CreateExecutorOptions): Promise<CreatedExecutor> {
  const { config, log } = options;
  if (config.debugLogits === undefined) return createModel(options);
  // before the model loads: that may take minutes
  const files = new LogitsFiles(config.debugLogits, config.role, log);
  const created = await createModel(options);
  const bytes = 4 * created.executor.vocabSize;
  log?.warn(
    { dir: config.debugLogits, bytes },
    `--debug-logits: each sampled token writes ${bytes} bytes to ${config.debugLogits}, for which every request waits; nothing bounds how much that becomes`,
  );
  return { ...created, executor: new DebugLogits(created.executor, files) };
}

async function createModel({
  config,
  device,
  log,
  allocateCache,
}: CreateExecutorOptions): Promise<CreatedExecutor> {
  const { modelDir: dir, blockSize } = config;
  const model = await readModelConfig(dir);
  const maxModelLen = modelLength(config, model);
  const common = { dir, config: model, device, blockSize, allocateCache };
  switch (config.executor) {
    case 'host': {
      const numBlocks = config.numBlocks ?? defaultHostBlocks(config, model, maxModelLen);
      const fingerprint = await fingerprintOf(dir, model, { dtype: 'float32', blockSize });
      const executor = await HostExecutor.create({ ...common, numBlocks });
      return { executor, fingerprint, maxModelLen, numBlocks };
    }
    case 'cuda': {
      // Loaded where it is asked for: a machine without a GPU needs none of its libraries.
      const { createCudaExecutor } = await import('./cuda/create.ts');
      const { elementTypeOf } = await import('./cuda/weights.ts');
      const { PAIR_BYTES } = await import('./cuda/sizes.ts');
      const { maxNumSeqs, maxNumBatchedTokens, role, transfer, transport, wire } = config;
      const type = await elementTypeOf(dir, model);
      const fingerprint = await fingerprintOf(dir, model, { dtype: type, blockSize });
      const { executor, numBlocks } = await createCudaExecutor({
        ...common,
        type,
        numBlocks: config.numBlocks,
        maxModelLen,
        maxNumSeqs,
        maxNumBatchedTokens,
        utilization: config.gpuMemoryUtilization,
        sharers: config.workersPerGpu,
        // neither received KV nor communicators where all is written into place
        reserved:
          role === 'both' || (transport === 'direct' && wire === 'native')
            ? 0
            : transfer.kvBufferSize + PAIR_BYTES,
        batchInvariant: config.batchInvariant,
        ...(log && { log }),
      });
      return { executor, fingerprint, maxModelLen, numBlocks };
    }
    default:
      return unreachable(config.executor, 'executor');
  }
}

function modelLength(config: WorkerConfig, model: ModelConfig): number {
  const { maxModelLen = model.maxPositionEmbeddings } = config;
  if (maxModelLen > model.maxPositionEmbeddings) {
    throw new PdError(
      'CONFIG_INVALID',
      `--max-model-len ${maxModelLen}: ${model.name} knows ${model.maxPositionEmbeddings} positions (1 to ${model.maxPositionEmbeddings} are allowed)`,
    );
  }
  return maxModelLen;
}

/** Room for min(maxNumSeqs, 64) full sequences within 1 GiB, but always for one. */
function defaultHostBlocks(config: WorkerConfig, model: ModelConfig, maxModelLen: number): number {
  const perSequence = Math.ceil(maxModelLen / config.blockSize);
  const layout = kvLayout(model, { dtype: 'float32', blockSize: config.blockSize });
  const within = Math.floor(HOST_KV_BYTES / (blockBytes(layout) * model.layers));
  return Math.max(perSequence, Math.min(perSequence * Math.min(config.maxNumSeqs, FULL_SEQUENCES), within));
}
