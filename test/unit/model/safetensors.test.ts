import { rm, truncate, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { PdError } from '../../../src/errors.ts';
import { readModelConfig } from '../../../src/model/config.ts';
import { fingerprintOf } from '../../../src/model/fingerprint.ts';
import { float16ToFloat32 } from '../../../src/model/float-convert.ts';
import { Checkpoint } from '../../../src/model/safetensors.ts';
import { parseSafetensorsHeader } from '../../../src/model/safetensors-header.ts';
import { encodeTensors, type FloatType, safetensorsFile } from '../../../support/safetensors-writer.ts';
import { tempDir } from '../../support/temp-dir.ts';
import { writeTinyModel } from '../../support/tiny-model.ts';

const NAME = 'model.layers.1.self_attn.k_proj.weight';

async function read(dir: string, name: string, shape: readonly number[]): Promise<Float32Array> {
  const checkpoint = await Checkpoint.open(dir);
  try {
    return await checkpoint.tensor({ name, shape });
  } finally {
    await checkpoint.dispose();
  }
}

describe('safetensors', () => {
  it.each<[FloatType, number, number]>([
    ['F32', 1, 0],
    ['F16', 3, 2 ** -11],
    ['BF16', 2, 2 ** -8],
  ])('reads %s from %i files', async (type, shards, tolerance) => {
    const dir = await tempDir();
    const written = await writeTinyModel(dir, { type, shards });
    const { shape, values } = written.get(NAME)!;
    const found = await read(dir, NAME, shape);
    expect(found.length).toBe(values.length);
    // float16 below 2^-14 is written as 0.
    values.forEach((value, i) => {
      expect(Math.abs(found[i]! - value)).toBeLessThanOrEqual(
        Math.abs(value) * tolerance + (type === 'F16' ? 2 ** -14 : 0),
      );
    });
  });

  it('reads every kind of float16', () => {
    const bits = [0x0000, 0x8000, 0x3c00, 0xc000, 0x7bff, 0x0400, 0x0001, 0x83ff, 0x7c00, 0xfc00, 0x7e00];
    const out = new Float32Array(bits.length);
    float16ToFloat32(Uint16Array.from(bits), out);
    expect([...out]).toEqual([
      0,
      -0,
      1,
      -2,
      65_504,
      2 ** -14,
      2 ** -24,
      -1023 * 2 ** -24,
      Infinity,
      -Infinity,
      NaN,
    ]);
  });

  it('names a missing shard and a tensor that is in it', async () => {
    const dir = await tempDir();
    await writeTinyModel(dir, { shards: 2 });
    await rm(join(dir, 'model-2-of-2.safetensors'));
    await expect(Checkpoint.open(dir)).rejects.toMatchObject({
      code: 'CHECKPOINT_INVALID',
      message: expect.stringMatching(
        /model-2-of-2\.safetensors cannot be opened \(it holds 10 tensors, first model\./,
      ),
    });
  });

  it('names a missing tensor, and one of another shape with both shapes', async () => {
    const dir = await tempDir();
    await writeTinyModel(dir);
    await expect(read(dir, 'model.missing.weight', [2])).rejects.toMatchObject({
      code: 'CHECKPOINT_INVALID',
      message: expect.stringMatching(/model\.missing\.weight.*model\.safetensors/),
    });
    await expect(read(dir, NAME, [24, 16])).rejects.toMatchObject({
      code: 'CHECKPOINT_INVALID',
      message: expect.stringContaining(`tensor ${NAME} has shape [16,24], config.json asks for [24,16]`),
    });
  });

  it('refuses an index that does not tell the truth, or points elsewhere', async () => {
    const dir = await tempDir();
    await writeTinyModel(dir, { shards: 2 });
    const index = join(dir, 'model.safetensors.index.json');
    await writeFile(
      index,
      JSON.stringify({
        weight_map: { [NAME]: 'model-1-of-2.safetensors', 'no.such': 'model-2-of-2.safetensors' },
      }),
    );
    await expect(Checkpoint.open(dir)).rejects.toThrow(/does not hold tensor/);
    await writeFile(index, JSON.stringify({ weight_map: { [NAME]: '../elsewhere.safetensors' } }));
    await expect(Checkpoint.open(dir)).rejects.toThrow(/outside of the directory/);
  });

  it('finds a truncated file before any weight is read', async () => {
    const dir = await tempDir();
    await writeTinyModel(dir);
    await truncate(join(dir, 'model.safetensors'), 20_000);
    await expect(Checkpoint.open(dir)).rejects.toThrow(/truncated/);
  });

  it.each([
    ['a header longer than the file', Buffer.from('ffffffffffffff7f7b7d', 'hex'), /does not fit/],
    ['an empty file', Buffer.alloc(0), /does not fit/],
    ['a header that is no JSON', safetensorsFile('{"a":', Buffer.alloc(0)), /not JSON/],
    [
      'a hole',
      safetensorsFile({ a: { dtype: 'F32', shape: [1], data_offsets: [4, 8] } }, Buffer.alloc(8)),
      /begins at byte 4/,
    ],
    [
      'bytes left over',
      safetensorsFile({ a: { dtype: 'F32', shape: [1], data_offsets: [0, 4] } }, Buffer.alloc(8)),
      /take 4 bytes/,
    ],
    [
      'a size that is not the shape',
      safetensorsFile({ a: { dtype: 'F32', shape: [3], data_offsets: [0, 8] } }, Buffer.alloc(8)),
      /takes 12 bytes/,
    ],
    [
      'a negative size',
      safetensorsFile({ a: { dtype: 'F32', shape: [-1], data_offsets: [0, 8] } }, Buffer.alloc(8)),
      /shape/,
    ],
    [
      'an unknown type',
      safetensorsFile({ a: { dtype: 'constructor', shape: [1], data_offsets: [0, 8] } }, Buffer.alloc(8)),
      /unknown element type/,
    ],
  ])('refuses %s', async (_, file, message) => {
    const dir = await tempDir();
    await writeFile(join(dir, 'model.safetensors'), file);
    await expect(Checkpoint.open(dir)).rejects.toMatchObject({
      code: 'CHECKPOINT_INVALID',
      message: expect.stringMatching(message),
    });
  });

  it('answers any header with tensors or a CHECKPOINT_INVALID', () => {
    const entry = fc.record({
      dtype: fc.constantFrom('F32', 'BF16', 'X'),
      shape: fc.array(fc.integer({ max: 9 })),
      data_offsets: fc.array(fc.integer()),
    });
    fc.assert(
      fc.property(
        fc.oneof(
          fc.json(),
          fc.dictionary(fc.string(), entry).map((v) => JSON.stringify(v)),
        ),
        (json) => {
          try {
            parseSafetensorsHeader(Buffer.from(json), 64, 'x');
          } catch (error) {
            expect(error).toBeInstanceOf(PdError);
            expect((error as PdError).code).toBe('CHECKPOINT_INVALID');
          }
        },
      ),
    );
  });
});

describe('fingerprint', () => {
  const kv = { dtype: 'float32', blockSize: 16 } as const;
  const fingerprint = async (dir: string, other: object = {}) =>
    (await fingerprintOf(dir, await readModelConfig(dir), { ...kv, ...other })).digest;

  it('is the same for the same checkpoint in another directory', async () => {
    const [a, b] = [await tempDir(), await tempDir()];
    await writeTinyModel(a);
    await writeTinyModel(b);
    expect(await fingerprint(a)).toBe(await fingerprint(b));
  });

  it('tells other weights, another configuration, KV type and block size apart', async () => {
    const [base, weights, config] = [await tempDir(), await tempDir(), await tempDir()];
    await writeTinyModel(base);
    await writeTinyModel(weights, { seed: 2 });
    await writeTinyModel(config, { config: { rope_theta: 20_000 } });
    const all = [
      await fingerprint(base),
      await fingerprint(weights),
      await fingerprint(config),
      await fingerprint(base, { blockSize: 32 }),
      await fingerprint(base, { dtype: 'float16' }),
    ];
    expect(new Set(all).size).toBe(all.length);
  });

  it('notices one changed tensor in the middle of a sampled file', async () => {
    const dir = await tempDir();
    const tensors = await writeTinyModel(dir);
    const before = await fingerprint(dir);
    tensors.get(NAME)!.values[7]! += 1;
    await writeFile(join(dir, 'model.safetensors'), encodeTensors(tensors, 'F32'));
    expect(await fingerprint(dir)).not.toBe(before);
  });
});
