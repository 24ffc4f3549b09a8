/** HTTP to the instances: a connection pool for each, and one reading of the ways in which a connection fails. */
import type { IncomingHttpHeaders } from 'node:http';
import { Agent, buildConnector, type Dispatcher } from 'undici';
import { KeyFile } from '../access/keys.ts';
import { readTls } from '../access/tls.ts';
import type { UpstreamAccess } from '../config/proxy-config.ts';
import { type Deferred, deferred, type Signal } from '../deferred.ts';
import { PdError } from '../errors.ts';
import { EVERY_ADDRESS, reasonOf } from '../net/resolve.ts';
import type { Logger } from '../observability/log.ts';
import { type Instance, instanceLabel, instanceUrl } from './registry.ts';

type Connect = ReturnType<typeof buildConnector>;

const CONNECT_TIMEOUT_MS = 5_000;

/** No byte of an answer came: nobody listens there, or the connection broke. Another instance may be tried. */
const NO_CONNECTION = new Set([
  'ECONNREFUSED',
  'ECONNRESET',
  'ECONNABORTED',
  'EPIPE',
  'ETIMEDOUT',
  'EHOSTUNREACH',
  'EHOSTDOWN',
  'ENETUNREACH',
  'ENOTFOUND',
  'EAI_AGAIN',
  'UND_ERR_CONNECT_TIMEOUT',
  'UND_ERR_SOCKET',
]);

/** A call to an instance, as messages name it. */
export interface Call {
  readonly instance: Instance;
  /** What is asked of it. */
  readonly what: string;
  /** How long it may send nothing. */
  readonly timeoutMs: number;
  /** The option that sets that, or `fixed`. */
  readonly timeoutName: string;
}

/** An instance did not take the request. No part of it has been answered, so it may go to another. */
export class InstanceRefused extends PdError {
  readonly instance: Instance;

  constructor({ instance, what }: Call, reason: string, cause?: unknown) {
    super(
      'UPSTREAM_FAILED',
      `${what}: ${instance.role} ${instanceLabel(instance)} did not take the request: ${reason}`,
      { peer: instance.httpAddress },
      { cause },
    );
    this.instance = instance;
  }
}

export interface Ask {
  readonly path: string;
  readonly headers: Readonly<Record<string, string>>;
  /** Absent: GET. */
  readonly body?: string | Uint8Array;
  readonly signal: Signal;
  /** To the head of the answer; 0: whoever can abort `signal` watches. Default: the call's. */
  readonly headersTimeoutMs?: number;
}

/** Of an answer that nobody reads yet; then its connection is not read any more. Bytes. */
const MOST_UNREAD = 65_536;

/** An answer whose head has come. Its body is read once, or destroyed. */
export class UpstreamResponse {
  readonly statusCode: number;
  readonly headers: IncomingHttpHeaders;
  readonly #controller: Dispatcher.DispatchController;
  /** What came before it was read. */
  #unread: Buffer[] = [];
  #unreadBytes = 0;
  #take: ((chunk: Buffer) => boolean) | undefined;
  /** It takes what comes. */
  #flowing = false;
  #whole: Deferred<void> | undefined;
  #ended = false;
  #failure: { readonly cause: unknown } | undefined;

  constructor(statusCode: number, headers: IncomingHttpHeaders, controller: Dispatcher.DispatchController) {
    this.statusCode = statusCode;
    this.headers = headers;
    this.#controller = controller;
  }

  /** Some of the body, or its end, is here already. */
  get begun(): boolean {
    return this.#unreadBytes > 0 || this.#ended;
  }

  /**
   * Gives `take` one chunk after another, and resolves after the last. Once `take` has returned false it gets no more until `resume`.
   * Throws where the answer breaks off: the error of the connection, or the reason that it was destroyed or aborted for. To be called once.
   */
  read(take: (chunk: Buffer) => boolean): Promise<void> {
    this.#take = take;
    this.#whole = deferred();
    this.resume();
    return this.#whole.promise;
  }

