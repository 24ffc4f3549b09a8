/** The digest by which two ends know that their KV is of the same model. */
import { createHash } from 'node:crypto';
import type { Dtype } from './dtype.ts';

/** Identifies the model and its KV to a peer. Ends with different digests never exchange KV; the other fields say why. */
export interface Fingerprint {
  /** Hex SHA-256 over all fields but `model`: one checkpoint may have two names. */
  readonly digest: string;
  /** Checkpoint name for people. */
  readonly model: string;
  /** Hex SHA-256 of configuration, tensor index and sampled weights. */
  readonly weights: string;
  readonly dtype: Dtype;
  readonly blockSize: number;
  readonly layers: number;
  readonly heads: number;
  readonly headDim: number;
}

/**
 * A fingerprint of these fields. `weights` is any digest of what else the KV depends on: configuration, tensors, adapters. `model` is not
 * part of it: one checkpoint may have two names.
 */
export function fingerprint(fields: Omit<Fingerprint, 'digest'>): Fingerprint {
  const { model, weights, dtype, blockSize, layers, heads, headDim } = fields;
  const essentials = { weights, dtype, blockSize, layers, heads, headDim };
  const digest = createHash('sha256').update(JSON.stringify(essentials)).digest('hex');
  return { digest, model, ...essentials };
}
