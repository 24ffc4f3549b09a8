/**
 * The model on a GPU: compared with the host's reference on random shapes and with transformers on checkpoints of
 * scripts/model-reference/reference.py, and its speed. `node dist/bench/gpu/model.js DIR [random|logits|times|kernels ...]`, results as
 * JSON to the file that PD_RESULTS names.
 */
import { existsSync, readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { createCudaDevice } from '../../src/device/cuda.ts';
import { kernelTimes } from './model-kernels.ts';
import { logitErrors } from './model-logits.ts';
import { randomModels } from './model-random.ts';
import { modelTimes } from './model-times.ts';
import { conclude, part } from './rows.ts';

const [dir = '', ...names] = process.argv.slice(2);
const wants = (name: string) => names.length === 0 || names.includes(name);
const results: Record<string, unknown> = {};
const device = await createCudaDevice(0);
results['gpu'] = device.driver.deviceName(0);
results['date'] = new Date().toISOString().slice(0, 10);

async function wanted(name: string, run: () => Promise<unknown>): Promise<void> {
  if (wants(name)) results[name] = await part(name, run);
}

const models = existsSync(dir)
  ? readdirSync(dir).filter((name) => existsSync(join(dir, name, 'reference.json')))
  : [];
await wanted('random', () => randomModels(Number(process.env['PD_RANDOM_MODELS'] ?? 8)));
await wanted('logits', async () => {
  const errors: Record<string, unknown> = {};
  for (const name of models) errors[name] = await logitErrors(join(dir, name));
  return errors;
});
await wanted('kernels', () => kernelTimes(device));
await wanted('times', async () => {
  const large = join(dir, 'llama-8b');
  const theirs = JSON.parse(readFileSync(join(large, 'times.json'), 'utf8'));
  return { transformers: theirs, ours: await modelTimes(large, theirs) };
});
if (process.env['PD_RESULTS']) writeFileSync(process.env['PD_RESULTS'], JSON.stringify(results, null, 1));
conclude();
