import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { StreamReading } from '../../../../bench/serve/stream-reading.ts';

const event = (data: unknown) => `data: ${JSON.stringify(data)}\n\n`;
const text = (content: string, finish: string | null = null) =>
  event({ choices: [{ index: 0, text: content, finish_reason: finish }], usage: null });
const delta = (fields: object, finish: string | null = null) =>
  event({ choices: [{ index: 0, delta: fields, finish_reason: finish }] });
const usage = event({ choices: [], usage: { prompt_tokens: 11, completion_tokens: 4, total_tokens: 15 } });
const DONE = 'data: [DONE]\n\n';

function read(endpoint: 'completions' | 'chat', parts: readonly (readonly [atMs: number, sent: string])[]) {
  const reading = new StreamReading(endpoint);
  for (const [at, sent] of parts) reading.push(Buffer.from(sent), at);
  reading.end(parts.at(-1)?.[0] ?? 0);
  return reading;
}

describe('a streamed completion', () => {
  it('says when text came and what the server counted', () => {
    const reading = read('completions', [
      [10, text('Pa')],
      [25, text('ris')],
      [30, text('', 'stop')],
      [31, usage + DONE],
    ]);
    expect(reading.textAtMs).toEqual([10, 25]);
    expect(reading.usage).toEqual({ promptTokens: 11, outputTokens: 4 });
    expect(reading.failure).toBeUndefined();
  });

  it('reads the same however the bytes are cut, with either line end and comments between', () => {
    const whole = `: hello\n\n${text('é')}${text('漢字')}event: x\nid: 1\n${text('🙂', 'length')}${usage}${DONE}`;
    fc.assert(
      fc.property(
        fc.boolean(),
        fc.array(fc.nat(Buffer.byteLength(whole) + 20), { maxLength: 12 }),
        (crlf, cuts) => {
          const bytes = Buffer.from(crlf ? whole.replaceAll('\n', '\r\n') : whole);
          const reading = new StreamReading('completions');
          const bounds = [
            0,
            ...cuts.filter((cut) => cut <= bytes.length).sort((a, b) => a - b),
            bytes.length,
          ];
          for (const [i, from] of bounds.slice(0, -1).entries()) {
            reading.push(bytes.subarray(from, bounds[i + 1]), i);
          }
          reading.end(99);
          expect(reading.textAtMs).toHaveLength(3);
          expect(reading.usage.outputTokens).toBe(4);
          expect(reading.failure).toBeUndefined();
        },
      ),
    );
  });

  it('is a failure where it breaks off, though text has come', () => {
    expect(read('completions', [[1, text('Pa')]]).failure?.code).toBe('TRUNCATED');
    expect(read('completions', []).failure?.code).toBe('TRUNCATED');
    expect(read('completions', [[1, text('Pa') + text('', 'length').slice(0, 20)]]).failure?.code).toBe(
      'BAD_EVENT',
    );
  });

  it('is whole with a finish reason or with [DONE], the last empty line left out or not', () => {
    expect(read('completions', [[1, text('Pa', 'length')]]).failure).toBeUndefined();
    expect(read('completions', [[1, `${text('Pa')}data: [DONE]`]]).failure).toBeUndefined();
  });

  it("is a failure with the server's code where an event is an error", () => {
    const error = { error: { message: 'the KV never came', type: 'server_error', code: 'KV_LOAD_TIMEOUT' } };
    expect(read('completions', [[1, text('Pa') + event(error) + DONE]]).failure).toEqual({
      code: 'stream KV_LOAD_TIMEOUT',
      message: 'the KV never came',
    });
  });

  it('is a failure without a token, and is not where only the text is missing', () => {
    expect(read('completions', [[1, text('', 'stop') + DONE]]).failure?.code).toBe('NO_TOKENS');
    const silent = read('completions', [[1, text('', 'stop') + usage + DONE]]);
    expect(silent.failure).toBeUndefined();
    expect(silent.textAtMs).toEqual([]);
  });
});

describe('a streamed chat', () => {
  it('begins with its text, not with its role', () => {
    const reading = read('chat', [
      [5, delta({ role: 'assistant', content: '' })],
      [9, delta({ content: 'Hi' })],
      [12, delta({ reasoning_content: 'so' })],
      [20, delta({}, 'stop') + DONE],
    ]);
    expect(reading.textAtMs).toEqual([9, 12]);
    expect(reading.usage.outputTokens).toBeUndefined();
    expect(reading.failure).toBeUndefined();
  });
});
