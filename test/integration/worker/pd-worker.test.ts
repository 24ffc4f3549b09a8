import { once } from 'node:events';
import { writeFileSync } from 'node:fs';
import { createServer } from 'node:http';
import type { AddressInfo } from 'node:net';
import { networkInterfaces } from 'node:os';
import { join } from 'node:path';
import { afterEach, expect, it } from 'vitest';
import { formatHostPort } from '../../../src/net/address.ts';
import { appendPromptIds } from '../../../src/wire/prompt-ids.ts';
import { PdWorker, type WorkerParts } from '../../../src/worker/worker.ts';
import { BYTE_READER, bytesOf, FakeCore, type Script, saying } from '../../support/fake-core.ts';
import { sharedTempDir } from '../../support/temp-dir.ts';
import { resolveFlags } from '../../support/worker-flags.ts';

const modelDir = sharedTempDir();
writeFileSync(join(modelDir, 'config.json'), '{}');
const workers: PdWorker[] = [];
afterEach(async () => {
  await Promise.all(workers.splice(0).map((worker) => worker.close(0)));
});

function configOf(args: readonly string[]) {
  const own = ['--device', 'host', '--port', '0', '--host', '127.0.0.1', '--log-level', 'silent'];
  return resolveFlags([...own, ...args], { env: {}, demoModelDir: () => modelDir }).config;
}

async function start(script: Script = saying('hello'), args: readonly string[] = []) {
  const core = new FakeCore(script);
  const worker = await PdWorker.start(configOf(args), {
    startCore: () => core.connect(),
    startReader: async () => BYTE_READER,
  });
  workers.push(worker);
  return { core, worker, url: `http://${formatHostPort(worker.httpAddress)}` };
}

const post = (url: string, body: object) =>
  fetch(`${url}/v1/completions`, {
    method: 'POST',
    headers: { 'content-type': 'application/json' },
    body: JSON.stringify(body),
  });

it('serves on the port it was given, and lets the core ping only then', async () => {
  const { core, worker, url } = await start();
  expect(worker.httpAddress.port).toBeGreaterThan(0);
  const httpAddress = formatHostPort(worker.httpAddress);
  expect(core.received).toEqual([{ type: 'serve', httpAddress, tokenizer: 'bytes' }]);
  const answer = (await (await post(url, { prompt: 'a' })).json()) as { choices: { text: string }[] };
  expect(answer.choices[0]!.text).toBe('hello');
  await worker.close();
  await worker.close();
  expect(core.received.map(({ type }) => type)).toEqual(['serve', 'add', 'drain', 'shutdown']);
  await expect(post(url, { prompt: 'a' })).rejects.toThrow();
  expect(await worker.ended).toBeUndefined();
});

it('drains: what runs may end, what is new is refused, pings stop', async () => {
  let finish = () => {};
  const { core, worker, url } = await start((_, emit) => {
    emit({ index: 0, tokens: bytesOf('so ') });
    finish = () => emit({ index: 0, tokens: bytesOf('far'), finishReason: 'length' });
  });
  const running = post(url, { prompt: 'a' });
  await core.until((message) => message.type === 'add');
  const closed = worker.close(60_000);
  await core.until((message) => message.type === 'drain');
  const refused = await post(url, { prompt: 'b' });
  expect([refused.status, await refused.json()]).toMatchObject([503, { error: { code: 'SERVER_DRAINING' } }]);
  finish();
  expect(await (await running).json()).toMatchObject({ choices: [{ text: 'so far' }] });
  await closed;
});

it('gives up what runs when the time is over, or when told a second time, and says so to the client', async () => {
  for (const hurry of [false, true]) {
    const { core, worker, url } = await start(() => {});
    const running = post(url, { prompt: 'a' });
    await core.until((message) => message.type === 'add');
    const closed = worker.close(hurry ? 60_000 : 1);
    if (hurry) void worker.close(0);
    const answer = await running;
    expect([answer.status, await answer.json()]).toMatchObject([503, { error: { code: 'SERVER_DRAINING' } }]);
    await closed;
  }
});

it('ends with the error of the core', async () => {
  const { core, worker, url } = await start(() => {});
  const running = post(url, { prompt: 'a' });
  await core.until((message) => message.type === 'add');
  core.emit({ type: 'fatal', error: { code: 'CUDA_ERROR', message: 'the bus fell off', context: {} } });
  expect(await worker.ended).toMatchObject({ code: 'CUDA_ERROR', message: 'the bus fell off' });
  expect((await running).status).toBe(500);
});

