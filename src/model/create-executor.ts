/** From a worker's configuration to something that computes: reads the checkpoint, sizes the KV cache, makes the executor. */
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

/** What the default size of the KV cache on the host stays under, all layers together. */
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
  /** Where the cache lies, if not in plain memory of the device. */
  readonly allocateCache?: CacheAllocator;
  /** Told how loading goes. */
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
  const files = LogitsFiles.open({ dir: config.debugLogits, role: config.role, ...(log && { log }) });
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
  const model = await readModelConfig(config.modelDir);
  const maxModelLen = modelLength(config, model);
  switch (config.executor) {
    case 'host': {
      const numBlocks = config.numBlocks ?? defaultHostBlocks(config, model, maxModelLen);
      const { blockSize } = config;
      const fingerprint = await fingerprintOf(config.modelDir, model, { dtype: 'float32', blockSize });
      const executor = await HostExecutor.create({
        dir: config.modelDir,
        config: model,
        device,
        blockSize,
        numBlocks,
        allocateCache,
      });
      return { executor, fingerprint, maxModelLen, numBlocks };
    }
    case 'cuda': {
      // Loaded where it is asked for: a machine without a GPU needs none of its libraries.
      const { createCudaExecutor } = await import('./cuda/create.ts');
      const { elementTypeOf } = await import('./cuda/weights.ts');
      const { PAIR_BYTES } = await import('./cuda/sizes.ts');
      const { blockSize, maxNumSeqs, maxNumBatchedTokens, role, transfer, transport, wire } = config;
      const type = await elementTypeOf(config.modelDir, model);
      const fingerprint = await fingerprintOf(config.modelDir, model, { dtype: type, blockSize });
      const { executor, numBlocks } = await createCudaExecutor({
        dir: config.modelDir,
        config: model,
        device,
        type,
        blockSize,
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
        allocateCache,
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

/** Room for min(maxNumSeqs, 64) full sequences within 1 GiB, and for one in any case. */
function defaultHostBlocks(config: WorkerConfig, model: ModelConfig, maxModelLen: number): number {
  const perSequence = Math.ceil(maxModelLen / config.blockSize);
  const layout = kvLayout(model, { dtype: 'float32', blockSize: config.blockSize });
  const within = Math.floor(HOST_KV_BYTES / (blockBytes(layout) * model.layers));
  return Math.max(perSequence, Math.min(perSequence * Math.min(config.maxNumSeqs, FULL_SEQUENCES), within));
}
