/** Debian's Chromium without a screen, by the DevTools protocol over pipes: no port, and nothing to download. */
import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { existsSync } from 'node:fs';
import { writeFile } from 'node:fs/promises';
import type { Duplex, Readable, Writable } from 'node:stream';

const CHROMIUM = '/usr/bin/chromium';
export const hasChromium = existsSync(CHROMIUM);

/** Nothing here takes as long, however busy the machine is. */
const DEADLINE_MS = 120_000;

type Reply = { readonly result?: Record<string, unknown>; readonly error?: { readonly message: string } };
interface Event {
  readonly sessionId?: string;
  readonly method: string;
  readonly params: Record<string, unknown>;
}

export class Browser {
  readonly #child: ChildProcess;
  readonly #waiting = new Map<number, (reply: Reply) => void>();
  readonly #listeners = new Set<(event: Event) => void>();
  #next = 1;
  #stderr = '';
  #gone = false;

  private constructor(folder: string) {
    const flags = [
      ...['--headless=new', '--remote-debugging-pipe', '--no-sandbox', '--no-first-run', '--disable-gpu'],
      ...['--disable-dev-shm-usage', '--disable-background-networking', '--disable-component-update'],
      ...['--disable-extensions', '--hide-scrollbars', '--font-render-hinting=none'],
      `--user-data-dir=${folder}`,
    ];
    const env = { ...process.env, HOME: folder, XDG_CONFIG_HOME: folder, XDG_CACHE_HOME: folder };
    this.#child = spawn(CHROMIUM, [...flags, 'about:blank'], {
      stdio: ['ignore', 'ignore', 'pipe', 'pipe', 'pipe'],
      env,
    });
    this.#child.stderr!.on('data', (chunk: Buffer) => {
      this.#stderr = (this.#stderr + chunk).slice(-4_000);
    });
    const answers = this.#child.stdio[4] as Readable;
    (this.#child.stdio[3] as Writable).on('error', () => {}); // 'exit' tells
    let text = Buffer.alloc(0);
    answers.on('data', (chunk: Buffer) => {
      text = Buffer.concat([text, chunk]);
      for (let end = text.indexOf(0); end >= 0; end = text.indexOf(0)) {
        this.#receive(JSON.parse(text.toString('utf8', 0, end)) as Event & Reply & { id?: number });
        text = text.subarray(end + 1);
      }
    });
    this.#child.once('exit', () => {
      this.#gone = true;
      for (const answer of this.#waiting.values()) answer({ error: { message: 'the browser has ended' } });
    });
  }

  /** `folder`: for what it writes. The caller closes it. */
  static start(folder: string): Browser {
    return new Browser(folder);
  }

  async open(url: string): Promise<Page> {
    const { targetId } = await this.send('Target.createTarget', { url: 'about:blank' });
    const { sessionId } = await this.send('Target.attachToTarget', { targetId, flatten: true });
    const page = new Page(this, sessionId as string);
    for (const domain of ['Runtime', 'Log', 'Page', 'Network']) await page.send(`${domain}.enable`);
    await page.go(url);
    return page;
  }

  onEvent(listener: (event: Event) => void): void {
    this.#listeners.add(listener);
  }

  async send(method: string, params: object = {}, sessionId?: string): Promise<Record<string, unknown>> {
    const id = this.#next++;
    const { result, error } = await new Promise<Reply>((resolve) => {
      const timer = setTimeout(() => resolve({ error: { message: 'no answer' } }), DEADLINE_MS);
      this.#waiting.set(id, (reply) => {
        clearTimeout(timer);
        resolve(reply);
      });
      if (this.#gone) this.#waiting.get(id)!({ error: { message: 'the browser has ended' } });
      const text = JSON.stringify({ id, method, params, ...(sessionId && { sessionId }) });
      (this.#child.stdio[3] as Duplex).write(`${text}\0`);
    });
    if (error) throw new Error(`${method}: ${error.message}\n${this.#stderr}`);
    return result!;
  }

  async close(): Promise<void> {
    if (this.#gone) return;
    const ended = once(this.#child, 'exit');
    await this.send('Browser.close').catch(() => this.#child.kill('SIGKILL'));
    await ended;
  }

  #receive(message: Event & Reply & { readonly id?: number }): void {
    if (message.id === undefined) {
      for (const listener of this.#listeners) listener(message);
      return;
    }
    this.#waiting.get(message.id)?.(message);
    this.#waiting.delete(message.id);
  }
}

export class Page {
  /** What its console was told as an error, what it threw, and what could not be loaded or was against its policy. */
  readonly errors: string[] = [];
  /** Addresses that it asked. */
  readonly asked: string[] = [];
  readonly #browser: Browser;
  readonly #session: string;

  constructor(browser: Browser, session: string) {
    this.#browser = browser;
    this.#session = session;
    browser.onEvent(({ sessionId, method, params }) => {
      if (sessionId !== session) return;
      const text = JSON.stringify(params);
      if (method === 'Runtime.exceptionThrown') this.errors.push(text);
      if (method === 'Runtime.consoleAPICalled' && params['type'] === 'error') this.errors.push(text);
      if (method === 'Log.entryAdded' && (params['entry'] as { level: string }).level === 'error')
        this.errors.push(text);
      if (method === 'Network.requestWillBeSent') this.asked.push((params['request'] as { url: string }).url);
    });
  }

  send(method: string, params: object = {}): Promise<Record<string, unknown>> {
    return this.#browser.send(method, params, this.#session);
  }

  /** What is behind another page is not drawn. */
  async go(url: string): Promise<void> {
    await this.send('Page.bringToFront');
    await this.send('Page.navigate', { url });
  }

  /** Value of an expression; of a promise, what it resolves with. Throws what it throws. */
  async value<T>(expression: string): Promise<T> {
    const options = { expression, awaitPromise: true, returnByValue: true };
    const { result, exceptionDetails } = (await this.send('Runtime.evaluate', options)) as {
      result: { value: T };
      exceptionDetails?: { exception?: { description?: string } };
    };
    if (exceptionDetails) throw new Error(`${expression}: ${exceptionDetails.exception?.description}`);
    return result.value;
  }

  /** Resolves once an expression is true: looked at whenever the document changes, and often. Throws with what is on the page else. */
  async until(expression: string): Promise<void> {
    const deadline = performance.now() + DEADLINE_MS;
    // A page that is about to be another has no value yet.
    while (!(await this.value<boolean>(`Boolean(${expression})`).catch(() => false))) {
      if (performance.now() > deadline) {
        const text = await this.value<string>('document.body.innerText');
        throw new Error(`not true: ${expression}\n${text}\n${this.errors.join('\n')}`);
      }
      await new Promise((resolve) => setTimeout(resolve, 50));
    }
  }

  /** A key, as `KeyboardEvent.key` names it. */
  async press(key: string, modifiers = 0): Promise<void> {
    const text = key === 'Enter' ? '\r' : key.length === 1 ? key : undefined;
    const code = {
      Tab: 9,
      Enter: 13,
      Escape: 27,
      ' ': 32,
      ArrowLeft: 37,
      ArrowUp: 38,
      ArrowRight: 39,
      ArrowDown: 40,
    }[key];
    const more = { windowsVirtualKeyCode: code, modifiers, code: key === ' ' ? 'Space' : key };
    await this.send('Input.dispatchKeyEvent', { type: text ? 'keyDown' : 'rawKeyDown', key, text, ...more });
    await this.send('Input.dispatchKeyEvent', { type: 'keyUp', key, ...more });
  }

  async type(text: string): Promise<void> {
    await this.send('Input.insertText', { text });
  }

  async view(width: number, height: number, scheme: 'light' | 'dark', calm = false): Promise<void> {
    const mobile = width < 600;
    await this.send('Emulation.setDeviceMetricsOverride', { width, height, deviceScaleFactor: 1, mobile });
    const motion = { name: 'prefers-reduced-motion', value: calm ? 'reduce' : 'no-preference' };
    await this.send('Emulation.setEmulatedMedia', {
      features: [{ name: 'prefers-color-scheme', value: scheme }, motion],
    });
  }

  async screenshot(file: string): Promise<void> {
    const { data } = await this.send('Page.captureScreenshot', { format: 'png', optimizeForSpeed: false });
    await writeFile(file, Buffer.from(data as string, 'base64'));
  }
}
