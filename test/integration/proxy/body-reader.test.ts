/** Long bodies at the proxy: the thread that reads them, and what clients see meanwhile. */
import fc from 'fast-check';
import { afterEach, describe, expect, it } from 'vitest';
import type { Signal } from '../../../src/deferred.ts';
import { formatHostPort } from '../../../src/net/address.ts';
import { createLogger, type Logger } from '../../../src/observability/log.ts';
import { type RequestBody, readBody } from '../../../src/proxy/body.ts';
import { BodyReader, type BodyReaderOptions, type ToBodyThread } from '../../../src/proxy/body-reader.ts';
import { ScriptedReader } from '../../support/fake-reader.ts';
import { answerJson, FakeUpstream } from '../../support/fake-upstream.ts';
import { startQuietProxy } from '../../support/quiet-proxy.ts';

const LOG = createLogger({ level: 'silent', format: 'json' }, 'main');
const NEVER = new AbortController().signal;

const closers: (() => Promise<unknown>)[] = [];
afterEach(async () => {
  for (const close of closers.splice(0).reverse()) await close();
});

function start(options: BodyReaderOptions = {}): BodyReader {
  const reader = new BodyReader(LOG, options);
  closers.push(() => reader.close());
  return reader;
}

const bytes = (body: unknown) =>
  new TextEncoder().encode(typeof body === 'string' ? body : JSON.stringify(body));
/** Takes any machine a good while. */
const junk = () => bytes(`{"x":[${'{"a":[1]},'.repeat(200_000)}0]}`);

async function outcome(read: () => RequestBody | Promise<RequestBody>): Promise<object> {
  try {
    return await read();
  } catch (error) {
    const { code, message } = error as { code: string; message: string };
    return { code, message };
  }
}

describe('the reader thread', () => {
  const bodies = fc.oneof(
    fc.record(
      {
        prompt: fc.oneof(
          fc.string({ unit: 'binary' }),
          fc.array(fc.string()),
          fc.array(fc.nat()),
          fc.array(fc.array(fc.nat())),
        ),
        model: fc.oneof(fc.string(), fc.nat()),
        n: fc.nat(),
        stream: fc.boolean(),
        logprobs: fc.nat(),
      },
      { requiredKeys: [] },
    ),
    fc.json(),
    fc.string(),
  );

  it('says of any body what is said of it without the thread', async () => {
    const reader = start({ shortBody: 0 });
    await fc.assert(
      fc.asyncProperty(bodies, async (body) => {
        const here = await outcome(() => readBody(bytes(body)));
        expect(await outcome(() => reader.read(bytes(body), NEVER))).toEqual(here);
      }),
      { numRuns: 300 },
    );
  });

  it('leaves the event loop to others', async () => {
    const reader = start();
    let done = false;
    const long = reader.read(junk(), NEVER).finally(() => {
      done = true;
    });
    await new Promise((resolve) => setImmediate(resolve));
    expect(done).toBe(false);
    expect(Buffer.compare((await long).original, junk())).toBe(0);
  });

  it('refuses a body that takes too long, and a new thread reads the next', async () => {
    const reader = start({ workTimeoutMs: 5, shortBody: 0 });
    expect(await outcome(() => reader.read(junk(), NEVER))).toMatchObject({
      code: 'BODY_TOO_COSTLY',
      message: expect.stringContaining('took more than 0.005 s'),
    });
    // On a busy machine even this may take too long: then there is another thread for the next.
    const next = () => outcome(() => reader.read(bytes({ prompt: 'a' }), NEVER));
    let answer = await next();
    while (!('prompts' in answer)) {
      expect(answer).toMatchObject({ code: 'BODY_TOO_COSTLY' });
      answer = await next();
    }
  });

  it('ends while it reads when the reader is closed', async () => {
    const reader = start();
    const cut = outcome(() => reader.read(junk(), NEVER));
    await reader.close();
    expect(await cut).toMatchObject({ code: 'SERVER_DRAINING' });
  });
});

