/** The page at /ui, whose files are in ui/ of this installation, and what it is told as it happens (ui-state.ts), at /ui/events. */
import { readdirSync, readFileSync } from 'node:fs';
import type { ServerResponse } from 'node:http';
import { dirname, extname, join } from 'node:path';
import type { FastifyInstance, FastifyReply, FastifyRequest } from 'fastify';
import type { ProxyConfig } from '../config/proxy-config.ts';
import { PdError } from '../errors.ts';
import { isLoopback } from '../net/address.ts';
import type { Logger } from '../observability/log.ts';
import { installedFile } from '../version.ts';
import { type UiSnapshot, UiState } from './ui-state.ts';

/** Between two looks at what has changed, while somebody watches; and where relay processes are to be asked. */
const TICK_MS = 250;
const SLOW_TICK_MS = 1_000;
/** Without a change for so long, a watcher is told that the proxy is there; relay processes give up after 30 s. */
const HEARTBEAT_MS = 10_000;
/** Then it asks again, with its key, which may have been withdrawn. */
const LONGEST_MS = 300_000;
const MOST_WATCHERS = 16;
/** A watcher that has not taken so many bytes is dropped. All there is fits, with a thousand instances. */
const MOST_BEHIND = 4 * 1024 * 1024;

const TYPES: Readonly<Record<string, string>> = {
  '.html': 'text/html; charset=utf-8',
  '.css': 'text/css; charset=utf-8',
  '.js': 'text/javascript; charset=utf-8',
  '.svg': 'image/svg+xml',
};
const HEADERS = {
  'content-security-policy':
    "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'",
  'x-content-type-options': 'nosniff',
  'referrer-policy': 'no-referrer',
  'cache-control': 'no-cache',
};

/** Routes of the page that anybody may ask for, keys or not: it is the page that asks for the key. */
export const UI_PAGE_ROUTES = ['/ui', '/ui/', '/ui/:file'] as const;
export const UI_EVENTS_ROUTE = '/ui/events';

export interface UiOptions {
  readonly config: ProxyConfig;
  readonly log: Logger;
  /** Callers need a key: who watches has shown one. */
  readonly keyed: boolean;
  readonly snapshot: () => UiSnapshot | Promise<UiSnapshot>;
}

/** Close it. */
export class Ui {
  readonly #options: UiOptions;
  readonly #state = new UiState();
  /** Those who have been told everything, and those who are to be. */
  readonly #watchers = new Set<ServerResponse>();
  readonly #fresh = new Set<ServerResponse>();
  #files: ReadonlyMap<string, Buffer> | undefined;
  #toldMs = 0;
  #running = false;
  #wake = () => {};
  #closed = false;

  constructor(options: UiOptions) {
    this.#options = options;
  }

