/** A checkpoint's config.json as one validated shape. What a model requires and no executor computes is refused by name, never ignored. */
import { basename, join, resolve } from 'node:path';
import { PdError } from '../errors.ts';
import { z } from '../zod.ts';
import { checked, invalid, readJson } from './checked.ts';
import { type RopeConfig, readRope } from './rope-config.ts';

/** Architectures with an executor, as `architectures[0]` names them. A new one gets a reader in READERS. */
export const ARCHITECTURES = [
  'LlamaForCausalLM',
  'MistralForCausalLM',
  'Qwen2ForCausalLM',
  'Qwen3ForCausalLM',
] as const;
export type Architecture = (typeof ARCHITECTURES)[number];

export interface ModelConfig {
  readonly architecture: Architecture;
  /** Name for people: the checkpoint's directory. */
  readonly name: string;
  readonly layers: number;
  /** Width of the residual stream. */
  readonly hidden: number;
  /** Query heads, a multiple of `kvHeads`. */
  readonly heads: number;
  readonly kvHeads: number;
  /** Not always hidden / heads. Even: RoPE rotates halves. */
  readonly headDim: number;
  /** Width inside the feed-forward block. */
  readonly intermediate: number;
  readonly vocab: number;
  readonly rope: RopeConfig;
  readonly rmsNormEps: number;
  /** The output head is the embedding matrix. */
  readonly tieWordEmbeddings: boolean;
  /** The projections to q, k and v have a bias (Qwen2). */
  readonly attentionBias: boolean;
  /** RMSNorm over each head of q and k before RoPE (Qwen3). */
  readonly qkNorm: boolean;
  readonly maxPositionEmbeddings: number;
  readonly eosTokenIds: readonly number[];
  readonly bosTokenId?: number;
}

const positive = z.number().int().positive();
const tokenIds = z.union([z.number().int().nonnegative(), z.array(z.number().int().nonnegative())]).nullish();

const llamaSchema = z.looseObject({
  num_hidden_layers: positive,
  hidden_size: positive,
  num_attention_heads: positive,
  num_key_value_heads: positive.nullish(),
  head_dim: positive.nullish(),
  intermediate_size: positive,
  vocab_size: positive,
  max_position_embeddings: positive,
  sliding_window: positive.nullish(),
  use_sliding_window: z.boolean().nullish(),
  rms_norm_eps: z.number().positive().default(1e-6),
  rope_theta: z.number().positive().nullish(),
  rope_scaling: z.record(z.string(), z.unknown()).nullish(),
  rope_parameters: z.record(z.string(), z.unknown()).nullish(),
  tie_word_embeddings: z.boolean().default(false),
  eos_token_id: tokenIds,
  bos_token_id: z.number().int().nonnegative().nullish(),
});
type LlamaJson = z.infer<typeof llamaSchema>;
const stopsSchema = z.looseObject({ eos_token_id: tokenIds });

/** Fields that change what a model computes, and the values that the executors support. Absent and null count as the first. */
const REQUIRED: readonly { readonly field: string; readonly allowed: readonly unknown[] }[] = [
  { field: 'hidden_act', allowed: ['silu'] },
  { field: 'attention_bias', allowed: [false] },
  { field: 'mlp_bias', allowed: [false] },
  { field: 'quantization_config', allowed: [null] },
  { field: 'compression_config', allowed: [null] },
  { field: 'partial_rotary_factor', allowed: [1] },
  { field: 'pretraining_tp', allowed: [1, 0] },
  { field: 'num_local_experts', allowed: [null] },
  { field: 'num_experts', allowed: [null] },
  { field: 'is_encoder_decoder', allowed: [false] },
];

type Shape = Omit<ModelConfig, 'architecture' | 'name' | 'eosTokenIds'>;

/** All four are a Llama with small differences. Defaults that a config.json may leave out are those of transformers. */
const READERS: { readonly [A in Architecture]: (json: LlamaJson, where: string) => Shape } = {
  LlamaForCausalLM: (json, where) => {
    refuseWindow(json.sliding_window, json, where);
    return readLlama(json, where);
  },
  MistralForCausalLM: (json, where) => {
    refuseWindow(json.sliding_window === undefined ? 4096 : json.sliding_window, json, where);
    return readLlama(json, where);
  },
  Qwen2ForCausalLM: (json, where) => {
    refuseWindow(json.use_sliding_window ? json.sliding_window : undefined, json, where);
    return { ...readLlama(json, where), attentionBias: true };
  },
  Qwen3ForCausalLM: (json, where) => {
    refuseWindow(json.use_sliding_window ? json.sliding_window : undefined, json, where);
    return { ...readLlama({ ...json, head_dim: json.head_dim ?? 128 }, where), qkNorm: true };
  },
};

