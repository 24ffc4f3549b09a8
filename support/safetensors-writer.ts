/** Writes safetensors files, valid or broken as a test needs them. */
import { writeFile } from 'node:fs/promises';
import { join } from 'node:path';

export type FloatType = 'F32' | 'F16' | 'BF16';

export interface TestTensor {
  readonly shape: readonly number[];
  readonly values: Float32Array;
}

export type TestTensors = ReadonlyMap<string, TestTensor>;

const scratch = new DataView(new ArrayBuffer(4));

/** The bits of the nearest bfloat16, ties to even. */
export function toBfloat16(value: number): number {
  scratch.setFloat32(0, value);
  const bits = scratch.getUint32(0);
  return ((bits + 0x7fff + ((bits >>> 16) & 1)) >>> 16) & 0xffff;
}

/** The bits of a float16 near `value`, for magnitudes between 2^-14 and 65,504; smaller ones become 0. */
function toFloat16(value: number): number {
  scratch.setFloat32(0, value);
  const bits = scratch.getUint32(0);
  const sign = (bits >>> 16) & 0x8000;
  const exponent = ((bits >>> 23) & 0xff) - 127 + 15;
  if (exponent <= 0) return sign;
  return sign | (((exponent << 10) | ((bits >>> 13) & 0x3ff)) + ((bits >>> 12) & 1));
}

function tensorBytesOf(values: Float32Array, type: FloatType): Buffer {
  if (type === 'F32') return Buffer.from(values.buffer, values.byteOffset, values.byteLength);
  const bits = Uint16Array.from(values, type === 'F16' ? toFloat16 : toBfloat16);
  return Buffer.from(bits.buffer);
}

export function safetensorsFile(header: object | string, data: Uint8Array): Buffer {
  const json = Buffer.from(typeof header === 'string' ? header : JSON.stringify(header));
  const length = Buffer.alloc(8);
  length.writeBigUInt64LE(BigInt(json.length));
  return Buffer.concat([length, json, data]);
}

export function encodeTensors(tensors: TestTensors, type: FloatType): Buffer {
  const header: Record<string, object> = { __metadata__: { format: 'pt' } };
  const parts: Buffer[] = [];
  let at = 0;
  for (const [name, { shape, values }] of tensors) {
    const bytes = tensorBytesOf(values, type);
    header[name] = { dtype: type, shape, data_offsets: [at, at + bytes.length] };
    parts.push(bytes);
    at += bytes.length;
  }
  return safetensorsFile(header, Buffer.concat(parts));
}

/** `shards` files and an index, or one file. Tensors are distributed over the shards in turn. */
export async function writeSafetensors(
  dir: string,
  tensors: TestTensors,
  { type, shards }: { readonly type: FloatType; readonly shards: number },
): Promise<void> {
  if (shards === 1) {
    await writeFile(join(dir, 'model.safetensors'), encodeTensors(tensors, type));
    return;
  }
  const files = Array.from({ length: shards }, () => new Map<string, TestTensor>());
  const names = Array.from({ length: shards }, (_, i) => `model-${i + 1}-of-${shards}.safetensors`);
  const weightMap: Record<string, string> = {};
  [...tensors].forEach(([name, tensor], i) => {
    files[i % shards]!.set(name, tensor);
    weightMap[name] = names[i % shards]!;
  });
  await Promise.all(files.map((file, i) => writeFile(join(dir, names[i]!), encodeTensors(file, type))));
  await writeFile(
    join(dir, 'model.safetensors.index.json'),
    JSON.stringify({ metadata: {}, weight_map: weightMap }),
  );
}
