/** The weights of a model in GPU memory, 16 bits each, q/k/v and gate/up joined into one matrix each: one product instead of three or two. */
import type { CudaDevice } from '../../device/cuda/device.ts';
import type { DevicePointer, MemoryRef } from '../../device/device.ts';
import { sliceMemory } from '../../device/memory.ts';
import { PdError } from '../../errors.ts';
import { binarySize } from '../../observability/bytes.ts';
import type { Logger } from '../../observability/log.ts';
import type { ModelConfig } from '../config.ts';
import { Checkpoint } from '../safetensors.ts';
import type { ElementType, Matrix } from './kernels.ts';
import { LoadProgress } from './load-progress.ts';
import { WeightUpload } from './upload.ts';

export interface CudaLayerWeights {
  readonly inputNorm: DevicePointer;
  /** [(heads + 2 kvHeads) * headDim, hidden]: q, k, v. */
  readonly qkv: Matrix;
  /** As the outputs of `qkv`. */
  readonly qkvBias?: DevicePointer;
  readonly queryNorm?: DevicePointer;
  readonly keyNorm?: DevicePointer;
  /** [hidden, heads * headDim] */
  readonly output: Matrix;
  readonly postNorm: DevicePointer;
  /** [2 * intermediate, hidden]: gate, up. */
  readonly gateUp: Matrix;
  /** [hidden, intermediate] */
  readonly down: Matrix;
}

export interface CudaWeights {
  readonly type: ElementType;
  /** [vocab, hidden] */
  readonly embedding: Matrix;
  readonly layers: readonly CudaLayerWeights[];
  readonly finalNorm: DevicePointer;
  /** The embedding itself where tied. */
  readonly head: Matrix;
  readonly bytes: number;
}

/** Float16 stays; bfloat16 stays; float32 becomes bfloat16, whose range it shares. */
export async function elementTypeOf(dir: string, config: ModelConfig): Promise<ElementType> {
  const checkpoint = await Checkpoint.open(dir);
  try {
    const { dtype } = checkpoint.stored('model.embed_tokens.weight', [config.vocab, config.hidden]);
    return dtype === 'F16' ? 'float16' : 'bfloat16';
  } finally {
    await checkpoint.dispose();
  }
}

/** Bytes that `loadCudaWeights` takes. */
export function weightBytes(config: ModelConfig): number {
  const { layers, hidden, heads, kvHeads, headDim, intermediate, vocab } = config;
  const qkv = (heads + 2 * kvHeads) * headDim;
  const norms = 2 * hidden + (config.qkNorm ? 2 * headDim : 0) + (config.attentionBias ? qkv : 0);
  const layer = qkv * hidden + hidden * heads * headDim + 3 * intermediate * hidden + norms;
  return 2 * (layers * layer + vocab * hidden * (config.tieWordEmbeddings ? 1 : 2) + hidden);
}

/** Throws OUT_OF_DEVICE_MEMORY saying by how much, before anything is read; CHECKPOINT_INVALID naming file, tensor and both shapes. */
export async function loadCudaWeights(
  dir: string,
  config: ModelConfig,
  type: ElementType,
  device: CudaDevice,
  log?: Logger,
): Promise<CudaWeights> {
  const bytes = weightBytes(config);
  device.enter();
  const { free, total } = device.runtime.memoryInfo();
  if (bytes > free) {
    throw new PdError(
      'OUT_OF_DEVICE_MEMORY',
      `the weights of ${config.name} take ${binarySize(bytes)}, ${device.name} has ${binarySize(free)} of ${binarySize(total)} free: ${binarySize(bytes - free)} too little`,
      { wanted: bytes, free, total },
    );
  }
  const checkpoint = await Checkpoint.open(dir);
  const progress = log?.isLevelEnabled('info') ? new LoadProgress(config.name, bytes, log) : undefined;
  let upload: WeightUpload | undefined;
  try {
    upload = await WeightUpload.create(checkpoint, device, type, (arrived) => progress?.add(arrived));
    const weights = await new Loader(device, upload, config).load(type, bytes);
    await upload.finish();
    return weights;
  } finally {
    progress?.end();
    await upload?.dispose();
    await checkpoint.dispose();
  }
}

class Loader {
  readonly #device: CudaDevice;
  readonly #upload: WeightUpload;
  readonly #config: ModelConfig;