/**
 * Reads `config.json`, and the stop tokens of `generation_config.json` where there is one. Throws CHECKPOINT_INVALID where a file is
 * missing or broken, MODEL_UNSUPPORTED where the model needs what no executor computes.
 */
export async function readModelConfig(dir: string): Promise<ModelConfig> {
  const config = await readJson(join(dir, 'config.json'));
  if (config === undefined) {
    throw invalid(`${dir} holds no config.json: it is not a Hugging Face checkpoint`);
  }
  const generation = await readJson(join(dir, 'generation_config.json'));
  return parseModelConfig(config, generation, dir);
}

/** As `readModelConfig`, from the parsed files. */
export function parseModelConfig(config: unknown, generation: unknown, dir: string): ModelConfig {
  const where = join(dir, 'config.json');
  const architecture = architectureOf(config, where);
  refuseUnsupported(config as Record<string, unknown>, where);
  const json = checked(llamaSchema, config, where);
  const stops = checked(stopsSchema, generation ?? {}, join(dir, 'generation_config.json'));
  const shape = READERS[architecture](json, where);
  const eosTokenIds = [...new Set([json.eos_token_id ?? [], stops.eos_token_id ?? []].flat())];
  const outside = eosTokenIds.find((id) => id >= shape.vocab);
  if (outside !== undefined) {
    throw invalid(`${where}: eos_token_id ${outside} is outside of a vocabulary of ${shape.vocab}`);
  }
  return { architecture, name: basename(resolve(dir)), ...shape, eosTokenIds };
}

/** A window at least as long as the longest context hides nothing. */
function refuseWindow(tokens: number | null | undefined, json: LlamaJson, where: string): void {
  if (tokens == null || tokens >= json.max_position_embeddings) return;
  throw new PdError(
    'MODEL_UNSUPPORTED',
    `${where}: "sliding_window": ${tokens} is not supported (only null, or at least the ${json.max_position_embeddings} positions of the model)`,
  );
}

function readLlama(json: LlamaJson, where: string): Shape {
  const heads = json.num_attention_heads;
  const kvHeads = json.num_key_value_heads ?? heads;
  const headDim = json.head_dim ?? json.hidden_size / heads;
  if (heads % kvHeads !== 0) {
    throw invalid(`${where}: ${heads} query heads cannot share ${kvHeads} KV heads evenly`);
  }
  if (!Number.isInteger(headDim) || headDim % 2 !== 0) {
    throw invalid(`${where}: head size ${headDim} is not an even number`);
  }
  return {
    layers: json.num_hidden_layers,
    hidden: json.hidden_size,
    heads,
    kvHeads,
    headDim,
    intermediate: json.intermediate_size,
    vocab: json.vocab_size,
    rope: readRope(json, where),
    rmsNormEps: json.rms_norm_eps,
    tieWordEmbeddings: json.tie_word_embeddings,
    attentionBias: false,
    qkNorm: false,
    maxPositionEmbeddings: json.max_position_embeddings,
    ...(json.bos_token_id != null && { bosTokenId: json.bos_token_id }),
  };
}

function architectureOf(config: unknown, where: string): Architecture {
  const parsed = z.looseObject({ architectures: z.array(z.string()).min(1) }).safeParse(config);
  if (!parsed.success) {
    throw invalid(`${where} names no architecture ("architectures": [...])`);
  }
  const name = parsed.data.architectures[0]!;
  const known = ARCHITECTURES.find((architecture) => architecture === name);
  if (known === undefined) {
    throw new PdError(
      'MODEL_UNSUPPORTED',
      `${where}: architecture ${name} is not known; known: ${ARCHITECTURES.join(', ')}`,
    );
  }
  return known;
}

function refuseUnsupported(config: Record<string, unknown>, where: string): void {
  for (const { field, allowed } of REQUIRED) {
    const value = config[field] ?? allowed[0];
    if (!allowed.includes(value)) {
      throw new PdError(
        'MODEL_UNSUPPORTED',
        `${where}: "${field}": ${JSON.stringify(value)} is not supported (only ${allowed.map((v) => JSON.stringify(v)).join(', ')})`,
      );
    }
  }
  const layerTypes = config['layer_types'];
  const other = Array.isArray(layerTypes) ? layerTypes.find((type) => type !== 'full_attention') : undefined;
  if (other !== undefined) {
    throw new PdError(
      'MODEL_UNSUPPORTED',
      `${where}: layer type ${JSON.stringify(other)} is not supported (only "full_attention")`,
    );
  }
}
