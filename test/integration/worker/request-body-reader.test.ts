/** The reader thread itself, with the demo model's tokenizer. */
import fc from 'fast-check';
import { afterEach, describe, expect, it } from 'vitest';
import { demoModelDir } from '../../../src/config/demo-model.ts';
import { createLogger } from '../../../src/observability/log.ts';
import {
  RequestBodyReader,
  type RequestBodyReaderOptions,
  type Route,
  readRequestBody,
} from '../../../src/worker/request-body-reader.ts';
import type { Served } from '../../../src/worker/server/fields.ts';

const LOG = createLogger({ level: 'silent', format: 'json' }, 'main');
const SERVED: Served = { modelNames: ['demo'], maxModelLen: 2_048, vocabSize: 2_048 };
/** Any length may be read. */
const BOUNDLESS: Served = { ...SERVED, maxModelLen: 2 ** 30 };

const closers: (() => Promise<void>)[] = [];
afterEach(async () => {
  for (const close of closers.splice(0)) await close();
});

async function start(options: RequestBodyReaderOptions = {}): Promise<RequestBodyReader> {
  const reader = await RequestBodyReader.start(demoModelDir(), LOG, options);
  closers.push(() => reader.close());
  return reader;
}

const bytes = (body: unknown) =>
  new TextEncoder().encode(typeof body === 'string' ? body : JSON.stringify(body));
/** Takes any machine a good while. */
const longWord = () => bytes({ prompt: 'xyz'.repeat(300_000) });

async function outcome(read: () => unknown): Promise<unknown> {
  try {
    return await read();
  } catch (error) {
    const { code, message, context } = error as { code: string; message: string; context: object };
    return { code, message, context };
  }
}

describe('the reader thread', () => {
  const text = fc.string({ unit: 'grapheme', maxLength: 80 });
  const ids = fc.array(fc.nat({ max: 2_100 }), { maxLength: 20 });
  const message = fc.record({
    role: fc.constantFrom('user', 'assistant', 'system', 'pirate'),
    content: text,
  });
  const extras = {
    seed: fc.constant(1),
    model: fc.constantFrom('demo', 'other'),
    max_tokens: fc.nat({ max: 2_100 }),
    stop: fc.constantFrom('END', ['a', 'b']),
    stop_token_ids: ids,
  };
  const rest = { requiredKeys: ['prompt', 'seed'] as ['prompt', 'seed'] };
  const bodies: fc.Arbitrary<readonly [Route, unknown]> = fc.oneof(
    fc
      .record(
        { ...extras, prompt: fc.oneof(text, ids, fc.array(text), fc.array(ids)), echo: fc.boolean() },
        rest,
      )
      .map((body) => ['completions', body] as const),
    fc
      .record({ ...extras, messages: fc.array(message) }, { requiredKeys: ['messages', 'seed'] })
      .map((body) => ['chat', body] as const),
    fc.record({ prompt: text, return_token_strs: fc.boolean() }).map((body) => ['tokenize', body] as const),
    fc.record({ tokens: ids }).map((body) => ['detokenize', body] as const),
    fc.json().map((body) => ['completions', body] as const),
    fc.string().map((body) => ['chat', body] as const),
  );

  it('says of any body what is said of it without the thread', async () => {
    const reader = await start({ shortBody: 0 });
    await fc.assert(
      fc.asyncProperty(bodies, async ([route, body]) => {
        const here = await outcome(() => readRequestBody(SERVED, reader.model, route, bytes(body)));
        expect(await outcome(() => reader.read(SERVED, route, bytes(body)))).toEqual(here);
      }),
      { numRuns: 300 },
    );
  });

  it('leaves the event loop to others', async () => {
    const reader = await start({ workTimeoutMs: 300_000 });
    let done = false;
    const long = reader.read(BOUNDLESS, 'tokenize', longWord()).finally(() => {
      done = true;
    });
    await new Promise((resolve) => setImmediate(resolve));
    expect(done).toBe(false);
    const { count } = JSON.parse(new TextDecoder().decode(await long)) as { count: number };
    expect(count).toBeGreaterThan(300_000);
  });

  it('is replaced where a body takes it too long', async () => {
    const reader = await start({ workTimeoutMs: 20, shortBody: 0 });
    expect(await outcome(() => reader.read(BOUNDLESS, 'tokenize', longWord()))).toMatchObject({
      code: 'BODY_TOO_COSTLY',
      message: expect.stringContaining('took more than 0.02 s'),
    });
    // On a busy machine even this may take too long: then there is another thread for the next.
    const next = async () => await outcome(() => reader.read(SERVED, 'detokenize', bytes({ tokens: [300] })));
    let answer = await next();
    while (!(answer instanceof Uint8Array)) {
      expect(answer).toMatchObject({ code: 'BODY_TOO_COSTLY' });
      answer = await next();
    }
  });

  it('ends while it reads when it is closed', async () => {
    const reader = await start();
    const cut = outcome(() => reader.read(BOUNDLESS, 'tokenize', longWord()));
    await reader.close();
    expect(await cut).toMatchObject({ code: 'SERVER_DRAINING' });
  });
});
