import { once } from 'node:events';
import { createServer } from 'node:http';
import type { AddressInfo } from 'node:net';
import fc from 'fast-check';
import { expect, test } from 'vitest';
import { Cancellation } from '../../../src/deferred.ts';
import type { Instance } from '../../../src/proxy/registry.ts';
import { relay, SseEvents } from '../../../src/proxy/relay.ts';
import { streamEnd } from '../../../src/proxy/stream-end.ts';
import { UpstreamResponse } from '../../../src/proxy/upstream.ts';

test('however events are cut into chunks: all bytes pass, and what has passed always ends with an event', () => {
  const events = fc.array(
    fc.string({ unit: 'grapheme', maxLength: 20 }).map((t) => `data: ${JSON.stringify(t)}\n\n`),
  );
  fc.assert(
    fc.property(events, fc.array(fc.integer({ min: 1, max: 9 }), { minLength: 1 }), (parts, sizes) => {
      const bytes = Buffer.from(parts.join(''));
      const relay = new SseEvents();
      let passed = Buffer.alloc(0);
      for (let at = 0, i = 0; at < bytes.length; i++) {
        const size = sizes[i % sizes.length]!;
        passed = Buffer.concat([passed, relay.push(bytes.subarray(at, at + size))]);
        at += size;
        expect(passed.length === 0 || passed.subarray(-2).toString() === '\n\n').toBe(true);
      }
      expect(Buffer.concat([passed, relay.rest()]).equals(bytes)).toBe(true);
      expect(relay.rest()).toHaveLength(0);
    }),
  );
});

test('an event without an end is not held for ever', () => {
  const relay = new SseEvents();
  expect(relay.push(Buffer.alloc(100_000, 'x'))).toHaveLength(100_000);
});

test('events that are there with the head, in one turn, follow it in order', async () => {
  const texts = Array.from({ length: 5 }, (_, i) => `data: ${i}\n\n`);
  const server = createServer((_request, out) => {
    const controller = { pause() {}, resume() {}, abort() {} };
    const headers = { 'content-type': 'text/event-stream' };
    const response = new UpstreamResponse(200, headers, controller as never);
    for (const text of texts) response.push(Buffer.from(text));
    response.end();
    const call = { instance: {} as Instance, what: 'decode', timeoutMs: 60_000, timeoutName: 'fixed' };
    const end = streamEnd('/v1/completions');
    void relay(response, out, { call, requestId: 'a', end, signal: new Cancellation(), onFirstEvent() {} });
  });
  await once(server.listen(0, '127.0.0.1'), 'listening');
  const { port } = server.address() as AddressInfo;
  const answer = await fetch(`http://127.0.0.1:${port}/`);
  expect(await answer.text()).toBe(texts.join(''));
  server.closeAllConnections();
  server.close();
});
