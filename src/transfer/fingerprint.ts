/** The digest by which two ends know that they hold KV of one model. */
import { createHash } from 'node:crypto';
import type { Fingerprint } from './types.ts';

/**
 * A fingerprint of these fields. `weights` is any digest of what the KV depends on beside them: configuration, tensors, adapters.
 * `model` is not part of it: one checkpoint may lie under two names.
 */
export function fingerprint(fields: Omit<Fingerprint, 'digest'>): Fingerprint {
  const { model, weights, dtype, blockSize, layers, heads, headDim } = fields;
  const essentials = { weights, dtype, blockSize, layers, heads, headDim };
  const digest = createHash('sha256').update(JSON.stringify(essentials)).digest('hex');
  return { digest, model, ...essentials };
}
