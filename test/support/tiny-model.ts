/** A tiny Llama with random weights, written as a Hugging Face checkpoint. */
import { writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { uniform } from '../../src/model/random.ts';
import {
  type FloatType,
  type TestTensor,
  type TestTensors,
  writeSafetensors,
} from '../../support/safetensors-writer.ts';

export interface TinyOptions {
  readonly type?: FloatType;
  readonly shards?: number;
  readonly tied?: boolean;
  readonly seed?: number;
  /** Replaces or adds fields of config.json. */
  readonly config?: Readonly<Record<string, unknown>>;
}

export const TINY_CONFIG = {
  architectures: ['LlamaForCausalLM'],
  model_type: 'llama',
  hidden_act: 'silu',
  hidden_size: 24,
  intermediate_size: 40,
  num_hidden_layers: 2,
  num_attention_heads: 4,
  num_key_value_heads: 2,
  head_dim: 8,
  vocab_size: 50,
  max_position_embeddings: 256,
  rms_norm_eps: 1e-5,
  rope_theta: 10_000,
  tie_word_embeddings: false,
  bos_token_id: 0,
  eos_token_id: 1,
} as const;

/** Writes config.json and the weights into `dir`; what was written, unrounded. */
export async function writeTinyModel(
  dir: string,
  { type = 'F32', shards = 1, tied = false, seed = 1, config = {} }: TinyOptions = {},
): Promise<TestTensors> {
  const json = { ...TINY_CONFIG, tie_word_embeddings: tied, ...config };
  await writeFile(join(dir, 'config.json'), JSON.stringify(json));
  const tensors = tinyTensors(seed, tied);
  await writeSafetensors(dir, tensors, { type, shards });
  return tensors;
}

function tinyTensors(seed: number, tied: boolean): TestTensors {
  const { hidden_size: hidden, intermediate_size: inner, vocab_size: vocab } = TINY_CONFIG;
  const queries = TINY_CONFIG.num_attention_heads * TINY_CONFIG.head_dim;
  const keys = TINY_CONFIG.num_key_value_heads * TINY_CONFIG.head_dim;
  const tensors = new Map<string, TestTensor>();
  const add = (name: string, shape: readonly number[]) => {
    const count = shape.reduce((product, dim) => product * dim, 1);
    const at = tensors.size;
    const norm = shape.length === 1;
    const values = Float32Array.from({ length: count }, (_, i) => {
      const random = uniform(seed, at, i);
      return norm ? 0.5 + random : (random - 0.5) * 0.6;
    });
    tensors.set(`${name}.weight`, { shape, values });
  };
  add('model.embed_tokens', [vocab, hidden]);
  for (let i = 0; i < TINY_CONFIG.num_hidden_layers; i++) {
    const layer = `model.layers.${i}`;
    add(`${layer}.input_layernorm`, [hidden]);
    add(`${layer}.self_attn.q_proj`, [queries, hidden]);
    add(`${layer}.self_attn.k_proj`, [keys, hidden]);
    add(`${layer}.self_attn.v_proj`, [keys, hidden]);
    add(`${layer}.self_attn.o_proj`, [hidden, queries]);
    add(`${layer}.post_attention_layernorm`, [hidden]);
    add(`${layer}.mlp.gate_proj`, [inner, hidden]);
    add(`${layer}.mlp.up_proj`, [inner, hidden]);
    add(`${layer}.mlp.down_proj`, [hidden, inner]);
  }
  add('model.norm', [hidden]);
  if (!tied) add('lm_head', [vocab, hidden]);
  return tensors;
}
