/** Two ends of the native hand-over on the host: their ledgers, and transfer services between them, in one process. */
import { randomBytes } from 'node:crypto';
import { describe, expect, it } from 'vitest';
import { workerConfig } from '../../src/config/embedded.ts';
import { nativeWayFinding } from '../../src/doctor/native-way.ts';
import { formatHostPort, type HostPort } from '../../src/net/address.ts';
import { proxyRequestId, transferIdOf } from '../../src/wire/ids.ts';
import { compute, type End, finish, idFor, LAYERS, makeEnd, outcomeOf, wantOf } from '../support/native.ts';
import { blockOf, failure, keptPort, pagedCache, testServices, until } from '../support/transfer.ts';

const services = testServices();

async function pair(options: { readonly leaseMs?: number } = {}) {
  const producer = await makeEnd(services, 'producer', options);
  const consumer = await makeEnd(services, 'consumer', options);
  return { producer, consumer, id: idFor(producer, consumer) };
}

const begin = ({ handOver, blocks }: End, transferId: ReturnType<typeof idFor>, tokens: number) => {
  blocks.allocate(transferId, tokens);
  handOver.begin({ transferId, promptDigest: 'prompt', tokens });
};

const idBetween = (producer: HostPort, consumer: HostPort) =>
  transferIdOf(`cmpl-${proxyRequestId(producer, consumer, randomBytes(16).toString('hex'))}-0`);

function expectEqual(
  producer: End,
  sources: readonly number[],
  consumer: End,
  targets: readonly number[],
): void {
  for (let layer = 0; layer < LAYERS; layer++) {
    const [from, to] = [producer.cache[layer]!, consumer.cache[layer]!];
    for (const [i, block] of targets.entries())
      expect(blockOf(to, block).equals(blockOf(from, sources[i]!))).toBe(true);
  }
}

async function expectNothingLeft(...ends: readonly End[]): Promise<void> {
  await until('books at zero', () => ends.every((end) => end.leftovers().length === 0));
}

