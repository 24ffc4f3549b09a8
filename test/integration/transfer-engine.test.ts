/** The façade before the transfer thread: two engines exchange tensors in one script. Doubles as an example. */
import { afterEach, describe, expect, it } from 'vitest';
import { PdError } from '../../src/errors.ts';
import { MetricsPage, readMetric } from '../../src/observability/metrics.ts';
import { TransferEngine } from '../../src/transfer/engine.ts';
import type { TransferId } from '../../src/wire/ids.ts';
import { SEND_TYPES } from '../../src/wire/messages.ts';
import {
  failure,
  flat,
  keptPort,
  loadRequest,
  pagedCache,
  Services,
  transferOptions,
} from '../support/transfer.ts';

const engines = new Services();
afterEach(() => engines.dispose());
const make = async (...args: Parameters<typeof transferOptions>) =>
  engines.add(await TransferEngine.create(transferOptions(...args)));

describe.each(SEND_TYPES)('%s', (sendType) => {
  it('sends tensors from one engine to another', async () => {
    const producer = await make({ sendType });
    const consumer = await make({ sendType });
    const tensor = flat('cmpl-a-0#layer', 100_000, consumer.address);
    const handle = producer.send(tensor);
    const got = await consumer.receive(tensor.tensorId, producer.address);
    expect(await handle.sent).toBe(100_000);
    expect(Buffer.compare(consumer.view(got.memory), producer.view(tensor.data))).toBe(0);
    expect((await consumer.state()).tensors).toBe(1);
    consumer.finish('cmpl-a-0' as TransferId);
    expect((await consumer.state()).buffer.usedBytes).toBe(0);
  });
});

it('works while the owning thread computes and hears nothing', async () => {
  const metrics = new MetricsPage();
  const consumer = await make();
  const producer = engines.add(await TransferEngine.create(transferOptions(), { metrics: metrics.buffer }));
  const warm = flat('warm#l', 1_000, consumer.address);
  await producer.send(warm).sent;
  producer.send(flat('busy#l', 1_000, consumer.address));
  // No turn of this thread's event loop from here on: only the shared page can tell.
  const end = performance.now() + 60_000;
  const nothing = new Int32Array(new SharedArrayBuffer(4));
  while (readMetric([metrics], 'pd_kv_sent_bytes_total') < 2_000 && performance.now() < end) {
    Atomics.wait(nothing, 0, 0, 1);
  }
  expect(readMetric([metrics], 'pd_kv_sent_bytes_total')).toBe(2_000);
});

it('fails everything that waits when it is disposed, twice over and at once', async () => {
  const engine = await make();
  const load = failure(
    engine.load(loadRequest('never', pagedCache(1, false), [0], { host: '127.0.0.1', port: 9 })),
  );
  const receive = failure(engine.receive(flat('no#l', 8).tensorId, { host: '127.0.0.1', port: 9 }));
  await Promise.all([engine.dispose(), engine.dispose()]);
  expect((await load).code).toBe('ENGINE_CLOSED');
  expect((await receive).code).toBe('ENGINE_CLOSED');
  expect((await failure(engine.send(flat('x#l', 8)).sent)).code).toBe('ENGINE_CLOSED');
  expect((await failure(engine.state())).code).toBe('ENGINE_CLOSED');
});

it('names a port that is taken', async () => {
  const first = await make();
  const error = await failure(TransferEngine.create(transferOptions({ port: first.address.port })));
  expect(error).toBeInstanceOf(PdError);
  expect(error.code).toBe('PORT_IN_USE');
  expect(error.message).toContain(String(first.address.port));
});

it('binds the base port plus its rank', async () => {
  const port = await keptPort();
  const engine = await make({ port: port - 1, rank: 1 });
  expect(engine.address.port).toBe(port);
});
