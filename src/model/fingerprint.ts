/** Identifies a model on the wire: peers with different fingerprints never exchange KV. */
import { createHash } from 'node:crypto';

import { type Fingerprint, fingerprint } from '../wire/fingerprint.ts';
import type { ModelConfig } from './config.ts';
import type { KvFormat } from './kv-cache.ts';
import { Checkpoint } from './safetensors.ts';

/** Pieces read of each file: enough that other weights of equal shape differ, few enough for a large checkpoint on a slow disk. */
const SAMPLES_PER_FILE = 64;
const SAMPLE_BYTES = 4096;

/**
 * `dtype` and `blockSize` are those of the KV cache. The digest leaves out the model's name, which is a directory's and may differ
 * between two machines that serve the same checkpoint.
 */
export async function fingerprintOf(dir: string, config: ModelConfig, kv: KvFormat): Promise<Fingerprint> {
  const weights = createHash('sha256');
  const {
    name: _name,
    eosTokenIds: _eos,
    bosTokenId: _bos,
    maxPositionEmbeddings: _max,
    ...essentials
  } = config;
  weights.update(JSON.stringify(essentials));
  const checkpoint = await Checkpoint.open(dir);
  try {
    for await (const piece of checkpoint.sample(SAMPLES_PER_FILE, SAMPLE_BYTES)) weights.update(piece);
  } finally {
    await checkpoint.dispose();
  }
  return fingerprint({
    model: config.name,
    weights: weights.digest('hex'),
    ...kv,
    layers: config.layers,
    heads: config.kvHeads,
    headDim: config.headDim,
  });
}
