/** The JSON header of a safetensors file, checked as a whole. */

import type { PdError } from '../errors.ts';
import { z } from '../zod.ts';
import { checked, invalid } from './checked.ts';

const ELEMENT_BYTES: Readonly<Record<string, number>> = {
  BOOL: 1,
  U8: 1,
  I8: 1,
  F8_E4M3: 1,
  F8_E5M2: 1,
  U16: 2,
  I16: 2,
  F16: 2,
  BF16: 2,
  U32: 4,
  I32: 4,
  F32: 4,
  U64: 8,
  I64: 8,
  F64: 8,
};

export interface TensorEntry {
  /** As safetensors spells it: F32, BF16, ... */
  readonly dtype: string;
  readonly shape: readonly number[];
  /** Bytes from the end of the header. */
  readonly begin: number;
  readonly end: number;
}

const size = z.number().int().nonnegative().max(Number.MAX_SAFE_INTEGER);
const entrySchema = z.object({
  dtype: z.string(),
  shape: z.array(size).max(16),
  data_offsets: z.tuple([size, size]),
});

/** Tensors by name. `dataBytes` follow the header. Throws CHECKPOINT_INVALID naming `path` and the tensor. */
export function parseSafetensorsHeader(
  header: Buffer,
  dataBytes: number,
  path: string,
): ReadonlyMap<string, TensorEntry> {
  const tensors = new Map<string, TensorEntry>();
  for (const [name, json] of Object.entries(parseObject(header, path))) {
    if (name === '__metadata__') continue;
    const { dtype, shape, data_offsets } = checked(entrySchema, json, `${path}: tensor ${name}`);
    const [begin, end] = data_offsets;
    tensors.set(name, checkEntry({ dtype, shape, begin, end }, dataBytes, path, name));
  }
  checkCoverage(tensors, dataBytes, path);
  return tensors;
}

function parseObject(header: Buffer, path: string): Record<string, unknown> {
  let json: unknown;
  try {
    json = JSON.parse(header.toString('utf8'));
  } catch (cause) {
    throw invalid(`${path}: the header is not JSON`, cause);
  }
  if (typeof json !== 'object' || json === null || Array.isArray(json)) {
    throw invalid(`${path}: the header is not a JSON object`);
  }
  return json as Record<string, unknown>;
}

function checkEntry(entry: TensorEntry, dataBytes: number, path: string, name: string): TensorEntry {
  const elementBytes = Object.hasOwn(ELEMENT_BYTES, entry.dtype) ? ELEMENT_BYTES[entry.dtype] : undefined;
  if (elementBytes === undefined) throw tensorInvalid(path, name, `unknown element type ${entry.dtype}`);
  const wanted = entry.shape.reduce((product, dim) => product * dim, elementBytes);
  if (entry.begin > entry.end || entry.end > dataBytes) {
    throw tensorInvalid(
      path,
      name,
      `bytes ${entry.begin} to ${entry.end} are outside of the file's ${dataBytes} bytes of data (a truncated file?)`,
    );
  }
  if (entry.end - entry.begin !== wanted) {
    throw tensorInvalid(
      path,
      name,
      `${entry.dtype} [${entry.shape}] takes ${wanted} bytes, the header gives it ${entry.end - entry.begin}`,
    );
  }
  return entry;
}

/** The format allows neither holes nor overlaps. */
function checkCoverage(tensors: ReadonlyMap<string, TensorEntry>, dataBytes: number, path: string): void {
  let at = 0;
  for (const [name, entry] of [...tensors].sort(([, a], [, b]) => a.begin - b.begin || a.end - b.end)) {
    if (entry.begin !== at)
      throw tensorInvalid(path, name, `it begins at byte ${entry.begin}, the one before it ends at ${at}`);
    at = entry.end;
  }
  if (at !== dataBytes) {
    throw invalid(`${path}: tensors take ${at} bytes, the file has ${dataBytes} bytes of data`);
  }
}

function tensorInvalid(path: string, tensor: string, what: string): PdError {
  return invalid(`${path}: tensor ${tensor}: ${what}`);
}
