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
  try {
    const embedding = await load(tensors.embedding);
    const layers: LlamaLayerWeights[] = [];
    for (const { bias, headNorm, ...layer } of tensors.layers) {
      layers.push({
        inputNorm: await load(layer.inputNorm),
        query: await load(layer.query),
        key: await load(layer.key),
        value: await load(layer.value),
        ...(bias && {
          bias: {
            query: await load(bias.query),
            key: await load(bias.key),
            value: await load(bias.value),
          },
        }),
        ...(headNorm && {
          headNorm: { query: await load(headNorm.query), key: await load(headNorm.key) },
        }),
        output: await load(layer.output),
        postNorm: await load(layer.postNorm),
        gate: await load(layer.gate),
        up: await load(layer.up),
        down: await load(layer.down),
      });
    }
    const finalNorm = await load(tensors.finalNorm);
    const head = tensors.head === tensors.embedding ? embedding : await load(tensors.head);
    return { embedding, layers, finalNorm, head };
  } finally {
    await checkpoint.dispose();
  }
}
