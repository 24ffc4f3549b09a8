/**
 * Reading weights of a Hugging Face directory: `model.safetensors`, or shards and `model.safetensors.index.json`.
 *
 *   | header length, u64 | header, JSON: name -> {dtype, shape, data_offsets} | data |
 *
 * Headers are checked when the checkpoint is opened: what is truncated or overlaps is found before any weight is used.
 */
import { type FileHandle, open } from 'node:fs/promises';
import { join } from 'node:path';
import { PdError } from '../errors.ts';
import { z } from '../zod.ts';
import { checked, invalid, readJson } from './checked.ts';
import { type FloatType, toFloat32 } from './float-convert.ts';
import { parseSafetensorsHeader, type TensorEntry } from './safetensors-header.ts';
import type { Tensor } from './tensors.ts';

/** The format's own limit. */
const MAX_HEADER_BYTES = 100_000_000;
/** One read call takes less than 2 GiB. */
const READ_CHUNK_BYTES = 2 ** 30;

/** As safetensors spells them. */
const WEIGHT_TYPES: Readonly<Record<string, FloatType>> = {
  F32: 'float32',
  F16: 'float16',
  BF16: 'bfloat16',
};

const indexSchema = z.looseObject({ weight_map: z.record(z.string(), z.string()) });

interface OpenFile {
  readonly name: string;
  readonly handle: FileHandle;
  readonly size: number;
  readonly header: Buffer;
  readonly tensors: ReadonlyMap<string, TensorEntry>;
}

/** The weights of one checkpoint. The owner disposes it: it holds file handles. */
export class Checkpoint {
  readonly dir: string;
  readonly #files: readonly OpenFile[];
  readonly #fileOf = new Map<string, OpenFile>();

  private constructor(dir: string, files: readonly OpenFile[]) {
    this.dir = dir;
    this.#files = files;
    for (const file of files) for (const name of file.tensors.keys()) this.#fileOf.set(name, file);
  }

  /** Throws CHECKPOINT_INVALID naming file and tensor where a shard is missing, truncated or not what the index says. */
  static async open(dir: string): Promise<Checkpoint> {
    const { names, index } = await fileNames(dir);
    const files: OpenFile[] = [];
    try {
      for (const name of names) files.push(await openFile(dir, name, index));
      const checkpoint = new Checkpoint(dir, files);
      checkpoint.#checkIndex(index);
      return checkpoint;
    } catch (error) {
      await Promise.all(files.map((file) => file.handle.close()));
      throw error;
    }
  }

  /** The tensor as float32, row-major. Throws CHECKPOINT_INVALID where it is missing, has another shape or is no float tensor. */
  async tensor(tensor: Tensor): Promise<Float32Array> {
    const { type, bytes } = this.stored(tensor);
    const raw = new Uint8Array(bytes);
    await this.readPiece(tensor, 0, raw);
    return toFloat32(raw, type);
  }

  /** How a tensor of that shape is stored. Throws as `tensor` does. */
  stored(tensor: Tensor): { readonly type: FloatType; readonly bytes: number } {
    const { file, entry } = this.#entry(tensor);
    const type = WEIGHT_TYPES[entry.dtype];
    if (type === undefined) {
      throw invalid(
        `${join(this.dir, file.name)}: tensor ${tensor.name} is ${entry.dtype}; weights are F32, F16 or BF16`,
      );
    }
    return { type, bytes: entry.end - entry.begin };
  }

  /** Fills `target` with the tensor's bytes from byte `from` on, as they are stored: a tensor in pieces. */
  async readPiece(tensor: Tensor, from: number, target: Uint8Array): Promise<void> {
    const { file, entry } = this.#entry(tensor);
    const { name } = tensor;
    if (from < 0 || from + target.length > entry.end - entry.begin) {
      throw new PdError('INTERNAL', `tensor ${name}: bytes ${from}+${target.length} are outside of it`);
    }
    await this.#read(file, name, entry.begin + from, target);
  }

  /** Headers, and `samples` pieces of `bytes` bytes at even distances of each file: a cheap way to tell two checkpoints apart. */
  async *sample(samples: number, bytes: number): AsyncGenerator<Uint8Array> {
    for (const file of this.#files) {
      yield file.header;
      const piece = Buffer.allocUnsafe(bytes);
      for (let i = 0; i < samples; i++) {
        const at = Math.floor((Math.max(0, file.size - bytes) * i) / Math.max(1, samples - 1));
        const { bytesRead } = await file.handle.read(piece, 0, bytes, at);
        yield piece.subarray(0, bytesRead);
      }
    }
  }

