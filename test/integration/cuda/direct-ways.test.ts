/** Two ends of direct writes in one process, on stand-ins: what a moment that is badly chosen leaves behind. */
import { expect, test } from 'vitest';
import { deferred } from '../../../src/deferred.ts';
import { createCudaDevice } from '../../../src/device/cuda.ts';
import { attentionLayerName } from '../../../src/device/paged-cache.ts';
import type { PagedLayout } from '../../../src/kv/layout.ts';
import { createLogger } from '../../../src/observability/log.ts';
import { MetricsPage, readMetric } from '../../../src/observability/metrics.ts';
import { DirectWays } from '../../../src/transfer/native/direct.ts';
import type { Nonce } from '../../../src/transfer/native/messages.ts';
import { ExportedCache } from '../../../src/transport/direct/exported-cache.ts';
import { useStandIns } from '../../stand-ins/build.ts';
import { sharedTempDir } from '../../support/temp-dir.ts';

const LAYOUT: PagedLayout = {
  family: 'kv-first',
  numBlocks: 24,
  blockSize: 16,
  heads: 2,
  headDim: 64,
  dtype: 'bfloat16',
};
const OWNER = 'a'.repeat(32) as Nonce;
const WRITER = 'b'.repeat(32) as Nonce;
const folder = sharedTempDir();

test('a worker that stops while it maps a cache leaves nothing mapped, and nothing of it goes on', async () => {
  useStandIns();
  const device = await createCudaDevice(0);
  const exported = new ExportedCache(device, LAYOUT, [attentionLayerName(0)]);
  const log = createLogger({ level: 'silent', format: 'json' }, 'test');
  const open = (nonce: Nonce, metrics: MetricsPage) =>
    DirectWays.open({ device, layers: exported.layers, exported, nonce, folder, log, metrics });
  const metrics = new MetricsPage();
  const owner = await open(OWNER, new MetricsPage());
  const writer = await open(WRITER, metrics);
  const told: string[] = [];
  const over = deferred<void>();
  const nothing = { idle: () => true, open: () => {}, refused: () => {}, died: () => {} };
  owner.serve({ ...nothing, open: () => over.resolve(), refused: () => over.resolve() });
  writer.serve({ ...nothing, open: () => told.push('open'), refused: () => told.push('refused') });
  owner.expect(WRITER);

  // mapped, and memory for its writer is being taken
  const allocate = device.allocatePinned.bind(device);
  const stopped = deferred<void>();
  device.allocatePinned = async (bytes, what) => {
    const closing = writer.close();
    const memory = await allocate(bytes, what);
    void closing.then(() => stopped.resolve());
    return memory;
  };
  writer.connect('owner', OWNER, owner.place.path);
  await Promise.all([over.promise, stopped.promise]);
  await owner.close();
  expect(told).toEqual([]);
  expect(writer.mappings(() => undefined)).toEqual([]);
  expect(readMetric([metrics], 'pd_native_mappings', 'theirs')).toBe(0);
  exported.dispose();
  device.dispose();
});
