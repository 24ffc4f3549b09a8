/** pd-doctor --worker on workers that serve, wait, or say nothing. */
import { createServer, type Server } from 'node:http';
import type { AddressInfo } from 'node:net';
import { afterEach, expect, test } from 'vitest';
import { workerConfig } from '../../../src/config/embedded.ts';
import { workerSection } from '../../../src/doctor/worker-state.ts';
import { formatHostPort } from '../../../src/net/address.ts';
import { proxyRequestId } from '../../../src/wire/ids.ts';
import { PdWorker } from '../../../src/worker/worker.ts';

const TIMEOUT_MS = 60_000;
const closers: (() => Promise<unknown>)[] = [];
afterEach(() => Promise.all(closers.splice(0).map((close) => close())));

async function consumer(debugState?: 'loopback'): Promise<{ url: string; worker: PdWorker }> {
  const worker = await PdWorker.start(
    workerConfig({
      role: 'consumer',
      numBlocks: 64,
      kvBufferSize: 1e6,
      timeouts: { load: 60_000, connect: 50_000 },
      ...(debugState && { debugState }),
      log: { level: 'silent' },
    }),
  );
  closers.push(() => worker.close(0));
  return { worker, url: `http://${formatHostPort(worker.httpAddress)}` };
}

test('a worker that waits for a producer that never comes', async () => {
  const { url } = await consumer('loopback');
  const idle = await workerSection(url, TIMEOUT_MS);
  expect(idle.findings.map(({ level }) => level)).not.toContain('fail');
  const id = proxyRequestId({ host: '127.0.0.1', port: 9 }, { host: '127.0.0.1', port: 10 }, 'f'.repeat(32));
  const abort = new AbortController();
  const request = fetch(`${url}/v1/completions`, {
    method: 'POST',
    headers: { 'content-type': 'application/json', 'x-request-id': id },
    body: JSON.stringify({ model: 'demo', prompt: 'What is the capital of France?', max_tokens: 2 }),
    signal: abort.signal,
  }).catch(() => undefined);
  let found = await workerSection(url, TIMEOUT_MS);
  const failed = () => found.findings.find(({ level }) => level === 'fail');
  const until = performance.now() + 60_000;
  while (!failed() && performance.now() < until) {
    await new Promise((resolve) => setTimeout(resolve, 100));
    found = await workerSection(url, TIMEOUT_MS);
  }
  expect(failed()?.what).toMatch(
    /has waited .* for cmpl-___prefill_addr_127\.0\.0\.1:9.*#model\.layers\.0\.self_attn\.attn from 127\.0\.0\.1:9/,
  );
  expect(failed()?.fix).toMatch(/hang scenario 2 of the runbook/);
  abort.abort();
  await request;
});

test('one that was not started with --debug-state, one that is gone, and one of another kind', async () => {
  const { url } = await consumer();
  expect((await workerSection(url, TIMEOUT_MS)).findings).toMatchObject([
    { level: 'fail', fix: expect.stringContaining('--debug-state') },
  ]);
  const other: Server = createServer((_, response) => response.end('{}'));
  await new Promise<void>((resolve) => other.listen(0, '127.0.0.1', resolve));
  const address = `http://127.0.0.1:${(other.address() as AddressInfo).port}`;
  expect((await workerSection(address, TIMEOUT_MS)).findings[0]?.what).toContain(
    'not answered by a pd-worker',
  );
  await new Promise((resolve) => other.close(resolve));
  const [gone] = (await workerSection(address, TIMEOUT_MS)).findings;
  expect(gone).toMatchObject({ level: 'fail', what: expect.stringContaining('ECONNREFUSED') });
});
