/** Who may use an HTTP server: keys, TLS and CORS, the same for workers and proxy. */
import { Server as TlsServer } from 'node:tls';
import type { FastifyInstance, FastifyReply, FastifyRequest } from 'fastify';
import type { AccessConfig } from '../config/access-options.ts';
import { PdError } from '../errors.ts';
import { askedPath } from '../net/request-head.ts';
import { type Logger, RateLimitedLog } from '../observability/log.ts';
import { KeyFile, type KeyHolder, type KeyRefusal } from './keys.ts';
import { readTls, type TlsFiles, watchTls } from './tls.ts';

/** What anybody may ask, so that probes and scrapers need no key. */
const OPEN = new Set(['/health', '/ready', '/metrics']);

const TLS_OPTIONS = { cert: '--tls-cert', key: '--tls-key', ca: '--tls-client-ca' } as const;

const REFUSALS: Readonly<Record<KeyRefusal, string>> = {
  missing: 'this server needs a key: send `Authorization: Bearer KEY`',
  unknown: 'this key is not known here',
  expired: 'this key has expired',
};

/** A preflight's answer may be kept for so many seconds. */
const CORS_SECONDS = 600;

export interface GuardOptions {
  readonly config: AccessConfig;
  readonly log: Logger;
  /** Routes for holders of an admin key alone. */
  readonly admin?: ReadonlySet<string>;
  /** Further routes that anybody may ask for. */
  readonly open?: ReadonlySet<string>;
  readonly onRefused?: (reason: KeyRefusal | 'forbidden') => void;
}

export class Guard {
  readonly #options: GuardOptions;
  readonly #files: TlsFiles;
  readonly #keys: KeyFile | undefined;
  readonly #holders = new WeakMap<object, KeyHolder>();
  readonly #limited = new RateLimitedLog();
  #unwatch: (() => void) | undefined;
  /** For `https` of fastify; null: plain HTTP. */
  readonly https: object | null;

  /** Throws CONFIG_INVALID that names the option. */
  constructor(options: GuardOptions) {
    this.#options = options;
    const { tlsCert: cert, tlsKey: key, tlsClientCa: ca, apiKeyFile } = options.config;
    this.#files = { cert, key, ca };
    const tls = readTls(this.#files, TLS_OPTIONS);
    if (ca !== undefined && cert === undefined)
      throw new PdError('CONFIG_INVALID', '--tls-client-ca needs --tls-cert and --tls-key');
    this.https = cert === undefined ? null : { ...tls, ...(ca !== undefined && { requestCert: true }) };
    this.#keys =
      apiKeyFile === undefined ? undefined : new KeyFile(apiKeyFile, '--api-key-file', options.log);
  }

  /** Callers need a key. */
  get keyed(): boolean {
    return this.#keys !== undefined;
  }

  /** Who sent a request; undefined where no key is needed. */
  holder({ raw }: FastifyRequest): KeyHolder | undefined {
    return this.#holders.get(raw);
  }

  /** To be called once, before the routes. */
  attach(app: FastifyInstance): void {
    app.addHook('onRequest', async (request, reply) => {
      if (this.#cors(request, reply)) return reply;
      this.#admit(request, reply);
      return undefined;
    });
    const { server } = app;
    if (!(server instanceof TlsServer)) return;
    this.#unwatch = watchTls(this.#files, TLS_OPTIONS, this.#options.log, (options) =>
      server.setSecureContext(options),
    );
    server.on('tlsClientError', (error: NodeJS.ErrnoException, socket) => {
      const plain = error.code === 'ERR_SSL_HTTP_REQUEST';
      const what = plain ? 'a client spoke plain HTTP: it must use https://' : error.message;
      const from = socket.remoteAddress ?? 'a client that has gone';
      this.#limited.log(`tls ${error.code}`, (suppressed) =>
        this.#options.log.info({ suppressed, code: error.code }, `no TLS connection from ${from}: ${what}`),
      );
    });
  }

  close(): void {
    this.#keys?.close();
    this.#unwatch?.();
  }

  /** Throws KEY_REFUSED, KEY_FORBIDDEN. */
  #admit(request: FastifyRequest, reply: FastifyReply): void {
    const route = request.routeOptions.url;
    const { open, admin } = this.#options;
    if (this.#keys === undefined || (route !== undefined && (OPEN.has(route) || open?.has(route)))) return;
    const holder = this.#keys.holder(request.headers.authorization);
    if (typeof holder === 'string') {
      reply.header('www-authenticate', 'Bearer');
      throw this.#refused(request, holder, new PdError('KEY_REFUSED', REFUSALS[holder]));
    }
    if (route !== undefined && admin?.has(route) && !holder.admin) {
      const what = `${request.method} ${route} takes an admin key, which that of ${holder.name} is not`;
      throw this.#refused(request, 'forbidden', new PdError('KEY_FORBIDDEN', what));
    }
    this.#holders.set(request.raw, holder);
  }

  #refused(request: FastifyRequest, reason: KeyRefusal | 'forbidden', error: PdError): PdError {
    const { log, onRefused } = this.#options;
    onRefused?.(reason);
    this.#limited.log(`key ${reason} ${request.ip}`, (suppressed) =>
      log.warn(
        { code: error.code, reason, suppressed },
        `refused ${request.method} ${askedPath(request)} from ${request.ip}: ${error.message}`,
      ),
    );
    return error;
  }

  /** True: it was a preflight, and is answered. Headers go to the raw response, as routes that stream write to that themselves. */
  #cors({ method, headers }: FastifyRequest, reply: FastifyReply): boolean {
    const { origin } = headers;
    const { corsOrigins } = this.#options.config;
    if (origin === undefined || corsOrigins.length === 0) return false;
    const any = corsOrigins.includes('*');
    if (!any && !corsOrigins.includes(origin)) return false;
    const { raw } = reply;
    raw.setHeader('access-control-allow-origin', any ? '*' : origin);
    raw.setHeader('access-control-expose-headers', 'x-request-id, x-pd-request-id, retry-after');
    if (!any) raw.setHeader('vary', 'origin');
    if (method !== 'OPTIONS' || headers['access-control-request-method'] === undefined) return false;
    raw.setHeader('access-control-allow-methods', 'GET, POST');
    raw.setHeader('access-control-allow-headers', headers['access-control-request-headers'] ?? '*');
    raw.setHeader('access-control-max-age', CORS_SECONDS);
    reply.hijack();
    raw.writeHead(204).end();
    return true;
  }
}