  constructor(device: CudaDevice, upload: WeightUpload, config: ModelConfig) {
    this.#device = device;
    this.#upload = upload;
    this.#config = config;
  }

  async load(type: ElementType, bytes: number): Promise<CudaWeights> {
    const { vocab, hidden, layers, tieWordEmbeddings } = this.#config;
    const embedding = await this.#matrix('embedding', hidden, [['model.embed_tokens.weight', vocab]]);
    const loaded: CudaLayerWeights[] = [];
    for (let i = 0; i < layers; i++) loaded.push(await this.#layer(`model.layers.${i}`));
    const finalNorm = await this.#vector('model.norm.weight', hidden);
    const head = tieWordEmbeddings
      ? embedding
      : await this.#matrix('output head', hidden, [['lm_head.weight', vocab]]);
    return { type, embedding, layers: loaded, finalNorm, head, bytes };
  }

  async #layer(prefix: string): Promise<CudaLayerWeights> {
    const { hidden, intermediate, heads, kvHeads, headDim, attentionBias, qkNorm } = this.#config;
    const attention = `${prefix}.self_attn`;
    const projections = [
      [`${attention}.q_proj`, heads * headDim],
      [`${attention}.k_proj`, kvHeads * headDim],
      [`${attention}.v_proj`, kvHeads * headDim],
    ] as const;
    const weightsOf = (parts: readonly (readonly [string, number])[]) =>
      parts.map(([name, outputs]) => [`${name}.weight`, outputs] as const);
    return {
      inputNorm: await this.#vector(`${prefix}.input_layernorm.weight`, hidden),
      qkv: await this.#matrix(`${attention}.qkv`, hidden, weightsOf(projections)),
      ...(attentionBias && { qkvBias: await this.#biases(`${attention}.qkv`, projections) }),
      ...(qkNorm && {
        queryNorm: await this.#vector(`${attention}.q_norm.weight`, headDim),
        keyNorm: await this.#vector(`${attention}.k_norm.weight`, headDim),
      }),
      output: await this.#matrix(`${attention}.o_proj`, heads * headDim, [
        [`${attention}.o_proj.weight`, hidden],
      ]),
      postNorm: await this.#vector(`${prefix}.post_attention_layernorm.weight`, hidden),
      gateUp: await this.#matrix(
        `${prefix}.mlp.gate_up`,
        hidden,
        weightsOf([
          [`${prefix}.mlp.gate_proj`, intermediate],
          [`${prefix}.mlp.up_proj`, intermediate],
        ]),
      ),
      down: await this.#matrix(`${prefix}.mlp.down_proj`, intermediate, [
        [`${prefix}.mlp.down_proj.weight`, hidden],
      ]),
    };
  }

  /** Tensors [outputs, inputs] one below the other. */
  async #matrix(
    what: string,
    inputs: number,
    parts: readonly (readonly [name: string, outputs: number])[],
  ): Promise<Matrix> {
    const outputs = parts.reduce((sum, [, count]) => sum + count, 0);
    const memory = this.#device.allocate(2 * outputs * inputs, what);
    await this.#putAll(
      memory,
      parts.map(([name, count]) => ({ name, shape: [count, inputs] })),
    );
    return { pointer: memory.pointer, outputs, inputs };
  }

  async #biases(what: string, parts: readonly (readonly [string, number])[]): Promise<DevicePointer> {
    const width = parts.reduce((sum, [, count]) => sum + count, 0);
    const memory = this.#device.allocate(2 * width, `${what} bias`);
    await this.#putAll(
      memory,
      parts.map(([name, count]) => ({ name: `${name}.bias`, shape: [count] })),
    );
    return memory.pointer;
  }

  async #vector(name: string, width: number): Promise<DevicePointer> {
    const memory = this.#device.allocate(2 * width, name);
    await this.#upload.put(memory, name, [width]);
    return memory.pointer;
  }

  async #putAll(
    memory: MemoryRef,
    tensors: readonly { readonly name: string; readonly shape: readonly number[] }[],
  ): Promise<void> {
    let at = 0;
    for (const { name, shape } of tensors) {
      const bytes = 2 * shape.reduce((product, dim) => product * dim, 1);
      await this.#upload.put(sliceMemory(memory, at, bytes), name, shape);
      at += bytes;
    }
  }
}