  attach(app: FastifyInstance): void {
    const [page, slash, file] = UI_PAGE_ROUTES;
    app.get(page, async (request, reply) => this.#file(request, reply, 'index.html'));
    app.get(slash, async (_request, reply) => reply.redirect('../ui'));
    app.get(file, async (request, reply) => {
      return this.#file(request, reply, (request.params as { file: string }).file);
    });
    // HEAD of a stream without end would be one, too.
    const get = { exposeHeadRoute: false };
    app.get(UI_EVENTS_ROUTE, get, async (request, reply) => this.#watch(request, reply));
  }

  /** Whoever watches is told what there is now, and the answers end. Idempotent. */
  async close(): Promise<void> {
    if (this.#closed) return;
    this.#closed = true;
    if (this.#running) await this.#tell();
    for (const out of [...this.#watchers, ...this.#fresh]) this.#end(out);
    this.#wake();
  }

  /** Throws REQUEST_INVALID: what requests there are is for clients on this machine, where nothing else says who may see it. */
  #admit({ ip, headers }: FastifyRequest): void {
    const { config, keyed } = this.#options;
    if (keyed || config.ui === 'open') return;
    // A page of somebody else's that has its own name point here is not to read it.
    const host = /^(?:\[(.*)\]|([^:]*))(?::\d+)?$/.exec(headers.host ?? '');
    const name = host?.[1] ?? host?.[2] ?? '';
    if (isLoopback(ip) && (name === 'localhost' || isLoopback(name))) return;
    const how = '--ui open shows it to everyone, --api-key-file to holders of an admin key';
    throw new PdError(
      'REQUEST_INVALID',
      `/ui is for clients on this machine, at localhost or its address: ${how}`,
    );
  }

  #file(request: FastifyRequest, reply: FastifyReply, name: string): FastifyReply {
    this.#admit(request);
    this.#files ??= readFiles();
    const bytes = this.#files.get(name);
    if (!bytes) {
      reply.callNotFound();
      return reply;
    }
    return reply.headers(HEADERS).type(TYPES[extname(name)]!).send(bytes);
  }

  #watch(request: FastifyRequest, reply: FastifyReply): FastifyReply {
    this.#admit(request);
    if (this.#closed) throw new PdError('SERVER_DRAINING', 'this proxy is stopping');
    if (this.#watchers.size + this.#fresh.size >= MOST_WATCHERS)
      throw new PdError('OVERLOADED', `${MOST_WATCHERS} pages watch this proxy already`, { retryAfter: 10 });
    reply.hijack();
    const out = reply.raw;
    out.writeHead(200, {
      ...HEADERS,
      'content-type': 'text/event-stream',
      'cache-control': 'no-store',
      'x-accel-buffering': 'no',
    });
    let timer = setTimeout(() => {
      this.#end(out);
      // One that takes nothing would stay.
      timer = setTimeout(() => out.destroy(), HEARTBEAT_MS);
    }, LONGEST_MS);
    this.#fresh.add(out);
    out.once('close', () => {
      clearTimeout(timer);
      this.#watchers.delete(out);
      this.#fresh.delete(out);
      if (this.#watchers.size + this.#fresh.size === 0) this.#wake();
    });
    if (this.#running) this.#wake();
    else void this.#run();
    return reply;
  }

  /** It is told nothing more, however long it takes to close: what is written after the end is an error that nobody catches. */
  #end(out: ServerResponse): void {
    this.#watchers.delete(out);
    this.#fresh.delete(out);
    out.end();
  }

  /** For as long as somebody watches. */
  async #run(): Promise<void> {
    this.#running = true;
    const tickMs = this.#options.config.workers > 1 ? SLOW_TICK_MS : TICK_MS;
    while (this.#watchers.size + this.#fresh.size > 0 && !this.#closed) {
      await this.#tell();
      await new Promise<void>((resolve) => {
        const timer = setTimeout(resolve, tickMs);
        this.#wake = () => {
          clearTimeout(timer);
          resolve();
        };
      });
    }
    this.#running = false;
  }

  async #tell(): Promise<void> {
    try {
      const snapshot = await this.#options.snapshot();
      const now = Date.now();
      const change = this.#state.update(snapshot, now);
      if (change !== undefined) this.#send(this.#watchers, `event: change\ndata: ${change}\n\n`);
      else if (now - this.#toldMs >= HEARTBEAT_MS) this.#send(this.#watchers, ': here\n\n');
      if (this.#fresh.size === 0) return;
      this.#send(this.#fresh, `event: state\ndata: ${this.#state.whole(now)}\n\n`);
      for (const out of this.#fresh) this.#watchers.add(out);
      this.#fresh.clear();
    } catch (error) {
      this.#options.log.warn(`the page at /ui cannot be told: ${PdError.from(error).message}`);
      for (const out of [...this.#watchers, ...this.#fresh]) out.destroy();
    }
  }

  #send(watchers: ReadonlySet<ServerResponse>, text: string): void {
    this.#toldMs = Date.now();
    for (const out of watchers) {
      if (out.writableLength > MOST_BEHIND) out.destroy();
      else out.write(text);
    }
  }
}

/** Throws INTERNAL where the installation lacks them. */
function readFiles(): ReadonlyMap<string, Buffer> {
  const index = installedFile('ui/index.html');
  if (index === undefined) throw new PdError('INTERNAL', 'the page is missing: ui/ of this installation');
  const folder = dirname(index);
  const names = readdirSync(folder).filter((name) => extname(name) in TYPES);
  return new Map(names.map((name) => [name, readFileSync(join(folder, name))]));
}
