/** The page at /ui as an HTTP client sees it: who gets it, and what it is told. In a browser: test/wide/ui.test.ts. */
import { writeFileSync } from 'node:fs';
import { request } from 'node:http';
import { join } from 'node:path';
import { describe, expect, test } from 'vitest';
import type { PdProxy } from '../../../src/proxy/proxy.ts';
import type { UiMessage } from '../../../src/proxy/ui-state.ts';
import { startProxy, startUpstream, url } from '../../support/proxies.ts';
import { sharedTempDir } from '../../support/temp-dir.ts';

const DIR = sharedTempDir();

/** Events as they come; ends with the answer. */
async function* eventsOf(proxy: PdProxy, headers: Record<string, string> = {}) {
  const answer = await fetch(url(proxy, '/ui/events'), { headers });
  expect([answer.status, answer.headers.get('content-type')]).toEqual([200, 'text/event-stream']);
  let text = '';
  for await (const chunk of answer.body!.pipeThrough(new TextDecoderStream())) {
    const parts = (text + chunk).split('\n\n');
    text = parts.pop()!;
    for (const part of parts) {
      const [, kind, data] = /^event: (\w+)\ndata: (.*)$/.exec(part) ?? [];
      if (kind) yield { kind, message: JSON.parse(data!) as UiMessage };
    }
  }
}

/** Status of a GET that names the proxy otherwise than by its address. */
function statusAt(proxy: PdProxy, path: string, host: string): Promise<number> {
  const { host: address, port } = proxy.httpAddress;
  return new Promise((resolve, reject) => {
    const asked = request({ host: address, port, path, headers: { host } }, (answer) => {
      answer.resume();
      resolve(answer.statusCode!);
    });
    asked.once('error', reject).end();
  });
}

test('a watcher is told everything, then what comes, changes and goes, and that it is over', async () => {
  const proxy = await startProxy();
  const events = eventsOf(proxy);
  const first = (await events.next()).value!;
  expect(first).toMatchObject({
    kind: 'state',
    message: { instances: [], requests: [], proxy: { status: 'ok' } },
  });
  await startUpstream(proxy, 'producer');
  await startUpstream(proxy, 'consumer');
  const roles = new Set<string>();
  while (roles.size < 2) {
    const { kind, message } = (await events.next()).value!;
    expect(kind).toBe('change');
    for (const { role } of message.instances ?? []) roles.add(role);
  }
  const body = JSON.stringify({ model: 'm', prompt: 'a secret' });
  const answer = await fetch(url(proxy, '/v1/completions'), { method: 'POST', body });
  await answer.text();
  const id = answer.headers.get('x-pd-request-id');
  for (;;) {
    const { message } = (await events.next()).value!;
    expect(JSON.stringify(message)).not.toContain('secret');
    const done = message.requests?.find((one) => one.id === id && one.status === 200);
    if (!done) continue;
    expect(done.stages.map(([stage]) => stage)).toEqual(['queue', 'placement', 'prefill', 'decode']);
    expect(done.stages.every(([, , to]) => to !== null)).toBe(true);
    break;
  }
  const closed = proxy.close(0);
  let last: UiMessage | undefined;
  for await (const { message } of events) last = message;
  expect(last?.proxy?.status).toBe('draining');
  await closed;
});

test('whoever watches late is told everything at once', async () => {
  const proxy = await startProxy();
  const watchers = Array.from({ length: 16 }, () => eventsOf(proxy));
  for (const watcher of watchers) expect((await watcher.next()).value?.kind).toBe('state');
  const tooMany = await fetch(url(proxy, '/ui/events'));
  expect([tooMany.status, await tooMany.text()]).toEqual([429, expect.stringContaining('16 pages watch')]);
});

describe('who sees it', () => {
  test('without keys: this machine alone, by its own names, and a page that asks nobody else', async () => {
    const proxy = await startProxy();
    const page = await fetch(url(proxy, '/ui'));
    expect(page.headers.get('content-security-policy')).toContain("default-src 'self'");
    expect(await page.text()).toContain('<title>pd-proxy</title>');
    expect(await statusAt(proxy, '/ui', 'localhost:1')).toBe(200);
    for (const path of ['/ui', '/ui/app.js', '/ui/events'])
      expect(await statusAt(proxy, path, 'rebound.example')).toBe(400);
    const type = async (name: string) => (await fetch(url(proxy, `/ui/${name}`))).headers.get('content-type');
    expect(await type('app.js')).toBe('text/javascript; charset=utf-8');
    expect(await type('icon.svg')).toBe('image/svg+xml');
    for (const path of ['/ui/tsconfig.json', '/ui/%2e%2e%2fpackage.json'])
      expect((await fetch(url(proxy, path))).status).toBe(404);
    // Of a stream without end: it would have none, too.
    expect((await fetch(url(proxy, '/ui/events'), { method: 'HEAD' })).status).toBe(404);
  });

  test('--ui open shows it by any name, off to nobody', async () => {
    const [open, off] = [await startProxy({ ui: 'open' }), await startProxy({ ui: 'off' })];
    expect(await statusAt(open, '/ui', 'proxy.example')).toBe(200);
    expect(await statusAt(off, '/ui', 'localhost')).toBe(404);
    expect(await statusAt(off, '/ui/events', 'localhost')).toBe(404);
  });

  test('with keys: the page is for anybody, what it shows for holders of an admin key', async () => {
    const apiKeyFile = join(DIR, 'keys');
    writeFileSync(
      apiKeyFile,
      'client sk-client-0123456789abcdef\noperator sk-operator-0123456789abcdef admin\n',
    );
    const proxy = await startProxy({ access: { apiKeyFile } });
    expect(await statusAt(proxy, '/ui', 'proxy.example')).toBe(200);
    expect(await statusAt(proxy, '/ui/app.js', 'proxy.example')).toBe(200);
    const events = (key?: string) =>
      fetch(url(proxy, '/ui/events'), { headers: key ? { authorization: `Bearer ${key}` } : {} });
    expect((await events()).status).toBe(401);
    expect((await events('sk-client-0123456789abcdef')).status).toBe(403);
    const told = eventsOf(proxy, { authorization: 'Bearer sk-operator-0123456789abcdef' });
    expect((await told.next()).value?.kind).toBe('state');
  });
});
