/** A thousand requests that end in every way, between two ends on the host: afterwards every book is at zero. */
import { expect, it } from 'vitest';
import { compute, finish, idFor, makeEnd, wantOf } from '../support/native.ts';
import { testServices, until } from '../support/transfer.ts';

const services = testServices();

const REQUESTS = 1_000;
/** Under way at a time: four blocks each, of the sixteen of either cache. */
const AT_ONCE = 2;

it('leaves nothing behind, whatever became of each', async () => {
  const producer = await makeEnd(services, 'producer');
  const consumer = await makeEnd(services, 'consumer');
  const ended = { ok: 0, failed: 0 };

  async function one(n: number): Promise<void> {
    const id = idFor(producer, consumer);
    const want = () => consumer.handOver.want(wantOf(producer, consumer, id, 14));
    const begin = () => {
      producer.blocks.allocate(id, 14);
      producer.handOver.begin({ transferId: id, promptDigest: 'prompt', tokens: 14 });
    };
    const requestId = `${id}-01234567`;
    const outcome = async () => {
      await until('an outcome', () => consumer.outcomes.some((each) => each.requestId === requestId));
      const at = consumer.outcomes.findIndex((each) => each.requestId === requestId);
      const [mine] = consumer.outcomes.splice(at, 1);
      if (mine!.ok) ended.ok++;
      else ended.failed++;
      consumer.blocks.free(id);
    };
    switch (n % 6) {
      case 0: // asked first
        want();
        begin();
        await compute(producer, id, 6);
        await compute(producer, id, 14);
        finish(producer, id);
        return outcome();
      case 1: // computed first
        begin();
        await compute(producer, id, 14);
        finish(producer, id);
        want();
        return outcome();
      case 2: // given up in the middle
        want();
        begin();
        await compute(producer, id, 6);
        consumer.handOver.cancel(requestId as never);
        await outcome();
        await compute(producer, id, 14);
        finish(producer, id);
        return;
      case 3: // fails there
        want();
        begin();
        await compute(producer, id, 6);
        producer.handOver.fail(id, 'CUDA_ERROR', 'as the test wants');
        producer.blocks.free(id);
        return outcome();
      case 4: // of another prompt
        begin();
        consumer.handOver.want(wantOf(producer, consumer, id, 14, { promptDigest: 'another' }));
        await outcome();
        producer.handOver.fail(id, 'REQUEST_ABORTED', 'nobody decodes it');
        producer.blocks.free(id);
        return;
      default: // not wanted
        begin();
        await compute(producer, id, 14);
        finish(producer, id);
        consumer.handOver.unwanted(id, producer.address);
        await until('the lease to end', () => !producer.blocks.leaseOf(id));
    }
  }

  let next = 0;
  await Promise.all(
    Array.from({ length: AT_ONCE }, async () => {
      while (next < REQUESTS) await one(next++);
    }),
  );
  expect(ended.ok).toBeGreaterThan(REQUESTS / 4);
  expect(ended.failed).toBeGreaterThan(REQUESTS / 4);
  // the last acknowledgements are still on their way
  await until('books at zero', () =>
    [producer, consumer].every(
      (end) => end.leftovers().length === 0 && end.handOver.state().grants.told === 0,
    ),
  );
  for (const { handOver } of [producer, consumer]) {
    const { wants, grants, quarantine } = handOver.state();
    expect(quarantine).toEqual([]);
    expect(wants).toMatchObject({ waiting: 0, givenUp: 0, ended: 0, quarantined: 0, receipts: 0 });
    expect(grants).toMatchObject({ requests: 0, leases: 0, launches: 0, unbound: 0, bound: 0, told: 0 });
  }
});
