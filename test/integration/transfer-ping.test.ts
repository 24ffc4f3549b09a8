/** Pings as a proxy sees them: from the engine's own address, again after it was away, and never a stale one. */
import { afterEach, expect, it } from 'vitest';
import * as zmq from 'zeromq';
import { formatHostPort } from '../../src/net/address.ts';
import { decodePing } from '../../src/wire/codec.ts';
import { Services } from '../support/transfer.ts';

const services = new Services();
afterEach(() => services.dispose());

async function proxy(port = 0): Promise<{ socket: zmq.Router; port: number }> {
  const socket = new zmq.Router({ linger: 0, handover: true });
  await socket.bind(`tcp://127.0.0.1:${port === 0 ? '*' : port}`);
  services.add({ dispose: async () => socket.close() });
  return { socket, port: Number(/:(\d+)$/.exec(socket.lastEndpoint!)![1]) };
}

it('come from the KV address, go on after the proxy was away, and stop when told', async () => {
  const first = await proxy();
  const engine = await services.make();
  const ping = {
    proxy: { host: '0.0.0.0', port: first.port },
    type: 'P',
    httpAddress: '127.0.0.1:8081',
  } as const;
  engine.startPing({ ...ping, intervalMs: 30 });
  const [identity, body] = await first.socket.receive();
  expect(identity!.toString()).toBe(formatHostPort(engine.address));
  expect(decodePing(body!)).toEqual({
    type: 'P',
    http_address: '127.0.0.1:8081',
    zmq_address: formatHostPort(engine.address),
  });
  await first.socket.receive();
  const gone = new Promise((resolve) => first.socket.events.on('end', resolve));
  first.socket.close();
  await gone;
  const second = await proxy(first.port);
  await second.socket.receive();
  engine.stopPing();
});

it('go to whichever address of a name takes them', async () => {
  const { socket, port } = await proxy();
  const engine = await services.make();
  // Nobody listens at the first.
  const name = { host: '127.0.0.2', otherHosts: ['127.0.0.1'], port };
  engine.startPing({ proxy: name, type: 'P', httpAddress: '127.0.0.1:8081', intervalMs: 30 });
  const [identity] = await socket.receive();
  expect(identity!.toString()).toBe(formatHostPort(engine.address));
  engine.stopPing();
});

it('to an address that is none leave the engine alive', async () => {
  const engine = await services.make();
  engine.startPing({ proxy: { host: 'no host', port: 1 }, type: 'D', httpAddress: 'x:1', intervalMs: 1_000 });
  expect(engine.state().address).toBe(formatHostPort(engine.address));
});