it('refuses a port that is taken before anything is loaded', async () => {
  const holder = createServer().listen(0, '127.0.0.1');
  await once(holder, 'listening');
  try {
    const { port } = holder.address() as AddressInfo;
    const started = PdWorker.start(configOf(['--port', String(port)]), {
      startCore: () => Promise.reject(new Error('loaded a model')),
      startReader: async () => BYTE_READER,
    });
    await expect(started).rejects.toMatchObject({
      code: 'PORT_IN_USE',
      message: expect.stringContaining(`${port}`),
    });
  } finally {
    holder.close();
  }
});

it('closes the reader with the worker, and when the core cannot start', async () => {
  const closed: string[] = [];
  const parts = (name: string, startCore: WorkerParts['startCore']): WorkerParts => ({
    startCore,
    startReader: async () => ({ ...BYTE_READER, close: async () => void closed.push(name) }),
  });
  const worker = await PdWorker.start(
    configOf([]),
    parts('worker', () => new FakeCore().connect()),
  );
  expect(closed).toEqual([]);
  await worker.close();
  expect(closed).toEqual(['worker']);
  const failed = PdWorker.start(
    configOf([]),
    parts('failed', () => Promise.reject(new Error('no weights'))),
  );
  await expect(failed).rejects.toThrow('no weights');
  expect(closed).toEqual(['worker', 'failed']);
});

it('closes the core when the tokenizer cannot be read', async () => {
  const core = new FakeCore();
  const started = PdWorker.start(configOf([]), {
    startCore: () => core.connect(),
    startReader: () => Promise.reject(new Error('no tokenizer.json')),
  });
  await expect(started).rejects.toThrow('no tokenizer.json');
  expect(core.terminated).toBe(true);
});

it('gives up its start where told to while the core starts, and closes the core unannounced', async () => {
  const stop = new AbortController();
  const core = new FakeCore();
  const parts = {
    startCore: async () => {
      const client = await core.connect();
      stop.abort(new Error('told to'));
      return client;
    },
    startReader: async () => BYTE_READER,
  };
  await expect(PdWorker.start(configOf([]), parts, stop.signal)).rejects.toThrow('told to');
  expect(core.received.map(({ type }) => type)).toEqual(['shutdown']);
  expect(core.terminated).toBe(true);
});

const hasIpv6 = Object.values(networkInterfaces()).some((list) =>
  list?.some(({ address }) => address === '::1'),
);

it.skipIf(!hasIpv6)('listens on both families for ::', async () => {
  const { worker } = await start(saying('x'), ['--host', '::', '--http-announce-host', '::1']);
  expect(formatHostPort(worker.httpAddress)).toMatch(/^\[::1\]:\d+$/);
  for (const host of ['127.0.0.1', '[::1]']) {
    expect((await fetch(`http://${host}:${worker.httpAddress.port}/health`)).status).toBe(200);
  }
});

it('takes the ids of a prompt’s tokens from those it was told to trust, and passes over anybody else’s', async () => {
  const body = new TextEncoder().encode('{"prompt":"abc"}');
  const ask = async (args: readonly string[], bytes: Uint8Array<ArrayBuffer>, header: string) => {
    const { core, url } = await start(saying('hello'), args);
    const response = await fetch(`${url}/v1/completions`, {
      method: 'POST',
      headers: {
        'content-type': 'application/json',
        'x-pd-prompt-ids': header,
        authorization: 'Bearer a-key-of-the-proxy',
      },
      body: bytes,
    });
    const added = core.received.find((message) => message.type === 'add');
    return [response.status, added && [...added.request.promptTokens]];
  };
  const sent = appendPromptIds(body, Uint32Array.of(7, 8));
  const trusting = ['--prompt-ids-from', '127.0.0.0/8'];
  expect(await ask(trusting, sent, '2')).toEqual([200, [7, 8]]);
  expect(await ask([], sent, '2')).toEqual([200, bytesOf('abc')]);
  expect(await ask(['--prompt-ids-from', '10.0.0.1'], sent, '2')).toEqual([200, bytesOf('abc')]);
  expect(await ask(trusting, sent, '900')).toEqual([400, undefined]);
  // Where callers need a key, whoever gets so far has one.
  const keys = join(modelDir, 'keys');
  writeFileSync(keys, 'proxy a-key-of-the-proxy\n');
  expect(await ask(['--api-key-file', keys], sent, '2')).toEqual([200, [7, 8]]);
  writeFileSync(join(modelDir, 'others'), 'proxy another-key-of-it\n');
  expect(await ask(['--api-key-file', join(modelDir, 'others')], sent, '2')).toEqual([401, undefined]);
});
