/** The weights of a model in GPU memory, 16 bits each, q/k/v and gate/up joined into one matrix each: one product instead of three or two. */
import type { CudaDevice } from '../../device/cuda/device.ts';
import type { DevicePointer } from '../../device/device.ts';
import { sliceMemory } from '../../device/memory.ts';
import { PdError } from '../../errors.ts';
import { binarySize } from '../../observability/bytes.ts';
import type { Logger } from '../../observability/log.ts';
import type { ModelConfig } from '../config.ts';
import { Checkpoint } from '../safetensors.ts';
import {
  elementCount,
  elementsOf,
  type LayerTensors,
  type ModelTensors,
  modelTensors,
  type Tensor,
} from '../tensors.ts';
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
    return checkpoint.stored(modelTensors(config).embedding).type === 'float16' ? 'float16' : 'bfloat16';
  } finally {
    await checkpoint.dispose();
  }
}

/** Throws OUT_OF_DEVICE_MEMORY saying by how much, before anything is read; CHECKPOINT_INVALID naming file, tensor and both shapes. */
export async function loadCudaWeights(
  dir: string,
  config: ModelConfig,
  type: ElementType,
  device: CudaDevice,
  log?: Logger,
): Promise<CudaWeights> {
  const tensors = modelTensors(config);
  const bytes = 2 * elementCount(tensors);
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
    const weights = await new Loader(device, upload).load(tensors);
    await upload.finish();
    return { type, ...weights, bytes };
  } finally {
    progress?.end();
    await upload?.dispose();
    await checkpoint.dispose();
  }
}

class Loader {
  readonly #device: CudaDevice;
  readonly #upload: WeightUpload;

  constructor(device: CudaDevice, upload: WeightUpload) {
    this.#device = device;
    this.#upload = upload;
  }

  async load(tensors: ModelTensors<Tensor>): Promise<Omit<CudaWeights, 'type' | 'bytes'>> {
    const embedding = await this.#matrix('embedding', [tensors.embedding]);
    const layers: CudaLayerWeights[] = [];
    for (const [index, layer] of tensors.layers.entries()) layers.push(await this.#layer(layer, index));
    const finalNorm = await this.#vector(tensors.finalNorm);
    const tied = tensors.head === tensors.embedding;
    const head = tied ? embedding : await this.#matrix('output head', [tensors.head]);
    return { embedding, layers, finalNorm, head };
  }

  async #layer({ bias, headNorm, ...layer }: LayerTensors<Tensor>, index: number): Promise<CudaLayerWeights> {
    const of = (what: string) => `${what} of layer ${index}`;
    return {
      inputNorm: await this.#vector(layer.inputNorm),
      qkv: await this.#matrix(of('q, k and v projection'), [layer.query, layer.key, layer.value]),
      ...(bias && { qkvBias: await this.#joined(of('q, k and v bias'), [bias.query, bias.key, bias.value]) }),
      ...(headNorm && {
        queryNorm: await this.#vector(headNorm.query),
        keyNorm: await this.#vector(headNorm.key),
      }),
      output: await this.#matrix(of('output projection'), [layer.output]),
      postNorm: await this.#vector(layer.postNorm),
      gateUp: await this.#matrix(of('gate and up projection'), [layer.gate, layer.up]),
      down: await this.#matrix(of('down projection'), [layer.down]),
    };
  }

  /** Tensors [outputs, inputs] one below the other. */
  async #matrix(what: string, parts: readonly Tensor[]): Promise<Matrix> {
    const pointer = await this.#joined(what, parts);
    const outputs = parts.reduce((sum, { shape }) => sum + shape[0]!, 0);
    return { pointer, outputs, inputs: parts[0]!.shape[1]! };
  }

  #vector(tensor: Tensor): Promise<DevicePointer> {
    return this.#joined(tensor.name, [tensor]);
  }

  /** Tensors one after the other, in memory of their own. */
  async #joined(what: string, parts: readonly Tensor[]): Promise<DevicePointer> {
    const sizes = parts.map(({ shape }) => 2 * elementsOf(shape));
    const memory = this.#device.allocate(
      sizes.reduce((sum, bytes) => sum + bytes, 0),
      what,
    );
    let at = 0;
    for (const [i, tensor] of parts.entries()) {
      await this.#upload.put(sliceMemory(memory, at, sizes[i]!), tensor);
      at += sizes[i]!;
    }
    return memory.pointer;
  }
}
