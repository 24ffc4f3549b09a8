/** HTTP to the instances: a connection pool for each, and one reading of the ways in which a connection fails. */
import { Agent, buildConnector, type Dispatcher } from 'undici';
import { KeyFile } from '../access/keys.ts';
import { readTls } from '../access/tls.ts';
import type { UpstreamAccess } from '../config/proxy-config.ts';
import { PdError } from '../errors.ts';
import { EVERY_ADDRESS, reasonOf } from '../net/resolve.ts';
import type { Logger } from '../observability/log.ts';
import { type Instance, instanceLabel, instanceUrl } from './registry.ts';

type Connect = ReturnType<typeof buildConnector>;
export type UpstreamResponse = Dispatcher.ResponseData;

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
  readonly signal: AbortSignal;
  /** To the head of the answer; 0: whoever can abort `signal` watches. Default: the call's. */
  readonly headersTimeoutMs?: number;
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
    this.#key = keyFile === undefined ? undefined : KeyFile.open(keyFile, '--worker-key-file', log);
    this.#keyed = keyed;
  }

  /**
   * Resolves with status, headers and an unread body. Throws InstanceRefused, UPSTREAM_TIMEOUT, UPSTREAM_FAILED, or the signal's reason
   * once that is aborted.
   */
  async ask(call: Call, ask: Ask): Promise<UpstreamResponse> {
    const { instance, what, timeoutMs } = call;
    const { signal } = ask;
    try {
      return await this.#agentOf(instance).request({
        origin: instanceUrl(instance),
        path: ask.path,
        method: ask.body === undefined ? 'GET' : 'POST',
        headers: this.#headers(ask.headers),
        body: ask.body ?? null,
        headersTimeout: ask.headersTimeoutMs ?? timeoutMs,
        bodyTimeout: 0,
        signal,
      });
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
  for await (const chunk of response.body as AsyncIterable<Buffer>) {
    const part = chunk.subarray(0, keepBytes - kept);
    kept += part.length;
    if (part.length > 0) chunks.push(part);
  }
  return { response, body: Buffer.concat(chunks) };
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
