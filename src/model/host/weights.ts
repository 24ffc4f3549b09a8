/** The weights of a Llama as float32 on the host, each checked against the shape that config.json implies. */
import type { ModelConfig } from '../config.ts';
import { Checkpoint } from '../safetensors.ts';
import { type LayerTensors, type ModelTensors, modelTensors, type Tensor } from '../tensors.ts';

export type LlamaLayerWeights = LayerTensors<Float32Array>;
export type LlamaWeights = ModelTensors<Float32Array>;

/** Throws CHECKPOINT_INVALID naming file, tensor and both shapes. */
export async function loadLlamaWeights(dir: string, config: ModelConfig): Promise<LlamaWeights> {
  const tensors = modelTensors(config);
  const checkpoint = await Checkpoint.open(dir);
  const load = (tensor: Tensor) => checkpoint.tensor(tensor);
  const loadAll = async <Name extends string>(named: Readonly<Record<Name, Tensor>>) => {
    const loaded = {} as Record<Name, Float32Array>;
    for (const name of Object.keys(named) as Name[]) loaded[name] = await load(named[name]);
    return loaded;
  };
  try {
    const embedding = await load(tensors.embedding);
    const layers: LlamaLayerWeights[] = [];
    for (const { bias, headNorm, ...plain } of tensors.layers) {
      layers.push({
        ...(await loadAll(plain)),
        ...(bias && { bias: await loadAll(bias) }),
        ...(headNorm && { headNorm: await loadAll(headNorm) }),
      });
    }
    const finalNorm = await load(tensors.finalNorm);
    const head = tensors.head === tensors.embedding ? embedding : await load(tensors.head);
    return { embedding, layers, finalNorm, head };
  } finally {
    await checkpoint.dispose();
  }
}