  /** Idempotent. */
  async dispose(): Promise<void> {
    await Promise.all(this.#files.map((file) => file.handle.close()));
  }

  #entry({ name, shape }: Tensor): { readonly file: OpenFile; readonly entry: TensorEntry } {
    const file = this.#fileOf.get(name);
    const entry = file?.tensors.get(name);
    if (!file || !entry) {
      throw invalid(
        `${this.dir}: no file holds tensor ${name} [${shape}] (looked in ${this.#files.map((f) => f.name).join(', ')})`,
      );
    }
    if (entry.shape.length !== shape.length || entry.shape.some((dim, i) => dim !== shape[i])) {
      throw invalid(
        `${join(this.dir, file.name)}: tensor ${name} has shape [${entry.shape}], config.json asks for [${shape}]`,
      );
    }
    return { file, entry };
  }

  /** `at`: bytes from the end of the header. */
  async #read(file: OpenFile, name: string, at: number, target: Uint8Array): Promise<void> {
    const start = 8 + file.header.length + at;
    for (let done = 0; done < target.length; ) {
      const length = Math.min(READ_CHUNK_BYTES, target.length - done);
      const { bytesRead } = await file.handle.read(target, done, length, start + done);
      if (bytesRead === 0) {
        throw invalid(
          `${join(this.dir, file.name)} ended after ${done} of ${target.length} bytes of tensor ${name}`,
        );
      }
      done += bytesRead;
    }
  }

  #checkIndex(index: ReadonlyMap<string, string>): void {
    for (const [tensor, fileName] of index) {
      if (this.#fileOf.get(tensor)?.name !== fileName) {
        throw invalid(
          `${join(this.dir, fileName)} does not hold tensor ${tensor}, which the index places there`,
        );
      }
    }
  }
}

const INDEX_FILE = 'model.safetensors.index.json';
const SINGLE_FILE = 'model.safetensors';

async function fileNames(
  dir: string,
): Promise<{ readonly names: readonly string[]; readonly index: ReadonlyMap<string, string> }> {
  const json = await readJson(join(dir, INDEX_FILE));
  if (json === undefined) return { names: [SINGLE_FILE], index: new Map() };
  const index = new Map(Object.entries(checked(indexSchema, json, join(dir, INDEX_FILE)).weight_map));
  const names = [...new Set(index.values())].sort();
  const outside = names.find((name) => name.includes('/') || name.includes('\\') || name.startsWith('.'));
  if (outside !== undefined) {
    throw invalid(`${join(dir, INDEX_FILE)} names a file outside of the directory: ${outside}`);
  }
  return { names, index };
}

async function openFile(dir: string, name: string, index: ReadonlyMap<string, string>): Promise<OpenFile> {
  const path = join(dir, name);
  let handle: FileHandle;
  try {
    handle = await open(path, 'r');
  } catch (cause) {
    const held = [...index].filter(([, file]) => file === name).map(([tensor]) => tensor);
    const what = held.length > 0 ? ` (it holds ${held.length} tensors, first ${held[0]})` : '';
    throw invalid(`${path} cannot be opened${what}`, cause);
  }
  try {
    const { size } = await handle.stat();
    const header = await readHeader(handle, size, path);
    return {
      name,
      handle,
      size,
      header,
      tensors: parseSafetensorsHeader(header, size - 8 - header.length, path),
    };
  } catch (error) {
    await handle.close();
    throw error;
  }
}

async function readHeader(handle: FileHandle, size: number, path: string): Promise<Buffer> {
  const prefix = Buffer.alloc(8);
  await handle.read(prefix, 0, 8, 0);
  const length = size < 8 ? 0n : prefix.readBigUInt64LE();
  if (length < 2n || length > BigInt(Math.min(MAX_HEADER_BYTES, size - 8))) {
    throw invalid(`${path}: a header of ${length} bytes does not fit a safetensors file of ${size} bytes`);
  }
  const header = Buffer.alloc(Number(length));
  const { bytesRead } = await handle.read(header, 0, header.length, 8);
  if (bytesRead !== header.length) {
    throw invalid(`${path}: only ${bytesRead} of ${header.length} header bytes could be read`);
  }
  return header;
}
