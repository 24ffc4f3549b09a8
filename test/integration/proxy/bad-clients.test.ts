/** Clients that send too much, too slowly, or never read: what they cost the proxy, and what others notice of them. */
import { subscribe, unsubscribe } from 'node:diagnostics_channel';
import { once } from 'node:events';
import { connect, type Socket } from 'node:net';
import { afterEach, expect, test } from 'vitest';
import { formatHostPort } from '../../../src/net/address.ts';
import type { PdProxy } from '../../../src/proxy/proxy.ts';
import { type Answer, answerJson, FakeUpstream } from '../../support/fake-upstream.ts';
import { startQuietProxy } from '../../support/quiet-proxy.ts';
import { withStoppedClock } from '../../support/stopped-clock.ts';
import { statusesAfterBody } from '../../support/whole-body-first.ts';

const MIB = 2 ** 20;

const closing: (() => unknown)[] = [];
afterEach(async () => {
  for (const close of closing.splice(0).reverse()) await close();
});

async function start(answer: Answer, settings: Parameters<typeof startQuietProxy>[0] = {}) {
  const proxy = await startQuietProxy(settings);
  closing.push(() => proxy.close(0));
  const instances: FakeUpstream[] = [];
  for (const role of ['producer', 'consumer'] as const) {
    const one = await FakeUpstream.start(role, role === 'consumer' ? answer : answerJson());
    closing.push(() => one.kill());
    await one.ping(proxy.discoveryAddress);
    instances.push(one);
  }
  while (proxy.instances.length < 2) await new Promise((resolve) => setImmediate(resolve));
  return { proxy, producer: instances[0]!, consumer: instances[1]! };
}

async function open(proxy: PdProxy): Promise<Socket> {
  const socket = connect(proxy.httpAddress.port, proxy.httpAddress.host);
  socket.on('error', () => {}); // the proxy may cut it
  closing.push(() => socket.destroy());
  await once(socket, 'connect');
  return socket;
}

const post = (proxy: PdProxy) =>
  fetch(`http://${formatHostPort(proxy.httpAddress)}/v1/completions`, {
    method: 'POST',
    body: '{"model":"m","prompt":"Hello"}',
  });

test('10 MB of headers are cut off at the first kilobytes', async () => {
  const { proxy, producer } = await start(answerJson());
  const socket = await open(proxy);
  const closed = new Promise<void>((resolve) => void socket.once('close', () => resolve()));
  const answer = once(socket, 'data');
  const line = `x-much: ${'a'.repeat(8_000)}\r\n`;
  socket.write(`POST /v1/completions HTTP/1.1\r\nhost: x\r\n${line.repeat(4)}`);
  const refused = String((await answer)[0]);
  expect(refused).toMatch(/^HTTP\/1\.1 431 /);
  expect(JSON.parse(refused.slice(refused.indexOf('{')))).toMatchObject({
    error: {
      type: 'invalid_request_error',
      code: 'REQUEST_INVALID',
      message: expect.stringContaining('more than 16384 bytes'),
    },
  });
  for (let sent = 0; sent < 10 * MIB && !socket.destroyed; sent += line.length) {
    if (!socket.write(line)) await Promise.race([new Promise((go) => socket.once('drain', go)), closed]);
  }
  await closed;
  expect(socket.bytesRead).toBeLessThan(1_000);
  expect(producer.asked).toEqual([]);
  expect((await post(proxy)).status).toBe(200);
});

test('bodies that come byte by byte hold up nobody, and reach an instance once they are whole', async () => {
  const { proxy, producer } = await start(answerJson());
  const body = '{"model":"m","prompt":"slow"}';
  const head = `POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: ${body.length}\r\n\r\n`;
  const slow = await Promise.all(Array.from({ length: 50 }, () => open(proxy)));
  for (const socket of slow) socket.write(head);
  for (const byte of body.slice(0, -1)) {
    for (const socket of slow) socket.write(byte);
    expect((await post(proxy)).status).toBe(200);
  }
  expect(producer.asked.filter(({ json }) => json['prompt'] === 'slow')).toEqual([]);
  const answers = slow.map((socket) => once(socket, 'data'));
  for (const socket of slow) socket.write(body.at(-1)!);
  for (const [data] of await Promise.all(answers)) expect(String(data)).toMatch(/^HTTP\/1\.1 200 /);
  expect(producer.asked.filter(({ json }) => json['prompt'] === 'slow')).toHaveLength(50);
});