  /** More may come. */
  resume(): void {
    while (this.#unread.length > 0) {
      const chunk = this.#unread.shift()!;
      this.#unreadBytes -= chunk.length;
      if (!this.#take!(chunk)) {
        this.#controller.pause();
        return;
      }
    }
    this.#flowing = true;
    if (this.#failure) this.#whole!.reject(this.#failure.cause);
    else if (this.#ended) this.#whole!.resolve();
    else this.#controller.resume();
  }

  /** Reads to the end what is of no interest. */
  async dump(): Promise<void> {
    await this.read(() => true);
  }

  /** Breaks it off, with the connection. */
  destroy(cause: Error = new PdError('REQUEST_ABORTED', 'the answer is not wanted any more')): void {
    if (!this.#ended) this.#controller.abort(cause);
  }

  /** @internal */
  push(chunk: Buffer): void {
    if (this.#flowing) {
      this.#flowing = this.#take!(chunk);
      if (!this.#flowing) this.#controller.pause();
      return;
    }
    this.#unread.push(chunk);
    this.#unreadBytes += chunk.length;
    if (this.#take || this.#unreadBytes > MOST_UNREAD) this.#controller.pause();
  }

  /** @internal */
  end(failure?: { readonly cause: unknown }): void {
    this.#ended = true;
    this.#failure = failure;
    // What broke off is not waited for, though somebody is slow to take what came before.
    if (failure) this.#whole?.reject(failure.cause);
    else if (this.#unread.length === 0) this.#whole?.resolve();
  }
}

/** One request, as undici tells of it. */
class Exchange implements Dispatcher.DispatchHandler {
  readonly #head = deferred<UpstreamResponse>();
  readonly #signal: Signal;
  readonly #onAbort = () => this.#abort();
  #controller: Dispatcher.DispatchController | undefined;
  #response: UpstreamResponse | undefined;

  constructor(signal: Signal) {
    this.#signal = signal;
    signal.addEventListener('abort', this.#onAbort, { once: true });
  }

  get head(): Promise<UpstreamResponse> {
    return this.#head.promise;
  }

  onRequestStart(controller: Dispatcher.DispatchController): void {
    this.#controller = controller;
    if (this.#signal.aborted) this.#abort();
  }

  onResponseStart(
    controller: Dispatcher.DispatchController,
    statusCode: number,
    headers: IncomingHttpHeaders,
  ): void {
    if (statusCode < 200) return;
    this.#response = new UpstreamResponse(statusCode, headers, controller);
    this.#head.resolve(this.#response);
  }

  onResponseData(_controller: Dispatcher.DispatchController, chunk: Buffer): void {
    this.#response!.push(chunk);
  }

  onResponseEnd(): void {
    this.#signal.removeEventListener('abort', this.#onAbort);
    this.#response!.end();
  }

  onResponseError(_controller: Dispatcher.DispatchController, cause: Error): void {
    this.#signal.removeEventListener('abort', this.#onAbort);
    if (this.#response) this.#response.end({ cause });
    else this.#head.reject(cause);
  }

  /** Before there is a connection for it the head is not waited for any longer, and it is not sent once there is one. */
  #abort(): void {
    const reason = this.#signal.reason as Error;
    this.#head.reject(reason);
    this.#controller?.abort(reason);
  }
}

const TLS_OPTIONS = { cert: '--worker-tls-cert', key: '--worker-tls-key', ca: '--worker-ca' } as const;

export interface UpstreamOptions {
  readonly access: UpstreamAccess;
  /** Clients show keys of the proxy's own, which are nobody else's business. */
  readonly keyed: boolean;
  readonly log: Logger;
}

export class Upstream {
  readonly #connect: Connect;
  readonly #agent: Agent;
  /** By host. URLs carry no zone id, so each IPv6 link-local host has an agent of its own to connect by. */
  readonly #zoned = new Map<string, Agent>();
  readonly #key: KeyFile | undefined;
  readonly #keyed: boolean;

  /** Throws CONFIG_INVALID that names the option. */
  constructor({ access, keyed, log }: UpstreamOptions) {
    const { cert, key, ca, tlsName, keyFile } = access;
    const tls = readTls({ cert, key, ca }, TLS_OPTIONS);
    this.#connect = buildConnector({ timeout: CONNECT_TIMEOUT_MS, ...EVERY_ADDRESS, ...tls });
    if (tlsName !== undefined) {
      const connect = this.#connect;
      this.#connect = (options, done) => connect({ ...options, servername: tlsName }, done);
    }
    this.#agent = this.#agentTo();
    this.#key = keyFile === undefined ? undefined : new KeyFile(keyFile, '--worker-key-file', log);
    this.#keyed = keyed;
  }

  /**
   * Resolves with status, headers and an unread body. Throws InstanceRefused, UPSTREAM_TIMEOUT, UPSTREAM_FAILED, or the signal's reason
   * once that is aborted.
   */
  async ask(call: Call, ask: Ask): Promise<UpstreamResponse> {
    const { instance, what, timeoutMs } = call;
    const { signal } = ask;
    signal.throwIfAborted();
    try {
      const exchange = new Exchange(signal);
      this.#agentOf(instance).dispatch(
        {
          origin: instanceUrl(instance),
          path: ask.path,
          method: ask.body === undefined ? 'GET' : 'POST',
          headers: this.#headers(ask.headers),
          body: ask.body ?? null,
          headersTimeout: ask.headersTimeoutMs ?? timeoutMs,
          bodyTimeout: 0,
        },
        exchange,
      );
      return await exchange.head;
    } catch (error) {
      if (signal.aborted) throw signal.reason;
      const code = (error as NodeJS.ErrnoException).code ?? '';
      if (NO_CONNECTION.has(code)) throw new InstanceRefused(call, reasonOf(error), error);
      if (code === 'UND_ERR_HEADERS_TIMEOUT') throw timeoutError(call);
      throw new PdError(
        'UPSTREAM_FAILED',
        `${what}: ${instance.role} ${instanceLabel(instance)}: ${reasonOf(error)}`,
        { peer: instance.httpAddress },
        { cause: error },
      );
    }
  }

  /** Aborts what is still under way. */
  async close(): Promise<void> {
    this.#key?.close();
    await Promise.all([this.#agent, ...this.#zoned.values()].map((agent) => agent.destroy()));
  }

  #agentOf({ http: { host } }: Instance): Agent {
    if (!host.includes('%')) return this.#agent;
    const known = this.#zoned.get(host);
    if (known) return known;
    const agent = this.#agentTo(host);
    this.#zoned.set(host, agent);
    return agent;
  }

  /** A client's key goes on only where it is the instances' to check: without a key of either kind here. */
  #headers(headers: Ask['headers']): Ask['headers'] {
    if (this.#key) return { ...headers, authorization: `Bearer ${this.#key.current()}` };
    if (!this.#keyed) return headers;
    const { authorization: _, ...others } = headers;
    return others;
  }

  /** `host`: where to connect, whatever the URL says. */
  #agentTo(host?: string): Agent {
    return new Agent({
      connect: (options, done) =>
        this.#connect(host === undefined ? options : { ...options, hostname: host }, done),
      pipelining: 1,
      // Idle time between two chunks is bounded where the body is read; undici would count from another moment.
      bodyTimeout: 0,
      // Shorter than the 5 s after which vLLM's server closes an idle connection.
      keepAliveTimeout: 3_000,
      keepAliveMaxTimeout: 30_000,
    });
  }
}

export function timeoutError({ instance, what, timeoutMs, timeoutName }: Call): PdError {
  return new PdError(
    'UPSTREAM_TIMEOUT',
    `${what}: ${instance.role} ${instanceLabel(instance)} sent nothing for ${timeoutMs} ms (${timeoutName})`,
    { peer: instance.httpAddress },
  );
}

/** An answer read to its end before the client hears of it. */
export interface WholeAnswer {
  readonly response: UpstreamResponse;
  readonly body: Buffer;
}

/** Reads to the end, keeping at most `keepBytes` of them. */
export async function readWhole(response: UpstreamResponse, keepBytes: number): Promise<WholeAnswer> {
  const chunks: Buffer[] = [];
  let kept = 0;
  await response.read((chunk) => {
    if (kept < keepBytes) chunks.push(chunk.subarray(0, keepBytes - kept));
    kept += chunk.length;
    return true;
  });
  return { response, body: joined(chunks) };
}

export function joined(chunks: readonly Buffer[]): Buffer {
  return chunks.length === 1 ? chunks[0]! : Buffer.concat(chunks);
}

/** Why a worker of ours cannot serve now: SERVER_DRAINING is as good as a refused connection. Undefined for any other answer. */
export function unavailableCode({ response, body }: WholeAnswer): unknown {
  if (response.statusCode !== 503) return undefined;
  try {
    const { error } = JSON.parse(body.toString('utf8')) as { error?: { code?: unknown } };
    return error?.code;
  } catch {
    return undefined;
  }
}
