import { writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { demoModelDir } from '../../../src/config/demo-model.ts';
import { parseModelConfig, readModelConfig } from '../../../src/model/config.ts';
import { ropeFrequencies } from '../../../src/model/rope-config.ts';
import { tempDir } from '../../support/temp-dir.ts';
import { TINY_CONFIG } from '../../support/tiny-model.ts';

const parse = (config: object, generation?: object) =>
  parseModelConfig({ ...TINY_CONFIG, ...config }, generation, 'models/tiny');
const error = (run: () => unknown) => {
  try {
    run();
  } catch (thrown) {
    return thrown;
  }
  return undefined;
};

describe('model configuration', () => {
  it('reads the demo model, with both of its stop tokens', async () => {
    expect(await readModelConfig(demoModelDir())).toMatchObject({
      architecture: 'LlamaForCausalLM',
      name: 'demo',
      layers: 6,
      hidden: 128,
      heads: 4,
      kvHeads: 2,
      headDim: 32,
      vocab: 2048,
      rope: { theta: 10_000, scaling: { kind: 'none' } },
      tieWordEmbeddings: true,
      maxPositionEmbeddings: 2048,
      eosTokenIds: [1, 2],
      bosTokenId: 0,
    });
  });

  it('fills in what older checkpoints leave out', () => {
    const config = parse({ head_dim: undefined, num_key_value_heads: null, hidden_size: 32 });
    expect(config).toMatchObject({ kvHeads: 4, headDim: 8 });
  });

  it('joins the stop tokens of both files', () => {
    expect(parse({ eos_token_id: [3, 4] }, { eos_token_id: 5 }).eosTokenIds).toEqual([3, 4, 5]);
  });

  it.each([
    ['rope_theta and rope_scaling', { rope_theta: 500_000, rope_scaling: { rope_type: 'llama3' } }],
    ['the older name of the type', { rope_theta: 500_000, rope_scaling: { type: 'llama3' } }],
    [
      'rope_parameters',
      { rope_theta: undefined, rope_parameters: { rope_theta: 500_000, rope_type: 'llama3' } },
    ],
  ])('reads Llama 3 RoPE scaling from %s', (_, fields) => {
    const numbers = {
      factor: 8,
      low_freq_factor: 1,
      high_freq_factor: 4,
      original_max_position_embeddings: 8192,
    };
    const json = Object.fromEntries(
      Object.entries(fields).map(([key, value]) => [
        key,
        typeof value === 'object' ? { ...value, ...numbers } : value,
      ]),
    );
    expect(parse(json).rope).toEqual({
      theta: 500_000,
      scaling: { kind: 'llama3', factor: 8, lowFreqFactor: 1, highFreqFactor: 4, originalMaxPositions: 8192 },
    });
  });

  it('divides long wavelengths alone under Llama 3 scaling', () => {
    const scaling = {
      kind: 'llama3',
      factor: 8,
      lowFreqFactor: 1,
      highFreqFactor: 4,
      originalMaxPositions: 8192,
    } as const;
    const plain = ropeFrequencies({ theta: 500_000, scaling: { kind: 'none' } }, 128);
    const scaled = ropeFrequencies({ theta: 500_000, scaling }, 128);
    expect(scaled[0]).toBe(plain[0]);
    expect(scaled[63]).toBe(plain[63]! / 8);
    const ratios = Array.from(scaled, (value, i) => plain[i]! / value);
    expect(ratios.every((ratio, i) => i === 0 || ratio >= ratios[i - 1]!)).toBe(true);
  });

  it('tells the four architectures apart, and windows that hide nothing or are not in use', () => {
    const features = (name: string, fields: object = {}) => {
      const { attentionBias, qkNorm, headDim } = parse({ architectures: [`${name}ForCausalLM`], ...fields });
      return { attentionBias, qkNorm, headDim };
    };
    expect(features('Llama')).toEqual({ attentionBias: false, qkNorm: false, headDim: 8 });
    expect(features('Mistral', { sliding_window: null })).toEqual(features('Llama'));
    expect(features('Mistral', { sliding_window: 256 })).toEqual(features('Llama'));
    const unused = { use_sliding_window: false, sliding_window: 64 };
    expect(features('Qwen2', unused)).toEqual({ attentionBias: true, qkNorm: false, headDim: 8 });
    const absent = { head_dim: undefined, ...unused };
    expect(features('Qwen3', absent)).toEqual({ attentionBias: false, qkNorm: true, headDim: 128 });
  });

  it.each([
    [
      'architecture',
      { architectures: ['GPT2LMHeadModel'] },
      /GPT2LMHeadModel is not known; known: LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM/,
    ],
    ['sliding window', { sliding_window: 100 }, /"sliding_window": 100 is not supported.*256 positions/],
    [
      "Mistral's own sliding window",
      { architectures: ['MistralForCausalLM'], max_position_embeddings: 8192 },
      /"sliding_window": 4096/,
    ],
    [
      'sliding window in use',
      { architectures: ['Qwen2ForCausalLM'], use_sliding_window: true, sliding_window: 64 },
      /"sliding_window": 64/,
    ],
    ['quantization', { quantization_config: { quant_method: 'awq' } }, /quantization_config.*awq/],
    ['attention bias', { attention_bias: true }, /"attention_bias": true/],
    ['activation', { hidden_act: 'gelu' }, /"hidden_act": "gelu"/],
    ['RoPE type', { rope_scaling: { rope_type: 'yarn', factor: 4 } }, /RoPE type "yarn"/],
    ['layer types', { layer_types: ['full_attention', 'sliding_attention'] }, /"sliding_attention"/],
  ])('refuses what it does not compute: %s', (_, fields, message) => {
    expect(error(() => parse(fields))).toMatchObject({
      code: 'MODEL_UNSUPPORTED',
      message: expect.stringMatching(message),
    });
  });

  it.each([
    ['no number of layers', { num_hidden_layers: undefined }, /num_hidden_layers/],
    ['heads that do not divide', { num_key_value_heads: 3 }, /4 query heads cannot share 3 KV heads/],
    ['an odd head size', { head_dim: 7 }, /head size 7/],
    ['half a Llama 3 scaling', { rope_scaling: { rope_type: 'llama3', factor: 8 } }, /low_freq_factor/],
    ['a stop token outside', { eos_token_id: 50 }, /eos_token_id 50/],
    ['no architecture', { architectures: [] }, /names no architecture/],
  ])('refuses a broken configuration: %s', (_, fields, message) => {
    expect(error(() => parse(fields))).toMatchObject({
      code: 'CHECKPOINT_INVALID',
      message: expect.stringMatching(message),
    });
  });

  it('names the directory that holds no checkpoint, and the file that is no JSON', async () => {
    const dir = await tempDir();
    await expect(readModelConfig(dir)).rejects.toMatchObject({
      code: 'CHECKPOINT_INVALID',
      message: expect.stringContaining(dir),
    });
    await writeFile(join(dir, 'config.json'), '{"architectures": [');
    await expect(readModelConfig(dir)).rejects.toMatchObject({
      code: 'CHECKPOINT_INVALID',
      message: expect.stringContaining(join(dir, 'config.json')),
    });
  });
});
