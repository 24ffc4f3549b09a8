import { describe, expect, it } from 'vitest';
import { demoModelDir } from '../../../src/config/demo-model.ts';
import type { WorkerConfig } from '../../../src/config/worker-config.ts';
import { HostDevice } from '../../../src/device/host.ts';
import { createExecutor } from '../../../src/model/create-executor.ts';
import { tempDir } from '../../support/temp-dir.ts';
import { writeTinyModel } from '../../support/tiny-model.ts';

/** The fields that the model reads. */
function configFor(modelDir: string, fields: Partial<WorkerConfig> = {}): WorkerConfig {
  const read = { modelDir, executor: 'host', maxNumSeqs: 4, blockSize: 16, ...fields };
  return read as WorkerConfig;
}

const create = async (modelDir: string, fields?: Partial<WorkerConfig>) => {
  const created = await createExecutor({ config: configFor(modelDir, fields), device: new HostDevice() });
  created.executor.dispose();
  return created;
};

describe('createExecutor', () => {
  it('sizes the cache for the sequences that may run, within 1 GiB', async () => {
    const dir = demoModelDir();
    expect(await create(dir)).toMatchObject({
      maxModelLen: 2048,
      numBlocks: 4 * 128,
      fingerprint: { model: 'demo', layers: 6 },
    });
    expect(await create(dir, { maxModelLen: 100 })).toMatchObject({ maxModelLen: 100, numBlocks: 4 * 7 });
    expect(await create(dir, { maxNumSeqs: 1000, maxModelLen: 64 })).toMatchObject({ numBlocks: 64 * 4 });
    const large = await create(dir, { maxNumSeqs: 1000, blockSize: 1024 });
    expect(large.numBlocks * 6 * 2 * 1024 * 2 * 32 * 4).toBeLessThanOrEqual(2 ** 30);
    expect(await create(dir, { numBlocks: 9 })).toMatchObject({ numBlocks: 9 });
  });

  it('refuses lengths that the model does not have', async () => {
    await expect(create(demoModelDir(), { maxModelLen: 4096 })).rejects.toMatchObject({
      code: 'CONFIG_INVALID',
      message: expect.stringContaining('--max-model-len 4096'),
    });
  });

  it('names what does not fit a checkpoint', async () => {
    const dir = await tempDir();
    await writeTinyModel(dir, { config: { intermediate_size: 48 } });
    await expect(create(dir)).rejects.toMatchObject({
      code: 'CHECKPOINT_INVALID',
      message: expect.stringMatching(
        /gate_proj\.weight has shape \[40,24\], config\.json asks for \[48,24\]/,
      ),
    });
  });
});
