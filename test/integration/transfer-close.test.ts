/** Pairs that are closed because they are idle and too many, and opened again when needed. */
import { afterEach, describe, expect, it } from 'vitest';
import type { TransferService } from '../../src/transfer/service.ts';
import { encodeMessage } from '../../src/wire/codec.ts';
import type { TensorId } from '../../src/wire/ids.ts';
import type { SendType } from '../../src/wire/messages.ts';
import { RawPeer } from '../support/raw-peer.ts';
import { count, flat, Services, send, until } from '../support/transfer.ts';
import { WatchedTransport } from '../support/watched-transport.ts';

const services = new Services();
afterEach(() => services.dispose());

let number = 0;
async function move(from: TransferService, to: TransferService): Promise<void> {
  const tensor = flat(`r${number++}#l`, 1_000, to.address);
  const got = to.receive(tensor.tensorId, from.address, 60_000);
  await send(from, tensor).sent;
  await got;
}
const open = (service: TransferService) =>
  service.state().pairs.filter(({ state }) => state === 'open').length;
const errors = (service: TransferService) =>
  (['peer_lost', 'timeout', 'no_pair', 'unexpected_answer'] as const).reduce(
    (sum, kind) => sum + count(service, 'pd_protocol_errors_total', kind),
    0,
  );

describe.each(['PUT_ASYNC', 'GET'] as SendType[])('%s', (sendType) => {
  it('the side that opened more pairs than it may keep closes the least recently used, on both ends', async () => {
    // In GET the consumer opens the pair.
    const hub = await services.make({ sendType, limits: { maxPeers: 2 } });
    const others: TransferService[] = [];
    for (let i = 0; i < 4; i++) others.push(await services.make({ sendType }));
    const meet = (other: TransferService) => (sendType === 'GET' ? move(other, hub) : move(hub, other));
    for (const other of others) await meet(other);
    await until('two are left', () => open(hub) === 2);
    await until('closed there too', () => others.map(open).join() === '0,0,1,1');
    await meet(others[0]!);
    await until('the next one went', () => others.map(open).join() === '1,0,0,1');
    for (const end of [hub, ...others]) expect(errors(end)).toBe(0);
  });

  it('the side to which more were opened asks for it', async () => {
    const hub = await services.make({ sendType, limits: { maxPeers: 1 } });
    const others: TransferService[] = [];
    for (let i = 0; i < 3; i++) others.push(await services.make({ sendType }));
    const meet = (other: TransferService) => (sendType === 'GET' ? move(hub, other) : move(other, hub));
    for (const other of others) await meet(other);
    await until('one is left', () => open(hub) === 1 && others.map(open).join() === '0,0,1');
    await meet(others[0]!);
    await until('the other one is left', () => others.map(open).join() === '1,0,0');
    for (const end of [hub, ...others]) expect(errors(end)).toBe(0);
  });
});

it('a pair in use is kept, and closed once it is idle', async () => {
  const wire = new WatchedTransport();
  const hub = await services.make({ limits: { maxPeers: 1 } }, { wrapTransport: wire.wrap });
  const [a, b] = [await services.make(), await services.make()];
  await move(hub, a);
  wire.hold();
  const busy = send(hub, flat('busy#l', 1_000, a.address)).sent;
  await until('announced', () => wire.sends.length === 2);
  const second = send(hub, flat('second#l', 1_000, b.address)).sent;
  await until('both are open', () => open(hub) === 2);
  wire.release();
  await Promise.all([busy, second]);
  await until('one is left', () => open(hub) === 1 && open(a) === 0);
});

it('a peer that is not ours, and one that knows no CLOSE, is never asked nor told', async () => {
  const hub = await services.make({ limits: { maxPeers: 1 } });
  const raw = services.add(new RawPeer(hub.address));
  const pair = await raw.pair();
  const old = await services.make({}, { features: ['seq', 'bundle'] });
  await move(old, hub);
  await move(hub, old);
  await until('three pairs', () => open(hub) === 3);
  await raw.say({ cmd: 'PUT', tensor_id: 'v#l', shape: [4], dtype: 'uint8' });
  expect(await raw.answer(1)).toBe('0');
  expect([raw.answers.length, open(hub), pair.pending]).toEqual([1, 3, 0]);
});

it('CLOSE by who has no pair is answered, and hurts nobody', async () => {
  const consumer = await services.make();
  const stranger = services.add(new RawPeer(consumer.address));
  await stranger.say(encodeMessage({ cmd: 'CLOSE' }));
  expect(await stranger.answer(1)).toContain('done');
});

it('both ends opening at once end in two pairs, one for each direction', async () => {
  const [a, b] = [await services.make(), await services.make()];
  const both = [
    send(a, flat('to-b#l', 1_000, b.address)).sent,
    send(b, flat('to-a#l', 1_000, a.address)).sent,
  ];
  const got = [
    a.receive('to-a#l' as TensorId, b.address, 60_000),
    b.receive('to-b#l' as TensorId, a.address, 60_000),
  ];
  await Promise.all([...both, ...got]);
  for (const end of [a, b]) {
    const directions = end.state().pairs.map(({ direction, state }) => `${direction} ${state}`);
    expect(directions.sort()).toEqual(['incoming open', 'outgoing open']);
  }
});
