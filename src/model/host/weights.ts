/** The weights of a Llama as float32 on the host, each checked against the shape that config.json implies. */
import type { ModelConfig } from '../config.ts';
import { Checkpoint } from '../safetensors.ts';

export interface LlamaLayerWeights {
  /** [hidden] */
  readonly inputNorm: Float32Array;
  /** [heads * headDim, hidden] */
  readonly query: Float32Array;
  /** [kvHeads * headDim, hidden] */
  readonly key: Float32Array;
  /** [kvHeads * headDim, hidden] */
  readonly value: Float32Array;
  /** Absent without attention bias: [heads * headDim], [kvHeads * headDim] twice. */
  readonly bias?: { readonly query: Float32Array; readonly key: Float32Array; readonly value: Float32Array };
  /** Absent without q/k norm; each [headDim]. */
  readonly headNorm?: { readonly query: Float32Array; readonly key: Float32Array };
  /** [hidden, heads * headDim] */
  readonly output: Float32Array;
  /** [hidden] */
  readonly postNorm: Float32Array;
  /** [intermediate, hidden] */
  readonly gate: Float32Array;
  /** [intermediate, hidden] */
  readonly up: Float32Array;
  /** [hidden, intermediate] */
  readonly down: Float32Array;
}

export interface LlamaWeights {
  /** [vocab, hidden] */
  readonly embedding: Float32Array;
  readonly layers: readonly LlamaLayerWeights[];
  /** [hidden] */
  readonly finalNorm: Float32Array;
  /** [vocab, hidden]; the embedding itself where tied. */
  readonly head: Float32Array;
}

/** Throws CHECKPOINT_INVALID naming file, tensor and both shapes. */
export async function loadLlamaWeights(dir: string, config: ModelConfig): Promise<LlamaWeights> {
  const checkpoint = await Checkpoint.open(dir);
  try {
    const embedding = await checkpoint.tensor('model.embed_tokens.weight', [config.vocab, config.hidden]);
    const layers: LlamaLayerWeights[] = [];
    for (let i = 0; i < config.layers; i++)
      layers.push(await loadLayer(checkpoint, config, `model.layers.${i}`));
    const finalNorm = await checkpoint.tensor('model.norm.weight', [config.hidden]);
    const head = config.tieWordEmbeddings
      ? embedding
      : await checkpoint.tensor('lm_head.weight', [config.vocab, config.hidden]);
    return { embedding, layers, finalNorm, head };
  } finally {
    await checkpoint.dispose();
  }
}

async function loadLayer(
  checkpoint: Checkpoint,
  config: ModelConfig,
  prefix: string,
): Promise<LlamaLayerWeights> {
  const { hidden, intermediate } = config;
  const queries = config.heads * config.headDim;
  const keys = config.kvHeads * config.headDim;
  const load = (name: string, shape: readonly number[]) =>
    checkpoint.tensor(`${prefix}.${name}.weight`, shape);
  return {
    inputNorm: await load('input_layernorm', [hidden]),
    query: await load('self_attn.q_proj', [queries, hidden]),
    key: await load('self_attn.k_proj', [keys, hidden]),
    value: await load('self_attn.v_proj', [keys, hidden]),
    ...(config.attentionBias && {
      bias: {
        query: await checkpoint.tensor(`${prefix}.self_attn.q_proj.bias`, [queries]),
        key: await checkpoint.tensor(`${prefix}.self_attn.k_proj.bias`, [keys]),
        value: await checkpoint.tensor(`${prefix}.self_attn.v_proj.bias`, [keys]),
      },
    }),
    ...(config.qkNorm && {
      headNorm: {
        query: await load('self_attn.q_norm', [config.headDim]),
        key: await load('self_attn.k_norm', [config.headDim]),
      },
    }),
    output: await load('self_attn.o_proj', [hidden, queries]),
    postNorm: await load('post_attention_layernorm', [hidden]),
    gate: await load('mlp.gate_proj', [intermediate, hidden]),
    up: await load('mlp.up_proj', [intermediate, hidden]),
    down: await load('mlp.down_proj', [hidden, intermediate]),
  };
}
