/** HTTP towards the instances: a connection pool each, and one way to read how a connection failed. */
import type { IncomingHttpHeaders } from 'node:http';
import { Agent, buildConnector, type Dispatcher } from 'undici';
import { PdError } from '../errors.ts';
import { EVERY_ADDRESS, reasonOf } from '../net/resolve.ts';
import { type Instance, instanceLabel, instanceUrl } from './registry.ts';

export type UpstreamResponse = Dispatcher.ResponseData;

const CONNECT_TIMEOUT_MS = 5_000;

/** No byte of an answer came, because there is nobody or because the connection broke: another instance may do. */
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

/** An instance could not be asked at all; the request has not been answered in any part and may go to another. */
export class InstanceRefused extends PdError {
  readonly instance: Instance;

  constructor(instance: Instance, what: string, reason: string, cause?: unknown) {
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
  readonly instance: Instance;
  readonly path: string;
  /** For messages: what the request is part of. */
  readonly what: string;
  readonly headers: Readonly<Record<string, string>>;
  /** Absent: GET. */
  readonly body?: string | Buffer;
  /** To the head of the answer. */
  readonly headersTimeoutMs: number;
  /** The option that sets that deadline, for the message. */
  readonly timeoutName: string;
  readonly signal: AbortSignal;
}

export class Upstream {
  readonly #agent = agentTo();
  /** By host: URLs carry no zone id, so that instances on an IPv6 link are connected to by an agent of their own. */
  readonly #zoned = new Map<string, Agent>();

  /**
   * Resolves with status, headers and an unread body. Throws InstanceRefused, UPSTREAM_TIMEOUT, or the signal's reason once that is
   * aborted.
   */
  async ask(ask: Ask): Promise<UpstreamResponse> {
    const { instance, what, headersTimeoutMs, signal } = ask;
    try {
      return await this.#agentOf(instance).request({
        origin: instanceUrl(instance),
        path: ask.path,
        method: ask.body === undefined ? 'GET' : 'POST',
        headers: ask.headers,
        body: ask.body ?? null,
        headersTimeout: headersTimeoutMs,
        bodyTimeout: 0,
        signal,
      });
    } catch (error) {
      if (signal.aborted) throw signal.reason;
      const code = (error as NodeJS.ErrnoException).code ?? '';
      if (NO_CONNECTION.has(code)) throw new InstanceRefused(instance, what, reasonOf(error), error);
      if (code === 'UND_ERR_HEADERS_TIMEOUT') {
        throw timeoutError(instance, what, headersTimeoutMs, ask.timeoutName);
      }
      throw new PdError(
        'UPSTREAM_FAILED',
        `${what}: ${instance.role} ${instanceLabel(instance)}: ${reasonOf(error)}`,
        { peer: instance.httpAddress },
        { cause: error },
      );
    }
  }

  /** Breaks what is still under way. */
  async close(): Promise<void> {
    await Promise.all([this.#agent, ...this.#zoned.values()].map((agent) => agent.destroy()));
  }

  #agentOf({ http: { host } }: Instance): Agent {
    if (!host.includes('%')) return this.#agent;
    const known = this.#zoned.get(host);
    if (known) return known;
    const agent = agentTo(host);
    this.#zoned.set(host, agent);
    return agent;
  }
}

/** `host`: where to connect to, whatever the URL says. */
function agentTo(host?: string): Agent {
  const connector = buildConnector({ timeout: CONNECT_TIMEOUT_MS, ...EVERY_ADDRESS });
  return new Agent({
    connect: (options, done) =>
      connector(host === undefined ? options : { ...options, hostname: host }, done),
    pipelining: 1,
    // Idle time between two chunks is bounded where the body is read: undici's own bound counts from another moment.
    bodyTimeout: 0,
    // Shorter than the 5 s after which vLLM's server closes an idle connection.
    keepAliveTimeout: 3_000,
    keepAliveMaxTimeout: 30_000,
  });
}

export function timeoutError(instance: Instance, what: string, ms: number, name: string): PdError {
  return new PdError(
    'UPSTREAM_TIMEOUT',
    `${what}: ${instance.role} ${instanceLabel(instance)} sent nothing for ${ms} ms (${name})`,
    { peer: instance.httpAddress },
  );
}

/** Never passed on: they belong to one connection, or are set anew. */
const OWN_HEADERS = new Set([
  'connection',
  'keep-alive',
  'proxy-authenticate',
  'proxy-authorization',
  'te',
  'trailer',
  'transfer-encoding',
  'upgrade',
  'content-length',
  'date',
  'x-request-id',
]);

/** The head of an instance's answer as the client gets it. */
export function answerHeaders(response: UpstreamResponse): Record<string, string | string[]> {
  const headers: Record<string, string | string[]> = {};
  for (const [name, value] of Object.entries(response.headers)) {
    if (value !== undefined && !OWN_HEADERS.has(name)) headers[name] = value;
  }
  return headers;
}

/** What both instances get of the client's head: who asks, and which trace it belongs to. */
export function requestHeaders(incoming: IncomingHttpHeaders, requestId: string): Record<string, string> {
  const headers: Record<string, string> = { 'content-type': 'application/json', 'x-request-id': requestId };
  for (const name of ['authorization', 'traceparent', 'tracestate', 'user-agent']) {
    const value = incoming[name];
    if (typeof value === 'string') headers[name] = value;
  }
  return headers;
}
