/** The owner of the reader thread, with threads that follow a script. */
import { afterEach, expect, it, vi } from 'vitest';
import { demoModelDir } from '../../../src/config/demo-model.ts';
import { createLogger } from '../../../src/observability/log.ts';
import { RequestBodyReader, type RequestBodyReaderOptions } from '../../../src/worker/request-body-reader.ts';
import type { Served } from '../../../src/worker/server/fields.ts';
import { FakeReaderThread } from '../../support/fake-reader.ts';

const LOG = createLogger({ level: 'silent', format: 'json' }, 'main');
const SERVED: Served = { modelNames: ['demo'], maxModelLen: 100, vocabSize: 2_048 };

const readers: RequestBodyReader[] = [];
afterEach(async () => {
  await Promise.all(readers.splice(0).map((reader) => reader.close()));
});

async function start(options: RequestBodyReaderOptions = {}) {
  const threads: FakeReaderThread[] = [];
  const reader = await RequestBodyReader.start(demoModelDir(), LOG, {
    shortBody: 0,
    threadAfterMs: 0,
    openThread: () => {
      const thread = new FakeReaderThread();
      threads.push(thread);
      return thread;
    },
    ...options,
  });
  readers.push(reader);
  const read = async (text: string, signal?: AbortSignal) =>
    new TextDecoder().decode(await reader.read(SERVED, 'tokenize', new TextEncoder().encode(text), signal));
  return { reader, threads, read };
}

const settled = (promise: Promise<unknown>) =>
  promise.then(
    (value) => value,
    (error: { code: string }) => error.code,
  );

it('reads short bodies at once, and gives the thread long ones', async () => {
  const { threads, read } = await start({ shortBody: 40 });
  expect(JSON.parse(await read('{"prompt":"Hi"}'))).toMatchObject({ max_model_len: 100 });
  expect(threads[0]!.received).toEqual([]);
  threads[0]!.emit({ type: 'ready' });
  const long = read(`{"prompt":"${'Hi '.repeat(20)}"}`);
  expect(threads[0]!.received).toMatchObject([{ served: SERVED, route: 'tokenize' }]);
  threads[0]!.answer();
  expect(await long).toContain('Hi Hi');
});

it('takes only memory that is all of a body: bodies are Buffers, and may share theirs', async () => {
  const { reader, threads } = await start();
  threads[0]!.emit({ type: 'ready' });
  const memory = new ArrayBuffer(100);
  const inside = Buffer.from(memory, 10, 4);
  inside.write('long');
  for (const body of [inside, Buffer.from('long')]) {
    const read = reader.read(SERVED, 'tokenize', body);
    expect(threads[0]!.received.at(-1)!.body.buffer.byteLength).toBe(4);
    threads[0]!.answer();
    expect(Buffer.from(await read).toString()).toBe('long');
  }
  expect(memory.byteLength).toBe(100);
});

it('starts the thread for the first long body, or before one comes', async () => {
  const later = await start({ threadAfterMs: 600_000 });
  expect(later.threads).toEqual([]);
  const read = later.read('long');
  later.threads[0]!.emit({ type: 'ready' });
  later.threads[0]!.answer();
  expect(await read).toBe('long');

  const idle = await start({ threadAfterMs: 1 });
  await vi.waitFor(() => expect(idle.threads).toHaveLength(1), 60_000);
});

it('gives the thread one at a time once it is ready, the shorter first, those of one length in order', async () => {
  const { threads, read } = await start();
  const [thread] = threads;
  const answers = ['four', 'six666', 'two', 'a', 'b'].map((text) => read(text));
  expect(thread!.received).toEqual([]);
  thread!.emit({ type: 'ready' });
  const order = ['a', 'b', 'two', 'four', 'six666'];
  for (const [i] of order.entries()) {
    expect(thread!.texts).toEqual(order.slice(0, i + 1));
    thread!.answer();
  }
  expect(await Promise.all(answers)).toEqual(['four', 'six666', 'two', 'a', 'b']);
});

it('tells what a body is refused for', async () => {
  const { threads, read } = await start();
  threads[0]!.emit({ type: 'ready' });
  const refused = read('x');
  const error = {
    code: 'CONTEXT_EXCEEDED',
    message: 'prompt: too long',
    context: { param: 'prompt' },
  } as const;
  threads[0]!.emit({ type: 'refused', error });
  await expect(refused).rejects.toMatchObject(error);
});

