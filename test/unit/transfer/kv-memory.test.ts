/** Transfer memory: the buffer first, then the pool as far as it may grow, then nothing; and the count is exact all the way. */

import pino from 'pino';
import { describe, expect, it } from 'vitest';
import { HostDevice } from '../../../src/device/host.ts';
import { PdError } from '../../../src/errors.ts';
import { MetricsPage, readMetric } from '../../../src/observability/metrics.ts';
import { Deadlines } from '../../../src/transfer/deadlines.ts';
import { KvMemory, POOL_STEP_BYTES } from '../../../src/transfer/kv-memory.ts';

const log = pino({ level: 'silent' });

function make(bufferBytes: number, poolLimitBytes: number, device = new HostDevice()) {
  const metrics = new MetricsPage();
  const memory = new KvMemory({
    device,
    bufferBytes,
    poolLimitBytes,
    deadlines: new Deadlines(),
    metrics,
    log,
  });
  return { memory, metrics };
}

describe('KvMemory', () => {
  it('goes from buffer to pool to refusal, and back to zero', async () => {
    const { memory, metrics } = make(1024, 2048);
    const held = [];
    for (let i = 0; i < 3; i++) held.push((await memory.allocate(1000))!);
    expect([memory.bufferUsed, memory.poolUsed, memory.poolReserved]).toEqual([1000, 2000, 2048]);
    expect(await memory.allocate(1000)).toBeUndefined();
    expect(readMetric([metrics], 'pd_kv_pool_used_bytes')).toBe(2000);
    held[1]!.free();
    held[1]!.free();
    expect(memory.poolUsed).toBe(1000);
    expect((await memory.allocate(900))?.bytes).toBe(900);
    for (const one of held) one.free();
    expect([memory.bufferUsed, memory.poolUsed]).toEqual([0, 900]);
    expect(memory.checkIntegrity()).toEqual([]);
  });

  it('grows the pool before it is needed, a step at a time, and takes a tensor larger than a step', async () => {
    const { memory } = make(1024, 4 * POOL_STEP_BYTES);
    memory.tryAllocate(1024);
    await Promise.resolve();
    expect(memory.poolReserved).toBe(POOL_STEP_BYTES);
    await memory.allocate(POOL_STEP_BYTES * 2 + 1);
    expect(memory.poolUsed).toBe(POOL_STEP_BYTES * 2 + 1);
    expect(memory.poolReserved).toBe(4 * POOL_STEP_BYTES);
    expect(await memory.allocate(POOL_STEP_BYTES + 1)).toBeUndefined();
  });

  it('lets those that wait have what is freed, in the order they came', async () => {
    const { memory } = make(1024, 0);
    const first = memory.tryAllocate(1024)!;
    const order: string[] = [];
    const large = memory.waitFor(1024, 5_000).then((got) => {
      order.push('large');
      return got;
    });
    const small = memory.waitFor(256, 5_000).then((got) => {
      order.push('small');
      return got;
    });
    first.free();
    (await large)!.free();
    expect((await small)?.bytes).toBe(256);
    expect(order).toEqual(['large', 'small']);
  });

  it('waits no longer than it is told', async () => {
    const { memory } = make(1024, 0);
    memory.tryAllocate(1024);
    const keepAlive = setInterval(() => {}, 1_000);
    expect(await memory.waitFor(256, 10)).toBeUndefined();
    clearInterval(keepAlive);
  });

  it('refuses, and lives on, when the system has no more memory', async () => {
    const device = new HostDevice();
    device.allocatePinned = () => Promise.reject(new PdError('OUT_OF_DEVICE_MEMORY', 'none'));
    const { memory } = make(1024, 2048, device);
    const held = memory.tryAllocate(1024)!;
    expect(await memory.allocate(256)).toBeUndefined();
    held.free();
    await memory.allocate(256);
    expect([memory.bufferUsed, memory.poolReserved]).toEqual([256, 0]);
  });
});
