/** What the checks need to know of a checkpoint. */
import { kvBlockBytes, readConfig, readKvShape } from '../../support/kv-shape.ts';
import { BLOCK_SIZE } from './loads.ts';

export interface CheckpointShape {
  readonly vocab: number;
  /** Most tokens of a sequence. */
  readonly positions: number;
  /** Of KV of one block in all layers, as it is moved. */
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