describe('a native hand-over on the host', () => {
  it('fills the blocks that were asked for, chunk by chunk, and brings the first token', async () => {
    const { producer, consumer, id } = await pair();
    const want = wantOf(producer, consumer, id, 14);
    consumer.handOver.want(want);
    begin(producer, id, 14);
    // the WANT may come at any of these moments
    for (const tokens of [6, 11, 14]) await compute(producer, id, tokens);
    const sources = producer.blocks.tableOf(id);
    finish(producer, id);
    expect(await outcomeOf(consumer)).toMatchObject({
      requestId: want.requestId,
      ok: true,
      bytes: LAYERS * 4 * 512,
      draw: { tokens: [7] },
    });
    expectEqual(producer, sources, consumer, want.blocks);
    consumer.blocks.free(id);
    await expectNothingLeft(producer, consumer);
  });

  it('leaves alone the blocks that the consumer has', async () => {
    const { producer, consumer, id } = await pair();
    const blocks = consumer.blocks.allocate(id, 16);
    const want = { ...wantOf(producer, consumer, idFor(producer, consumer), 8), transferId: id, tokens: 16 };
    consumer.handOver.want({ ...want, skip: 2, blocks: blocks.slice(2) });
    begin(producer, id, 16);
    await compute(producer, id, 16);
    const sources = producer.blocks.tableOf(id);
    finish(producer, id);
    expect(await outcomeOf(consumer)).toMatchObject({ ok: true });
    expectEqual(producer, sources.slice(2), consumer, blocks.slice(2));
    expect(blockOf(consumer.cache[0]!, blocks[0]!).every((byte) => byte === 0)).toBe(true);
  });

  it('keeps what is computed before it is asked for under a lease, and hands it over then', async () => {
    const { producer, consumer, id } = await pair();
    begin(producer, id, 9);
    await compute(producer, id, 9);
    const sources = [...producer.blocks.tableOf(id)];
    finish(producer, id);
    expect(producer.blocks.leaseOf(id)).toEqual(sources);
    const want = wantOf(producer, consumer, id, 9);
    consumer.handOver.want(want);
    expect(await outcomeOf(consumer)).toMatchObject({ ok: true, draw: { tokens: [7] } });
    expectEqual(producer, sources, consumer, want.blocks);
    consumer.blocks.free(id);
    await expectNothingLeft(producer, consumer);
  });

  it('brings no token that was drawn under other parameters', async () => {
    const { producer, consumer, id } = await pair();
    consumer.handOver.want(wantOf(producer, consumer, id, 9));
    begin(producer, id, 9);
    await compute(producer, id, 9);
    finish(producer, id, { tokens: [7], samplingDigest: 'another' });
    const outcome = await outcomeOf(consumer);
    expect(outcome).toMatchObject({ ok: true });
    expect(outcome).not.toHaveProperty('draw');
  });

  it.each([
    ['of another prompt', { promptDigest: 'another' }, 'PROMPT_MISMATCH'],
    ['of an address where nobody listens', { peer: '127.0.0.1:1' }, 'PEER_UNREACHABLE'],
  ])('fails a want %s, and gives its blocks back', async (_, extra, code) => {
    const { producer, consumer, id } = await pair();
    begin(producer, id, 9);
    consumer.handOver.want(wantOf(producer, consumer, id, 9, extra));
    expect(await outcomeOf(consumer)).toMatchObject({
      ok: false,
      error: { code: 'KV_LOAD_FAILED', cause: { code } },
      quarantined: false,
    });
    consumer.blocks.free(id);
    producer.handOver.fail(id, 'REQUEST_ABORTED', 'the test is over');
    producer.blocks.free(id);
    await expectNothingLeft(producer, consumer);
  });

  it('asks nothing of a worker with which it has no way for KV in common', async () => {
    const producer = await makeEnd(services, 'producer', { transports: ['nccl'] });
    const consumer = await makeEnd(services, 'consumer');
    const id = idFor(producer, consumer);
    consumer.handOver.want(wantOf(producer, consumer, id, 9));
    const cause = { code: 'TRANSPORT_MISMATCH', message: expect.stringMatching(/has nccl, .* has host$/) };
    expect(await outcomeOf(consumer)).toMatchObject({ ok: false, error: { cause } });
  });

  it('fails a want at once, by name, where its producer speaks the frozen wire alone', async () => {
    const frozen = await services.make();
    const consumer = await makeEnd(services, 'consumer');
    const id = idBetween(frozen.address, consumer.service.address);
    const peer = formatHostPort(frozen.address);
    consumer.handOver.want(wantOf(consumer, consumer, id, 9, { peer }));
    const cause = { code: 'TRANSPORT_MISMATCH', message: expect.stringContaining('--wire') };
    expect(await outcomeOf(consumer)).toMatchObject({ ok: false, error: { cause } });
  });

  it('fails a load at once, by name, where its producer hands over natively and it was told otherwise', async () => {
    const producer = await makeEnd(services, 'producer');
    const frozen = await services.make();
    const id = idBetween(producer.service.address, frozen.address);
    const cache = pagedCache(LAYERS, false);
    const refused = failure(
      frozen.load({
        requestId: `${id}-01234567`,
        transferId: id,
        peer: producer.service.address,
        layers: cache,
        blockIds: Int32Array.of(0, 1, 2),
        skipBlocks: 0,
      }),
    );
    begin(producer, id, 9);
    await compute(producer, id, 9);
    finish(producer, id);
    const cause = { code: 'TRANSPORT_MISMATCH', message: expect.stringContaining('--wire') };
    expect(await refused).toMatchObject({ cause });
    await expectNothingLeft(producer);
  });

  it('says to pd-doctor which way KV would travel, and nothing comes of the question', async () => {
    const producer = await makeEnd(services, 'producer');
    const frozen = await services.make();
    const here = workerConfig({ role: 'consumer' });
    const ask = ({ address }: { readonly address: HostPort }) => nativeWayFinding(address, here, 60_000);
    const natively = { level: 'ok', what: 'KV would travel natively, by host' };
    expect(await ask(producer.service)).toMatchObject(natively);
    expect(await ask(frozen)).toMatchObject({ level: 'warn', what: 'it speaks the frozen wire alone' });
    expect(producer.service.state().pairs).toEqual([]);
  });

  it('fails a want whose request fails there, with the reason', async () => {
    const { producer, consumer, id } = await pair();
    consumer.handOver.want(wantOf(producer, consumer, id, 9));
    begin(producer, id, 9);
    await until('the WANT to come', () => producer.handOver.state().grants.bound > 0);
    producer.handOver.progress(id, 9, producer.blocks.tableOf(id));
    producer.handOver.layer(0);
    await producer.handOver.stepEnded();
    producer.handOver.fail(id, 'CUDA_ERROR', 'the step failed');
    producer.blocks.free(id);
    expect(await outcomeOf(consumer)).toMatchObject({ ok: false, error: { cause: { code: 'CUDA_ERROR' } } });
    consumer.blocks.free(id);
    await expectNothingLeft(producer, consumer);
  });

  it('lets both ends forget what is given up', async () => {
    const { producer, consumer, id } = await pair();
    const want = wantOf(producer, consumer, id, 9);
    consumer.handOver.want(want);
    begin(producer, id, 9);
    await compute(producer, id, 6);
    await until(
      'the WANT to come',
      () => producer.handOver.state().grants.bound + producer.handOver.state().grants.writing > 0,
    );
    consumer.handOver.cancel(want.requestId);
    expect(await outcomeOf(consumer)).toMatchObject({ ok: false, error: { code: 'REQUEST_ABORTED' } });
    consumer.blocks.free(id);
    await compute(producer, id, 9);
    finish(producer, id);
    await expectNothingLeft(producer, consumer);
  });

  it('ends the lease of KV that nobody wants', async () => {
    const { producer, consumer, id } = await pair();
    begin(producer, id, 9);
    await compute(producer, id, 9);
    finish(producer, id);
    consumer.handOver.unwanted(id, producer.address);
    await expectNothingLeft(producer, consumer);
  });

  it('fails wants at once when the producer is gone, and asks the one that comes after it', async () => {
    const port = await keptPort();
    const producer = await makeEnd(services, 'producer', { port });
    const consumer = await makeEnd(services, 'consumer');
    const id = idFor(producer, consumer);
    consumer.handOver.want(wantOf(producer, consumer, id, 9));
    begin(producer, id, 9);
    await compute(producer, id, 6);
    await until('the WANT to come', () => producer.handOver.state().grants.writing > 0);
    await producer.service.dispose();
    expect(await outcomeOf(consumer)).toMatchObject({ ok: false, error: { code: 'KV_LOAD_FAILED' } });
    consumer.blocks.free(id);
    await expectNothingLeft(consumer);
    const next = await makeEnd(services, 'producer', { port });
    const second = idFor(next, consumer);
    consumer.handOver.want(wantOf(next, consumer, second, 9));
    begin(next, second, 9);
    await compute(next, second, 9);
    finish(next, second);
    expect(await outcomeOf(consumer)).toMatchObject({ ok: true });
  });

  it('answers every WANT before it stops', async () => {
    const { producer, consumer, id } = await pair();
    consumer.handOver.want(wantOf(producer, consumer, id, 9));
    begin(producer, id, 9);
    await until('the WANT to come', () => producer.handOver.state().grants.bound > 0);
    await producer.handOver.close();
    expect(await outcomeOf(consumer)).toMatchObject({
      ok: false,
      error: { cause: { code: 'SERVER_DRAINING' } },
    });
    expect(producer.handOver.state().grants).toMatchObject({ told: 0, bound: 0 });
  });
});
