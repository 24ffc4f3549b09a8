/** The sizes that determine how many bytes of KV a checkpoint has, read from its config.json. */
import { readFileSync } from 'node:fs';
import { join } from 'node:path';

export interface KvShape {
  readonly layers: number;
  readonly kvHeads: number;
  readonly headDim: number;
  readonly elementBytes: number;
  readonly blockSize: number;
}

/** `elementBytes`: of one element in the cache: 4 if the host computes (float32), otherwise 2. */
export function readKvShape(modelDir: string, elementBytes: number, blockSize: number): KvShape {
  const config = readConfig(modelDir);
  const heads = config['num_attention_heads'] ?? 1;
  return {
    layers: config['num_hidden_layers'] ?? 0,
    kvHeads: config['num_key_value_heads'] ?? heads,
    headDim: config['head_dim'] ?? (config['hidden_size'] ?? 0) / heads,
    elementBytes,
    blockSize,
  };
}

/** Bytes of the keys and values of one block, over all layers. */
export function kvBlockBytes({ layers, kvHeads, headDim, elementBytes, blockSize }: KvShape): number {
  return layers * 2 * blockSize * kvHeads * headDim * elementBytes;
}

/** The numeric fields of config.json. */
export function readConfig(modelDir: string): Readonly<Record<string, number | undefined>> {
  const text = readFileSync(join(modelDir, 'config.json'), 'utf8');
  const fields = Object.entries(JSON.parse(text) as Record<string, unknown>);
  return Object.fromEntries(
    fields.filter((field): field is [string, number] => typeof field[1] === 'number'),
  );
}
