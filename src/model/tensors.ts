/** The tensors of a checkpoint: their names, and the shapes that config.json implies. One table for every executor. Pure. */
import type { ModelConfig } from './config.ts';

export interface Tensor {
  readonly name: string;
  readonly shape: readonly number[];
}

/** A value for each tensor of one layer. Matrices are [outputs, inputs], row-major. */
export interface LayerTensors<T> {
  /** [hidden] */
  readonly inputNorm: T;
  /** [heads * headDim, hidden] */
  readonly query: T;
  /** [kvHeads * headDim, hidden] */
  readonly key: T;
  /** [kvHeads * headDim, hidden] */
  readonly value: T;
  /** Absent without attention bias: [heads * headDim], [kvHeads * headDim] twice. */
  readonly bias?: { readonly query: T; readonly key: T; readonly value: T };
  /** Absent without q/k norm; each [headDim]. */
  readonly headNorm?: { readonly query: T; readonly key: T };
  /** [hidden, heads * headDim] */
  readonly output: T;
  /** [hidden] */
  readonly postNorm: T;
  /** [intermediate, hidden] */
  readonly gate: T;
  /** [intermediate, hidden] */
  readonly up: T;
  /** [hidden, intermediate] */
  readonly down: T;
}

export interface ModelTensors<T> {
  /** [vocab, hidden] */
  readonly embedding: T;
  readonly layers: readonly LayerTensors<T>[];
  /** [hidden] */
  readonly finalNorm: T;
  /** [vocab, hidden]; the embedding itself where tied. */
  readonly head: T;
}

export function modelTensors(config: ModelConfig): ModelTensors<Tensor> {
  const { vocab, hidden, layers, tieWordEmbeddings } = config;
  const embedding = { name: 'model.embed_tokens.weight', shape: [vocab, hidden] };
  return {
    embedding,
    layers: Array.from({ length: layers }, (_, index) => layerTensors(config, `model.layers.${index}`)),
    finalNorm: { name: 'model.norm.weight', shape: [hidden] },
    head: tieWordEmbeddings ? embedding : { name: 'lm_head.weight', shape: [vocab, hidden] },
  };
}

function layerTensors(config: ModelConfig, prefix: string): LayerTensors<Tensor> {
  const { hidden, intermediate, headDim, attentionBias, qkNorm } = config;
  const queries = config.heads * headDim;
  const keys = config.kvHeads * headDim;
  const tensor = (name: string, ...shape: number[]): Tensor => ({ name: `${prefix}.${name}`, shape });
  return {
    inputNorm: tensor('input_layernorm.weight', hidden),
    query: tensor('self_attn.q_proj.weight', queries, hidden),
    key: tensor('self_attn.k_proj.weight', keys, hidden),
    value: tensor('self_attn.v_proj.weight', keys, hidden),
    ...(attentionBias && {
      bias: {
        query: tensor('self_attn.q_proj.bias', queries),
        key: tensor('self_attn.k_proj.bias', keys),
        value: tensor('self_attn.v_proj.bias', keys),
      },
    }),
    ...(qkNorm && {
      headNorm: {
        query: tensor('self_attn.q_norm.weight', headDim),
        key: tensor('self_attn.k_norm.weight', headDim),
      },
    }),
    output: tensor('self_attn.o_proj.weight', hidden, queries),
    postNorm: tensor('post_attention_layernorm.weight', hidden),
    gate: tensor('mlp.gate_proj.weight', intermediate, hidden),
    up: tensor('mlp.up_proj.weight', intermediate, hidden),
    down: tensor('mlp.down_proj.weight', hidden, intermediate),
  };
}

/** Elements of all tensors together; a tied head counts once. */
export function elementCount({ embedding, layers, finalNorm, head }: ModelTensors<Tensor>): number {
  const all = new Set([embedding, finalNorm, head]);
  for (const { bias, headNorm, ...plain } of layers) {
    for (const tensor of Object.values({ ...plain })) all.add(tensor);
    for (const tensor of [...Object.values({ ...bias }), ...Object.values({ ...headNorm })]) all.add(tensor);
  }
  let count = 0;
  for (const { shape } of all) count += elementsOf(shape);
  return count;
}

export function elementsOf(shape: readonly number[]): number {
  return shape.reduce((product, dim) => product * dim, 1);
}