test('a body that says it is too long is refused before it comes', async () => {
  const { proxy } = await start(answerJson());
  const socket = await open(proxy);
  const answer = once(socket, 'data');
  socket.write(`POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: ${33 * MIB}\r\n\r\n{`);
  expect(String((await answer)[0])).toMatch(/^HTTP\/1\.1 413 /);
  const { httpAddress } = proxy;
  const metrics = await (await fetch(`http://${formatHostPort(httpAddress)}/metrics`)).text();
  expect(metrics).toContain('pd_proxy_requests_total{route="/v1/completions",status="413"} 1\n');
});

test('a body that is too long is refused in an answer that a client reads who sends all of it first', async () => {
  const { proxy } = await start(answerJson());
  expect(await statusesAfterBody(proxy.httpAddress, '/v1/completions', 48 * MIB)).toEqual(['413', '200']);
});

test('an answer that is whole is not kept for ever for a client that does not read it', async () => {
  const { proxy } = await start(answerJson(200, { text: 'x'.repeat(15 * MIB) }), {
    decodeIdleTimeoutMs: 500,
  });
  const taken = new Promise<Socket>((resolve) => {
    const take = (message: unknown) => {
      const { socket } = message as { socket: Socket };
      if (socket.localPort === proxy.httpAddress.port) resolve(socket);
    };
    subscribe('net.server.socket', take);
    closing.push(() => unsubscribe('net.server.socket', take));
  });
  const socket = await open(proxy);
  socket.pause();
  socket.write('POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 14\r\n\r\n{"prompt":"x"}');
  await once(await taken, 'close');
});

test('requests that came one behind the other on a connection all end with it', async () => {
  const { proxy, consumer } = await start((_, out) => {
    out.writeHead(200, { 'content-type': 'text/event-stream' });
    out.write('data: {}\n\n');
  });
  let asked = 0;
  const all = new Promise<void>((resolve) => {
    consumer.events.on('asked', () => ++asked === 3 && resolve());
  });
  let aborted = 0;
  const ended = new Promise<void>((resolve) => {
    consumer.events.on('aborted', () => ++aborted === 3 && resolve());
  });
  const body = '{"model":"m","prompt":"Hello"}';
  const socket = await open(proxy);
  socket.write(
    `POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: ${body.length}\r\n\r\n${body}`.repeat(3),
  );
  await all;
  socket.destroy();
  await ended;
});

test('of an answer that its client never reads little is taken in, and in the end it is given up', async () => {
  const event = `data: ${'x'.repeat(16_384)}\n\n`;
  let taken = 0;
  const endless: Answer = async (_, out) => {
    out.writeHead(200, { 'content-type': 'text/event-stream' });
    const gone = once(out, 'close');
    while (!out.destroyed && taken < 512 * MIB) {
      taken += event.length;
      if (!out.write(event)) await Promise.race([once(out, 'drain'), gone]);
    }
  };
  const { proxy, consumer } = await start(endless, { decodeIdleTimeoutMs: 10_000 });
  await withStoppedClock(async (clock) => {
    const [asked, aborted] = [once(consumer.events, 'asked'), once(consumer.events, 'aborted')];
    const body = '{"model":"m","prompt":"Hello","stream":true}';
    const socket = await open(proxy);
    socket.pause();
    socket.write(`POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: ${body.length}\r\n\r\n${body}`);
    await asked;
    // Until no more is taken in for as long as a request takes there and back.
    for (let before = -1; before !== taken; ) {
      before = taken;
      await fetch(`http://${formatHostPort(proxy.httpAddress)}/health`);
    }
    await clock.passesUntil(aborted);
  });
  // What fits into the buffers of four sockets.
  expect(taken).toBeLessThan(64 * MIB);
});
