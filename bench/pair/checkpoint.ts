/** What the checks need to know of a checkpoint. */
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { BLOCK_SIZE } from './loads.ts';

export interface CheckpointShape {
  readonly vocab: number;
  /** Most tokens of a sequence. */
  readonly positions: number;
  /** Of KV of one block in all layers, as it is moved. */
  readonly blockBytes: number;
}

/** `elementBytes`: of the cache, 4 where the host computes. */
export function readShape(dir: string, elementBytes: number): CheckpointShape {
  const config = JSON.parse(readFileSync(join(dir, 'config.json'), 'utf8')) as Record<string, number>;
  const heads = config['num_attention_heads']!;
  const kvHeads = config['num_key_value_heads'] ?? heads;
  const headDim = config['head_dim'] ?? config['hidden_size']! / heads;
  return {
    vocab: config['vocab_size']!,
    positions: config['max_position_embeddings']!,
    blockBytes: config['num_hidden_layers']! * 2 * BLOCK_SIZE * kvHeads * headDim * elementBytes,
  };
}
