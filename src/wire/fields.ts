/** Reading one field of a decoded message: each function returns a value of the type it names, or throws a protocol error. */
import { DTYPE_BYTES, type Dtype, isDtype } from './dtype.ts';
import type { TensorId } from './ids.ts';
import { MAX_DIGEST, MAX_DIMS, MAX_TENSOR_ID, protocolError, type WireLimits } from './limits.ts';

export type Fields = Readonly<Record<string, unknown>>;

/** A decoded msgpack map: neither an array nor bytes nor an extension. */
export function isFields(value: unknown): value is Fields {
  return typeof value === 'object' && value !== null && Object.getPrototypeOf(value) === Object.prototype;
}

/** Own properties only: a key such as `constructor` must not find what every object inherits. */
export function field(fields: Fields, key: string): unknown {
  return Object.hasOwn(fields, key) ? fields[key] : undefined;
}

/** A value from outside as it may appear in an error message or a log: quoted and short. */
export function show(value: unknown): string {
  if (value instanceof Uint8Array) return `${value.length} bytes`;
  // JSON knows no bigint, which is what an integer beyond 2^53 is decoded as
  const text =
    typeof value === 'bigint'
      ? `${value}`
      : (JSON.stringify(value, (_key, part: unknown) => (typeof part === 'bigint' ? `${part}` : part)) ??
        'nothing');
  return text.length > 80 ? `${text.slice(0, 80)}...` : text;
}

export function textField(fields: Fields, key: string, most: number, what: string): string {
  const value = field(fields, key);
  if (typeof value !== 'string' || value.length === 0) {
    throw protocolError('bad_field', `${what}: ${key} is ${show(value)}, not a string`);
  }
  if (value.length > most) {
    throw protocolError('limit', `${what}: ${key} has ${value.length} characters, ${most} are allowed`);
  }
  // msgpack decodes short strings without looking: what is no UTF-8 comes out with half a surrogate pair.
  if (/\p{Surrogate}/u.test(value)) throw protocolError('bad_field', `${what}: ${key} is not UTF-8`);
  return value;
}

/** An integer from `least` to 2^53 - 1. */
export function countField(fields: Fields, key: string, least: number, what: string): number {
  const value = field(fields, key);
  if (!isSafeInteger(value) || value < least) {
    throw protocolError('bad_field', `${what}: ${key} is ${show(value)}, not an integer from ${least}`);
  }
  return value;
}

export function optionalMap(fields: Fields, key: string, what: string): Fields | undefined {
  const value = field(fields, key);
  if (value === undefined || value === null) return undefined;
  if (!isFields(value)) throw protocolError('bad_field', `${what}: ${key} is ${show(value)}, not a map`);
  return value;
}

/** `prompt`, if present: the digest of the prompt whose KV the tensor holds. */
export function promptFields(promptDigest: string | undefined): { readonly prompt?: string } {
  return promptDigest === undefined ? {} : { prompt: promptDigest };
}

export function readPrompt(fields: Fields, what: string): { readonly promptDigest?: string } {
  if (field(fields, 'prompt') === undefined) return {};
  return { promptDigest: textField(fields, 'prompt', MAX_DIGEST, what) };
}

const MAX_NEAR = 8;
const MAX_NEAR_ID = 512;

/** `near`, if present, for people to read: limited in number and length. */
export function nearFields(near: readonly string[] | undefined): { readonly near?: readonly string[] } {
  if (!near || near.length === 0) return {};
  return { near: near.slice(0, MAX_NEAR).map((id) => id.slice(0, MAX_NEAR_ID)) };
}

export function readNear(fields: Fields, what: string): { readonly near?: readonly string[] } {
  const near = field(fields, 'near');
  if (near === undefined) return {};
  if (!Array.isArray(near) || near.length > MAX_NEAR || !near.every((id) => typeof id === 'string')) {
    throw protocolError('bad_field', `${what}: near is ${show(near)}, not a short list of strings`);
  }
  return nearFields(near as string[]);
}

export function checkTensorId(value: unknown, what: string): TensorId {
  if (typeof value !== 'string' || !value.includes('#')) {
    throw protocolError('bad_field', `${what}: tensor_id is ${show(value)}, not <request>#<layer>`);
  }
  if (value.length > MAX_TENSOR_ID) {
    throw protocolError(
      'limit',
      `${what}: tensor_id has ${value.length} characters, ${MAX_TENSOR_ID} are allowed`,
    );
  }
  return value as TensorId;
}

export function checkDtype(value: unknown, what: string): Dtype {
  if (typeof value !== 'string') {
    throw protocolError('bad_field', `${what}: dtype is ${show(value)}, not a string`);
  }
  if (!isDtype(value)) throw protocolError('unknown_dtype', `${what}: unknown dtype ${show(value)}`);
  return value;
}

/** Positive integers whose product with the element size stays within the limit; the product is then exact. */
export function checkShape(value: unknown, dtype: Dtype, limits: WireLimits, what: string): number[] {
  if (!Array.isArray(value) || value.length === 0) {
    throw protocolError('bad_field', `${what}: shape is ${show(value)}, not a list of integers`);
  }
  if (value.length > MAX_DIMS) {
    throw protocolError('limit', `${what}: shape has ${value.length} dimensions, ${MAX_DIMS} are allowed`);
  }
  const shape = value.map((dim: unknown) => {
    if (!isSafeInteger(dim) || dim < 1) {
      throw protocolError('bad_field', `${what}: shape ${show(value)} is not of positive integers`);
    }
    return dim;
  });
  let bytes: number = DTYPE_BYTES[dtype];
  for (const dim of shape) {
    // Compared by division: the product of two safe integers may not be one.
    if (dim > limits.maxTensorBytes / bytes) {
      throw protocolError(
        'limit',
        `${what}: shape [${shape.join(', ')}] of ${dtype} is more than the ${limits.maxTensorBytes} bytes allowed`,
      );
    }
    bytes *= dim;
  }
  return shape;
}

function isSafeInteger(value: unknown): value is number {
  return Number.isSafeInteger(value);
}