describe('a long body at the proxy', () => {
  const LONG = { model: 'm', prompt: 'x'.repeat(70_000), n: 2 };

  /** With threads that follow a script. */
  async function startProxy(limits: BodyReaderOptions = {}) {
    const threads: ScriptedReader<ToBodyThread, RequestBody>[] = [];
    const openThread = () => {
      const thread = new ScriptedReader<ToBodyThread, RequestBody>();
      threads.push(thread);
      return thread;
    };
    /** Of each request, in order: aborted once the proxy knows that its client has gone. */
    const signals: Signal[] = [];
    const bodyReader = (log: Logger) => {
      const reader = new BodyReader(log, { ...limits, openThread });
      const read: BodyReader['read'] = (body, signal) => {
        signals.push(signal);
        return reader.read(body, signal);
      };
      return { read, close: () => reader.close() };
    };
    const proxy = await startQuietProxy({}, { bodyReader });
    closers.push(() => proxy.close(0));
    const instances: FakeUpstream[] = [];
    for (const role of ['producer', 'consumer'] as const) {
      const instance = await FakeUpstream.start(role, answerJson());
      closers.push(() => instance.kill());
      await instance.ping(proxy.discoveryAddress);
      instances.push(instance);
    }
    await proxy.untilPaired();
    const [producer, consumer] = instances as [FakeUpstream, FakeUpstream];
    const post = (body: object, signal: AbortSignal = NEVER) =>
      fetch(`http://${formatHostPort(proxy.httpAddress)}/v1/completions`, {
        method: 'POST',
        body: JSON.stringify(body),
        signal,
      });
    /** The thread that has been given the long body. */
    const reading = async () => {
      while (threads.length === 0) await new Promise((resolve) => setImmediate(resolve));
      const thread = threads[0]!;
      thread.emit({ type: 'ready' });
      await thread.until(1);
      return thread;
    };
    return { proxy, threads, signals, producer, consumer, post, reading };
  }

  it('holds nobody up while it is read, and then goes to the pair like others', async () => {
    const { producer, consumer, post, reading, threads } = await startProxy();
    expect((await post({ prompt: 'before' })).status).toBe(200);
    expect(threads).toEqual([]);
    const long = post(LONG);
    const thread = await reading();
    expect((await post({ prompt: 'short' })).status).toBe(200);
    expect(consumer.asked).toHaveLength(2);
    thread.emit({ type: 'read', reading: readBody(thread.received[0]!.body) });
    expect((await long).status).toBe(200);
    expect(producer.asked[2]!.json).toEqual({ ...LONG, n: 1, max_tokens: 1 });
    expect(consumer.asked[2]!.raw).toBe(JSON.stringify(LONG));
  });

  it('that costs too much is refused with its code, and no instance hears of it', async () => {
    const { producer, post, reading } = await startProxy();
    const long = post(LONG);
    const error = Object.assign(new Error('heap'), { code: 'ERR_WORKER_OUT_OF_MEMORY' });
    (await reading()).exit(error);
    const answer = await long;
    expect(answer.status).toBe(413);
    expect(await answer.json()).toMatchObject({ error: { code: 'BODY_TOO_COSTLY' } });
    expect(producer.asked).toEqual([]);
  });

  it('that finds no room to wait in is answered so, and told when to come again', async () => {
    const { post, reading, signals } = await startProxy({ maxWaitingBytes: 100_000 });
    const first = post(LONG);
    const thread = await reading();
    const one = post(LONG);
    while (signals.length < 2) await new Promise(setImmediate); // over connections of their own either may come first
    const busy = await post({ ...LONG, prompt: 'x'.repeat(80_000) });
    expect(busy.status).toBe(503);
    expect(busy.headers.get('retry-after')).toBe('3');
    expect(await busy.json()).toMatchObject({ error: { type: 'server_error', code: 'READER_BUSY' } });
    for (const [at, answer] of [first, one].entries()) {
      await thread.until(at + 1);
      thread.emit({ type: 'read', reading: readBody(thread.received[at]!.body) });
      expect((await answer).status).toBe(200);
    }
  });

  it('whose client leaves goes no further, be it waiting or being read', async () => {
    const { producer, post, reading, signals } = await startProxy();
    const client = new AbortController();
    const first = post(LONG, client.signal).catch(() => 'gone');
    const thread = await reading();
    const second = post({ ...LONG, n: 3 }, client.signal).catch(() => 'gone');
    while (signals.length < 2) await new Promise(setImmediate);
    const aborted = (signal: Signal) =>
      new Promise<void>((resolve) => signal.addEventListener('abort', resolve, { once: true }));
    const known = Promise.all(signals.map(aborted));
    client.abort();
    expect(await Promise.all([first, second])).toEqual(['gone', 'gone']);
    await known;
    thread.emit({ type: 'read', reading: readBody(thread.received[0]!.body) });
    expect((await post({ prompt: 'after' })).status).toBe(200);
    expect(thread.received).toHaveLength(1);
    expect(producer.asked.map(({ json }) => json['prompt'])).toEqual(['after']);
  });

  it('that is being read when the proxy stops is answered so, and the thread is ended', async () => {
    const { proxy, post, reading } = await startProxy();
    const long = post(LONG);
    const thread = await reading();
    await proxy.close(0);
    expect(thread.terminated).toBe(true);
    const answer = await long;
    expect(answer.status).toBe(503);
    expect(await answer.json()).toMatchObject({ error: { code: 'SERVER_DRAINING' } });
  });
});