it('gives up a body that takes too long, and goes on with a new thread', async () => {
  const { threads, read } = await start({ workTimeoutMs: 1 });
  threads[0]!.emit({ type: 'ready' });
  const slow = settled(read('x'));
  const next = read('next');
  expect(await slow).toBe('BODY_TOO_COSTLY');
  expect(threads[0]!.terminated).toBe(true);
  // What the old one still says is of no interest.
  threads[0]!.answer();
  threads[0]!.exit(undefined);
  threads[1]!.emit({ type: 'ready' });
  threads[1]!.answer();
  expect(await next).toBe('next');
  expect(threads).toHaveLength(2);
});

it.each([
  [Object.assign(new Error('heap'), { code: 'ERR_WORKER_OUT_OF_MEMORY' }), 'BODY_TOO_COSTLY'],
  [new Error('broken'), 'INTERNAL'],
  [undefined, 'INTERNAL'],
])(
  'survives the end of its thread (%s): whose body it was hears %s, the next is read',
  async (error, code) => {
    const { threads, read } = await start();
    threads[0]!.emit({ type: 'ready' });
    const [unlucky, next] = [settled(read('x')), read('next')];
    threads[0]!.exit(error);
    expect(await unlucky).toBe(code);
    threads[1]!.emit({ type: 'ready' });
    threads[1]!.answer();
    expect(await next).toBe('next');
  },
);

it('fails what waits for a thread that does not start, and tries another for the next', async () => {
  const { threads, read } = await start({ startTimeoutMs: 60_000 });
  const [a, b] = [settled(read('a')), settled(read('b'))];
  threads[0]!.emit({ type: 'failed', error: { code: 'CHECKPOINT_INVALID', message: 'gone', context: {} } });
  expect(await Promise.all([a, b])).toEqual(['CHECKPOINT_INVALID', 'CHECKPOINT_INVALID']);
  expect(threads).toHaveLength(1);
  const next = read('next');
  threads[1]!.emit({ type: 'ready' });
  threads[1]!.answer();
  expect(await next).toBe('next');
});

it('gives up a thread that is not ready in time', async () => {
  const { threads, read } = await start({ startTimeoutMs: 1 });
  expect(await settled(read('a'))).toBe('INTERNAL');
  expect(threads[0]!.terminated).toBe(true);
});

it('tells who waits too long that others are being read', async () => {
  const { threads, read } = await start({ waitTimeoutMs: 1 });
  threads[0]!.emit({ type: 'ready' });
  const first = read('first');
  expect(await settled(read('second'))).toBe('READER_BUSY');
  threads[0]!.answer();
  expect(await first).toBe('first');
  expect(threads[0]!.texts).toEqual(['first']);
});

it('refuses the longest bodies where those that wait have too many bytes together', async () => {
  const { threads, read } = await start({ maxWaitingBytes: 10 });
  threads[0]!.emit({ type: 'ready' });
  const answers = ['being read, so it does not wait', 'four', 'six666'].map((text) => settled(read(text)));
  const [huge, equal] = [settled(read('eleven bytes')), settled(read('666666'))];
  expect(await huge).toBe('READER_BUSY');
  expect(await equal).toBe('READER_BUSY');
  // A short one is let in, at the cost of the longest that waits.
  answers.push(settled(read('a')));
  expect(await answers[2]).toBe('READER_BUSY');
  for (const _ of ['being read', 'a', 'four']) threads[0]!.answer();
  expect(await Promise.all(answers)).toEqual(['being read, so it does not wait', 'four', 'READER_BUSY', 'a']);
  // What has left the queue leaves room.
  const next = [read('1234567890'), read('12345'), read('12345')];
  for (const _ of next) threads[0]!.answer();
  expect(await Promise.all(next)).toHaveLength(3);
});

it('does not read for a client that has gone', async () => {
  const { threads, read } = await start();
  const client = new AbortController();
  const gone = settled(read('gone', client.signal));
  const before = settled(read('before', AbortSignal.abort()));
  client.abort();
  expect(await Promise.all([gone, before])).toEqual(['REQUEST_ABORTED', 'REQUEST_ABORTED']);
  threads[0]!.emit({ type: 'ready' });
  expect(threads[0]!.received).toEqual([]);
});

it('fails what it has when it is closed, and takes nothing more', async () => {
  const { reader, threads, read } = await start();
  threads[0]!.emit({ type: 'ready' });
  const both = [settled(read('read')), settled(read('waits'))];
  await Promise.all([reader.close(), reader.close()]);
  expect(await Promise.all(both)).toEqual(['SERVER_DRAINING', 'SERVER_DRAINING']);
  expect(threads[0]!.terminated).toBe(true);
  expect(await settled(read('late'))).toBe('SERVER_DRAINING');
  threads[0]!.exit(undefined);
  expect(threads).toHaveLength(1);
});
