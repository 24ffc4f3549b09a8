/** What the checks need to know about a checkpoint. */
import { kvBlockBytes, readConfig, readKvShape } from '../../support/kv-shape.ts';
import { BLOCK_SIZE } from './loads.ts';

export interface CheckpointShape {
  readonly vocab: number;
  /** The longest sequence, tokens. */
  readonly positions: number;
  /** Bytes of KV of one block, over all layers, as it is transferred. */
  readonly blockBytes: number;
}

/** `elementBytes`: of the cache. */
export function readShape(dir: string, elementBytes: number): CheckpointShape {
  const config = readConfig(dir);
  return {
    vocab: config['vocab_size'] ?? 0,
    positions: config['max_position_embeddings'] ?? 0,
    blockBytes: kvBlockBytes(readKvShape(dir, elementBytes, BLOCK_SIZE)),
  };
}
