/** Checkpoints with random weights, of any architecture and shape that the executors support. */
import { writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import type { Architecture } from '../src/model/config.ts';
import { uniform } from '../src/model/random.ts';
import { type FloatType, type TestTensor, writeSafetensors } from './safetensors-writer.ts';

export interface RandomModel {
  readonly architecture: Architecture;
  readonly type?: FloatType;
  readonly tied?: boolean;
  readonly layers?: number;
  readonly hidden?: number;
  readonly heads?: number;
  readonly kvHeads?: number;
  readonly headDim?: number;
  readonly intermediate?: number;
  readonly vocab?: number;
  /** Replaces or adds fields of config.json. */
  readonly config?: Readonly<Record<string, unknown>>;
}

/** Writes config.json and the weights into `dir`. */
export async function writeRandomModel(dir: string, model: RandomModel): Promise<void> {
  const {
    architecture,
    type = 'BF16',
    tied = false,
    layers = 2,
    hidden = 64,
    heads = 4,
    kvHeads = 2,
  } = model;
  const { headDim = 32, intermediate = 96, vocab = 80 } = model;
  const json = {
    architectures: [architecture],
    hidden_act: 'silu',
    hidden_size: hidden,
    intermediate_size: intermediate,
    num_hidden_layers: layers,
    num_attention_heads: heads,
    num_key_value_heads: kvHeads,
    head_dim: headDim,
    vocab_size: vocab,
    max_position_embeddings: 512,
    rms_norm_eps: 1e-5,
    rope_theta: 10_000,
    tie_word_embeddings: tied,
    sliding_window: null,
    bos_token_id: 0,
    eos_token_id: 1,
    ...model.config,
  };
  await writeFile(join(dir, 'config.json'), JSON.stringify(json));
  const tensors = new Map<string, TestTensor>();
  const add = (name: string, shape: readonly number[]) => {
    const count = shape.reduce((product, dim) => product * dim, 1);
    const at = tensors.size;
    const norm = name.includes('norm');
    const scale = shape.length === 1 ? 0.5 : 2 / Math.sqrt(shape[1]!);
    const values = Float32Array.from({ length: count }, (_, i) => {
      const random = uniform(7, at, i);
      return norm ? 0.5 + random : (random - 0.5) * scale;
    });
    tensors.set(name, { shape, values });
  };
  add('model.embed_tokens.weight', [vocab, hidden]);
  for (let i = 0; i < layers; i++) {
    const layer = `model.layers.${i}`;
    add(`${layer}.input_layernorm.weight`, [hidden]);
    for (const [name, count] of [
      ['q', heads],
      ['k', kvHeads],
      ['v', kvHeads],
    ] as const) {
      add(`${layer}.self_attn.${name}_proj.weight`, [count * headDim, hidden]);
      if (architecture === 'Qwen2ForCausalLM') add(`${layer}.self_attn.${name}_proj.bias`, [count * headDim]);
      if (architecture === 'Qwen3ForCausalLM' && name !== 'v') {
        add(`${layer}.self_attn.${name}_norm.weight`, [headDim]);
      }
    }
    add(`${layer}.self_attn.o_proj.weight`, [hidden, heads * headDim]);
    add(`${layer}.post_attention_layernorm.weight`, [hidden]);
    add(`${layer}.mlp.gate_proj.weight`, [intermediate, hidden]);
    add(`${layer}.mlp.up_proj.weight`, [intermediate, hidden]);
    add(`${layer}.mlp.down_proj.weight`, [hidden, intermediate]);
  }
  add('model.norm.weight', [hidden]);
  if (!tied) add('lm_head.weight', [vocab, hidden]);
  await writeSafetensors(dir, tensors, { type, shards: 2 });
}
