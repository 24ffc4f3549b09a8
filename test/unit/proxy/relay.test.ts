import fc from 'fast-check';
import { expect, test } from 'vitest';
import { SseEvents } from '../../../src/proxy/relay.ts';

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
