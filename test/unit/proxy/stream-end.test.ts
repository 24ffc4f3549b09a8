import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { PdError } from '../../../src/errors.ts';
import { eventText, type StreamEvent } from '../../../src/openai-error.ts';
import type { Part } from '../../../src/parsing/parts.ts';
import { SseEvents } from '../../../src/proxy/relay.ts';
import { streamEnd } from '../../../src/proxy/stream-end.ts';
import { responseFormat } from '../../../src/worker/server/response-answers.ts';
import { BYTE_MODEL } from '../../support/fake-core.ts';

const RESPONSES = '/v1/responses';
const FAILURE = new PdError('UPSTREAM_FAILED', 'the consumer broke off', { peer: 'a:1' });

const PARTS: readonly Part[] = [
  { type: 'reasoning', text: 'Hm.' },
  { type: 'content', text: 'One ' },
  { type: 'content', text: 'moment\n\nevent: error' },
  { type: 'call', name: 'f' },
  { type: 'arguments', text: '{"sequence_number": 7}' },
];

const textOf = (events: readonly StreamEvent[]) =>
  events.map(({ name, data }) => eventText(JSON.stringify(data), name)).join('');

/** What a worker writes of the first `parts` of an answer, and how it would end that itself. */
async function written(parts: number, asked_for: object): Promise<{ text: string; broke: string }> {
  const reading = { body: {}, parsing: {}, asked_for } as Parameters<typeof responseFormat>[1];
  const base = { id: 'resp_1', created: 0, model: 'm', fingerprint: 'fp_1' };
  const format = responseFormat(BYTE_MODEL, reading, base);
  let text = textOf(format.begin());
  for (const part of PARTS.slice(0, parts)) {
    text += textOf(
      await format.said({ index: 0, delta: { text: '', parts: [part], tokens: [], logprobs: [] } }),
    );
  }
  return { text, broke: textOf(format.broke(FAILURE)) };
}

/** How the proxy ends what has come to it in pieces of these sizes. */
function ended(bytes: Buffer, sizes: readonly number[]): string {
  const events = new SseEvents();
  const end = streamEnd(RESPONSES);
  for (let at = 0, i = 0; at < bytes.length; i++) {
    const size = sizes[i % sizes.length]!;
    end.passed(events.push(bytes.subarray(at, at + size)));
    at += size;
  }
  return end.failed(FAILURE);
}

describe('a stream of responses that breaks off', () => {
  it('ends as the worker that wrote it would have ended it, wherever that is and however it is cut', async () => {
    const drawn = fc.record({
      parts: fc.integer({ min: 0, max: PARTS.length }),
      half: fc.constantFrom('', 'event: response.output_te'),
      sizes: fc.array(fc.integer({ min: 1, max: 400 }), { minLength: 1, maxLength: 5 }),
      crlf: fc.boolean(),
      // Beyond what is held of an event that has not ended.
      instructions: fc.constantFrom('Be kind', 'x'.repeat(150_000)),
    });
    await fc.assert(
      fc.asyncProperty(drawn, async ({ parts, half, sizes, crlf, instructions }) => {
        const { text, broke } = await written(parts, { instructions });
        const bytes = Buffer.from((crlf ? text.replaceAll('\n', '\r\n') : text) + half);
        expect(ended(bytes, instructions.length > 100 ? sizes.map((size) => size * 1_000) : sizes)).toBe(
          broke,
        );
      }),
    );
  });

  it('ends with its error alone where nothing has passed, or more than is kept', async () => {
    const alone = (sequence: number) =>
      `event: error\ndata: {"type":"error","sequence_number":${sequence},"code":"UPSTREAM_FAILED","message":"the consumer broke off","param":null}\n\n`;
    expect(ended(Buffer.alloc(0), [1])).toBe(alone(0));
    const { text } = await written(PARTS.length, { instructions: 'x'.repeat(2 ** 20) });
    const events = text.split('\n\n').length - 1;
    expect(ended(Buffer.from(text), [65_536])).toBe(alone(events));
    // In the middle of one that is too long to be held: that one is ended, and has its number.
    const half = Buffer.from(`${text}event: response.completed\ndata: ${'x'.repeat(100_000)}`);
    expect(ended(half, [65_536])).toBe(`\n\n${alone(events + 1)}`);
  });

  it('ends with the answer of an instance that has refused it', () => {
    const refused = (body: string) => streamEnd(RESPONSES).refused(Buffer.from(body));
    const told = (code: string, message: string, param: string | null) =>
      `event: error\ndata: ${JSON.stringify({ type: 'error', sequence_number: 0, code, message, param })}\n\n`;
    expect(refused('{"error":{"message":"no","code":"READER_BUSY","param":"input"}}')).toBe(
      told('READER_BUSY', 'no', 'input'),
    );
    expect(refused('{"object":"error",\n"message":"no","code":400}')).toBe(told('400', 'no', null));
    expect(refused('<html>')).toBe(told('UPSTREAM_FAILED', '<html>', null));
  });
});

it('a stream of choices ends with its error and [DONE]', () => {
  const end = streamEnd('/v1/chat/completions');
  expect(end.failed(FAILURE)).toMatch(
    /^data: \{"error":\{.*"code":"UPSTREAM_FAILED".*\}\n\ndata: \[DONE\]\n\n$/,
  );
  expect(end.refused(Buffer.from('{"error":\n {}}'))).toBe('data: {"error": {}}\n\ndata: [DONE]\n\n');
});
