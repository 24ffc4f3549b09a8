/** A checkpoint of the shape of an 8B Llama whose weights are one random piece over and over: written in seconds. */
import { closeSync, openSync, writeFileSync, writeSync } from 'node:fs';
import { join } from 'node:path';
import { toBfloat16 } from '../../support/safetensors-writer.ts';

const [HIDDEN, INNER, LAYERS, VOCAB] = [4_096, 14_336, 32, 128_256];
const PIECE = 2 ** 25;

export function writeLargeModel(dir: string): void {
  const config = {
    architectures: ['LlamaForCausalLM'],
    hidden_act: 'silu',
    hidden_size: HIDDEN,
    intermediate_size: INNER,
    num_hidden_layers: LAYERS,
    num_attention_heads: 32,
    num_key_value_heads: 8,
    head_dim: 128,
    vocab_size: VOCAB,
    max_position_embeddings: 8_192,
    rms_norm_eps: 1e-5,
    rope_theta: 500_000,
    tie_word_embeddings: false,
    bos_token_id: 0,
    eos_token_id: 1,
  };
  writeFileSync(join(dir, 'config.json'), JSON.stringify(config));
  const tensors: [string, readonly number[]][] = [['model.embed_tokens.weight', [VOCAB, HIDDEN]]];
  for (let i = 0; i < LAYERS; i++) {
    const of = (name: string, ...shape: number[]) =>
      tensors.push([`model.layers.${i}.${name}.weight`, shape]);
    of('input_layernorm', HIDDEN);
    of('self_attn.q_proj', HIDDEN, HIDDEN);
    of('self_attn.k_proj', 1_024, HIDDEN);
    of('self_attn.v_proj', 1_024, HIDDEN);
    of('self_attn.o_proj', HIDDEN, HIDDEN);
    of('post_attention_layernorm', HIDDEN);
    of('mlp.gate_proj', INNER, HIDDEN);
    of('mlp.up_proj', INNER, HIDDEN);
    of('mlp.down_proj', HIDDEN, INNER);
  }
  tensors.push(['model.norm.weight', [HIDDEN]], ['lm_head.weight', [VOCAB, HIDDEN]]);
  const header: Record<string, object> = {};
  let end = 0;
  for (const [name, shape] of tensors) {
    const bytes = 2 * shape.reduce((product, dim) => product * dim, 1);
    header[name] = { dtype: 'BF16', shape, data_offsets: [end, end + bytes] };
    end += bytes;
  }
  const json = Buffer.from(JSON.stringify(header));
  const length = Buffer.alloc(8);
  length.writeBigUInt64LE(BigInt(json.length));
  const random = Uint16Array.from({ length: PIECE / 2 }, () => toBfloat16((Math.random() - 0.5) / 16));
  const ones = new Uint16Array(HIDDEN).fill(toBfloat16(1));
  const file = openSync(join(dir, 'model.safetensors'), 'w');
  try {
    writeSync(file, length);
    writeSync(file, json);
    for (const [name, shape] of tensors) {
      let left = 2 * shape.reduce((product, dim) => product * dim, 1);
      // at another place each time, so that rows of a matrix differ from those of the next
      let at = 2 * Math.floor(Math.random() * 10_007);
      const source = Buffer.from((name.includes('norm') ? ones : random).buffer);
      if (name.includes('norm')) at = 0;
      while (left > 0) {
        const piece = source.subarray(at, Math.min(source.length, at + left));
        left -= writeSync(file, piece);
        at = 0;
      }
    }
  } finally {
    closeSync(file);
  }
}
