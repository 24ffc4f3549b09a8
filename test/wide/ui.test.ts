/**
 * The page at /ui in Debian's Chromium, with a real pair behind it: it loads, tells of requests as they run, of an instance that dies and
 * comes back, and of a proxy that is started again; by keyboard alone; in both schemes. PD_UI_SCREENSHOTS=DIR keeps what it looks like.
 */
import { mkdirSync, statSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { formatHostPort } from '../../src/net/address.ts';
import { Browser, hasChromium, type Page } from '../support/browser.ts';
import {
  keptPorts,
  type ProxyHandle,
  startProxy,
  startWorker,
  type WorkerHandle,
} from '../support/cluster.ts';
import { type Answer, FakeUpstream } from '../support/fake-upstream.ts';
import { startQuietProxy } from '../support/quiet-proxy.ts';
import { CAPITAL, complete } from '../support/requests.ts';
import { sharedTempDir } from '../support/temp-dir.ts';

const temp = sharedTempDir();
const shots = process.env['PD_UI_SCREENSHOTS'] ?? join(temp, 'shots');
const KEY = 'sk-operator-0123456789abcdef';

const rows = "document.querySelectorAll('#rows tr').length";
const live = "document.querySelector('#status').dataset.state === 'live'";
const card = (role: string, grade: string) =>
  `document.querySelector('#${role}s .card[data-grade=${grade}]')`;
const active = (selector: string) => `document.activeElement.matches(${JSON.stringify(selector)})`;

describe.skipIf(!hasChromium)('the page', () => {
  let browser: Browser;
  let page: Page;
  let proxy: ProxyHandle;
  let producer: WorkerHandle;
  let consumer: WorkerHandle;
  let ports: number[];
  const kept = (at: number) => ['--port', String(ports[at]), '--kv-port', String(ports[at + 1])];
  const proxyArgs = () => [
    '--port',
    String(ports[0]),
    '--discovery-port',
    String(ports[1]),
    '--instance-timeout',
    '8s',
  ];
  const ask = (prompt: string, more: object = {}) => complete(proxy.url, { ...CAPITAL, prompt, ...more });

  beforeAll(async () => {
    mkdirSync(shots, { recursive: true });
    ports = await keptPorts(6);
    proxy = await startProxy(proxyArgs());
    [producer, consumer] = await Promise.all([
      startWorker('producer', proxy, kept(2)),
      startWorker('consumer', proxy, kept(4)),
    ]);
    browser = Browser.start(join(temp, 'browser'));
    page = await browser.open('about:blank');
    await page.view(1440, 900, 'light', true);
    await page.go(`${proxy.url}/ui`);
  });

  afterAll(async () => {
    await browser?.close();
    await Promise.all([proxy, producer, consumer].map((one) => one?.program.stop()));
  });

  test('shows the pair, and requests while and after they run', async () => {
    await page.until(live);
    await page.until(`${card('producer', 'ok')} && ${card('consumer', 'ok')}`);
    await ask('The capital of France is');
    await page.until(`${rows} === 1 && document.querySelector('#rows tr[data-result=ok]')`);
    const label = await page.value<string>("document.querySelector('#rows .bar').getAttribute('aria-label')");
    expect(label).toMatch(/^Queue .*, Placement .*, Prefill .*, Decode /);
    await ask('The capital of Spain is', { stream: true });
    await page.until(`document.querySelector('#rows tr .piece[data-stage="hand-over"]')`);
    expect((await ask('x', { max_tokens: -1 })).status).toBe(400);
    await page.until("document.querySelector('#rows tr[data-result=failed]')");
    expect(await page.value('document.querySelectorAll("#links path").length')).toBe(1);
    expect(page.errors).toEqual([]);
  });

  test('is walked by keyboard alone: to a request, into what it was, and back', async () => {
    await page.value('document.activeElement.blur()');
    for (let steps = 0; !(await page.value<boolean>(active('#rows tr'))); steps++) {
      expect(steps).toBeLessThan(30);
      await page.press('Tab');
      const seen =
        "getComputedStyle(document.activeElement.closest('label') ? document.activeElement.nextElementSibling ?? document.activeElement : document.activeElement).outlineStyle";
      if (!(await page.value<boolean>(active('body')))) expect(await page.value(seen)).not.toBe('none');
    }
    await page.press('ArrowDown');
    await page.until(`document.querySelectorAll('#rows tr')[1].ariaSelected === 'true'`);
    await page.until("document.querySelector('#details').textContent.includes('Why this pair')");
    await page.press('Enter');
    expect(await page.value(active('#details'))).toBe(true);
    await page.press('Escape');
    await page.until("!document.querySelector('#details').classList.contains('chosen')");
    expect(await page.value(active('#rows tr:nth-child(2)'))).toBe(true);
  });

  test('names whatever can be used', async () => {
    await page.send('Accessibility.enable');
    const { nodes } = (await page.send('Accessibility.getFullAXTree')) as {
      nodes: { ignored: boolean; role?: { value: string }; name?: { value: string } }[];
    };
    const used = ['button', 'combobox', 'radio', 'grid', 'link', 'textbox', 'image', 'img'];
    const unnamed = nodes.filter(
      ({ ignored, role, name }) => !ignored && used.includes(role?.value ?? '') && !name?.value,
    );
    expect(unnamed).toEqual([]);
  });

  test('has its own colours in either scheme, and the one that is chosen in it wins', async () => {
    const ground = 'getComputedStyle(document.documentElement).backgroundColor';
    const light = await page.value<string>(ground);
    await page.view(1440, 900, 'dark', true);
    await page.until(`${ground} !== ${JSON.stringify(light)}`);
    await page.value("document.querySelector('#theme [value=light]').click()");
    await page.until(`${ground} === ${JSON.stringify(light)}`);
    await page.value("document.querySelector('#theme [value=auto]').click()");
    expect(await page.value(ground)).not.toBe(light);
  });

  test('fits a narrow screen', async () => {
    await page.view(390, 844, 'light', true);
    await page.until('innerWidth === 390');
    expect(await page.value('document.documentElement.scrollWidth')).toBeLessThanOrEqual(390);
    await page.screenshot(join(shots, 'pair-narrow.png'));
    await page.view(1440, 900, 'light', true);
    await page.screenshot(join(shots, 'pair.png'));
  });

  test('tells of a worker that is killed, and of its return', async () => {
    await consumer.program.stop('SIGKILL');
    await page.until(card('consumer', 'gone'));
    await page.until("document.querySelector('#notices').textContent.includes('has gone')");
    consumer = await startWorker('consumer', proxy, kept(4));
    await page.until(card('consumer', 'ok'));
    await page.until("document.querySelector('#notices').textContent.includes('is back')");
  });

  test('outlives its proxy, and follows the next one', async () => {
    await proxy.program.stop('SIGKILL');
    await page.until("document.querySelector('#status').dataset.state === 'lost'");
    proxy = await startProxy(proxyArgs());
    await page.until(live);
    // What the proxy before remembered is not shown as if this one had.
    await page.until(`${rows} === 0`);
    await page.until(`${card('producer', 'ok')} && ${card('consumer', 'ok')}`);
    await ask('The capital of Italy is');
    await page.until(`${rows} === 1`);
    // That it could not be reached meanwhile is no error of the page.
    expect(page.errors.filter((error) => !error.includes('/ui/events'))).toEqual([]);
    expect(page.asked.filter((url) => !url.startsWith(proxy.url) && url !== 'about:blank')).toEqual([]);
  });

  test('asks for a key where one is needed, with relay processes too', async () => {
    const keys = join(temp, 'keys');
    writeFileSync(keys, `operator ${KEY} admin\n`);
    const keyed = await startProxy([
      '--api-key-file',
      keys,
      '--workers',
      '2',
      '--allow-instances',
      '127.0.0.1',
    ]);
    const other = await browser.open(`${keyed.url}/ui`);
    try {
      await other.until(active('#key'));
      await other.type('sk-wrong');
      await other.press('Enter');
      await other.until("document.querySelector('#key-note').textContent.includes('not known')");
      await other.type(KEY);
      await other.press('Enter');
      await other.until(live);
      const shown = await other.value<string>('document.documentElement.outerHTML + location.href');
      expect(shown).not.toContain(KEY);
      expect(await keyed.program.stop()).toBe(0);
      await other.until("document.querySelector('#status').dataset.state === 'lost'");
    } finally {
      await keyed.program.stop();
    }
  });

  test('shows twelve instances and two hundred requests, some under way, one instance draining and one that is gone', async () => {
    const large = await startQuietProxy({ policy: 'least-loaded' });
    const held: (() => void)[] = [];
    const upstreams: FakeUpstream[] = [];
    const load = (at: number) => ({
      running: 0,
      waiting: 0,
      kvUsed: 300 + 311 * at,
      kvBlocks: 4_096,
      queuedTokens: 0,
    });
    // The pauses are what is to be seen; nothing waits for them to be long or short.
    let drawn = 0;
    const pause = (ms: number) => sleep(ms * (1 + ((drawn++ * 7_919) % 13) / 4));
    const answers: Record<'producer' | 'consumer', Answer> = {
      producer: async (_asked, out) => {
        await pause(20);
        out.end('{}');
      },
      consumer: async ({ json }, out) => {
        out.writeHead(200, { 'content-type': 'text/event-stream' });
        await pause(4);
        out.write('data: {"choices":[]}\n\n');
        if (json['user'] === 'held') await new Promise<void>((resolve) => held.push(resolve));
        else await pause(60);
        out.end('data: [DONE]\n\n');
      },
    };
    const post = async (user: string) => {
      const body = JSON.stringify({
        model: 'm',
        prompt: 'x '.repeat(300 + ((drawn * 997) % 4_000)),
        stream: true,
        user,
      });
      return await (
        await fetch(`http://${formatHostPort(large.httpAddress)}/v1/completions`, { method: 'POST', body })
      ).text();
    };
    const pingAll = () =>
      Promise.all(
        upstreams.map((one, at) =>
          one.ping(large.discoveryAddress, 'llama-8b', ['overlap', 'native'], { load: load(at) }),
        ),
      );
    try {
      for (let at = 0; at < 12; at++) {
        const role = at < 6 ? 'producer' : 'consumer';
        upstreams.push(await FakeUpstream.start(role, answers[role]));
      }
      await pingAll();
      while (large.instances.length < 12) await new Promise((resolve) => setImmediate(resolve));
      await page.view(1280, 860, 'light', true);
      await page.go(`http://${formatHostPort(large.httpAddress)}/ui`);
      await page.until("document.querySelectorAll('.card').length === 12");
      await Promise.all(
        Array.from({ length: 8 }, async () => {
          for (let done = 0; done < 24; done++) await post('done');
        }),
      );
      await fetch(`http://${formatHostPort(large.httpAddress)}/admin/drain`, {
        method: 'POST',
        body: JSON.stringify({ instance: upstreams[7]!.httpAddress }),
      });
      await pingAll();
      const [left] = upstreams.splice(10, 1);
      await left!.kill();
      const running = Array.from({ length: 8 }, () => post('held'));
      while (held.length < 8) await new Promise((resolve) => setImmediate(resolve));
      await page.until(`${rows} === 200`);
      await page.until("document.querySelectorAll('#rows tr[data-result=running]').length === 8");
      const states =
        "[...document.querySelectorAll('.card .state')].map((state) => state.textContent).join()";
      await page.until(`${states}.includes('drains') && ${states}.includes('refuses')`);
      await page.screenshot(join(shots, 'ui-fleet.png'));
      await page.view(1280, 860, 'dark', true);
      await page.value("document.querySelectorAll('#rows tr')[12].click()");
      await page.until("document.querySelector('#details').textContent.includes('Why this pair')");
      await page.screenshot(join(shots, 'ui-request.png'));
      await page.view(390, 844, 'dark', true);
      expect(await page.value('document.documentElement.scrollWidth')).toBeLessThanOrEqual(390);
      await page.screenshot(join(shots, 'ui-narrow.png'));
      for (const end of held) end();
      await Promise.all(running);
      await page.until("!document.querySelector('#rows tr[data-result=running]')");
    } finally {
      for (const end of held) end();
      await large.close(0);
      await Promise.all(upstreams.map((one) => one.kill()));
    }
  });

  test('screenshots of the documents are small', () => {
    for (const name of ['ui-fleet.png', 'ui-request.png'])
      expect(statSync(new URL(`../../docs/images/${name}`, import.meta.url)).size).toBeLessThan(150_000);
  });
});
