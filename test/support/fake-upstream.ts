/** An instance as the proxy sees it: an HTTP server that records what it is asked and answers as the test says, and its pings. */
import { EventEmitter, once } from 'node:events';
import { readFileSync } from 'node:fs';
import {
  createServer,
  type IncomingHttpHeaders,
  type RequestListener,
  type Server,
  type ServerResponse,
} from 'node:http';
import { createServer as createSecureServer } from 'node:https';
import type { AddressInfo } from 'node:net';
import { buffer } from 'node:stream/consumers';
import { Dealer } from 'zeromq';
import { formatHostPort, type HostPort, zmqEndpoint } from '../../src/net/address.ts';
import { encodePing, pingFields } from '../../src/wire/codec.ts';
import type { PingHello, PingMessage } from '../../src/wire/messages.ts';
import { PROMPT_IDS_HEADER, splitPromptIds } from '../../src/wire/prompt-ids.ts';
import type { Certificate } from '../../support/certificates.ts';

export interface Asked {
  readonly path: string;
  readonly headers: IncomingHttpHeaders;
  readonly raw: string;
  readonly json: Record<string, unknown>;
  /** Ids of the prompt's tokens that came behind the body. */
  readonly ids?: Uint32Array;
}

export type Answer = (asked: Asked, out: ServerResponse) => void | Promise<void>;

let nextKvPort = 20_000; // only a name here: nothing listens

export interface FakeUpstreamOptions {
  readonly host?: string;
  readonly models?: readonly string[];
  /** It takes TLS alone, of clients with a certificate from `ca`. */
  readonly tls?: Certificate & { readonly ca?: string };
}

function pem(files: Certificate & { readonly ca?: string }): object {
  return Object.fromEntries(Object.entries(files).map(([name, path]) => [name, readFileSync(path)]));
}

export class FakeUpstream {
  readonly asked: Asked[] = [];
  /** What GET /health says. */
  healthy = true;
  /** What GET /instance says, as a worker of ours does. Absent: it is none. */
  instance: PingMessage | undefined;
  /** The key that GET /instance came with last. */
  instanceKey: string | undefined;
  /** `asked` after each request, `aborted` when a client breaks off. */
  readonly events = new EventEmitter();
  readonly role: 'producer' | 'consumer';
  readonly zmqAddress: string;
  readonly #server: Server;
  #http: HostPort = { host: '', port: 0 };

  private constructor(
    role: 'producer' | 'consumer',
    host: string,
    answer: Answer,
    models: readonly string[],
    tls: (Certificate & { readonly ca?: string }) | undefined,
  ) {
    this.role = role;
    this.zmqAddress = formatHostPort({ host, port: nextKvPort++ });
    const server = (answering: RequestListener) =>
      tls
        ? createSecureServer({ ...pem(tls), requestCert: true, rejectUnauthorized: true }, answering)
        : createServer(answering);
    this.#server = server(async (request, out) => {
      if (request.url === '/v1/models') {
        out.setHeader('content-type', 'application/json');
        out.end(JSON.stringify({ object: 'list', data: models.map((id) => ({ id, object: 'model' })) }));
        return;
      }
      if (request.url === '/openapi.json') {
        out.end('{"openapi":"3.1.0"}');
        return;
      }
      if (request.url === '/health') {
        out.writeHead(this.healthy ? 200 : 503).end();
        return;
      }
      if (request.url === '/instance') {
        this.instanceKey = request.headers.authorization;
        if (this.instance) out.end(JSON.stringify(pingFields(this.instance)));
        else out.writeHead(404).end();
        return;
      }
      out.once('close', () => {
        if (!out.writableFinished) this.events.emit('aborted');
      });
      const whole = await buffer(request).catch(() => undefined);
      if (!whole) return; // broken off before it had come
      const { body, ids } = splitPromptIds(new Uint8Array(whole), request.headers[PROMPT_IDS_HEADER]);
      const raw = Buffer.from(body).toString();
      const asked = {
        path: request.url ?? '',
        headers: request.headers,
        raw,
        json: JSON.parse(raw) as Record<string, unknown>,
        ...(ids && { ids }),
      };
      this.asked.push(asked);
      this.events.emit('asked', asked);
      await answer(asked, out);
    });
  }

  static async start(
    role: 'producer' | 'consumer',
    answer: Answer,
    { host = '127.0.0.1', models = ['m'], tls }: FakeUpstreamOptions = {},
  ): Promise<FakeUpstream> {
    const upstream = new FakeUpstream(role, host, answer, models, tls);
    upstream.#server.listen(0, host);
    await once(upstream.#server, 'listening');
    upstream.#http = { host, port: (upstream.#server.address() as AddressInfo).port };
    return upstream;
  }

  get httpAddress(): string {
    return formatHostPort(this.#http);
  }

  get label(): string {
    return `[HTTP:${this.httpAddress}, ZMQ:${this.zmqAddress}]`;
  }

  /** Pings once. Without a digest, as vLLM does. */
  async ping(
    discovery: HostPort,
    digest?: string,
    features?: readonly string[],
    more: Partial<PingHello> = {},
  ): Promise<void> {
    await sendPing(discovery, this.pingOf(digest, features, more));
  }

  /** What it pings. */
  pingOf(digest?: string, features?: readonly string[], more: Partial<PingHello> = {}): PingMessage {
    return {
      type: this.role === 'producer' ? 'P' : 'D',
      http_address: this.httpAddress,
      zmq_address: this.zmqAddress,
      ...(digest !== undefined && {
        native: { version: 1, digest, model: `model-${digest}`, ...(features && { features }), ...more },
      }),
    };
  }

  /** Breaks every connection and refuses new ones, as a killed process does. */
  async kill(): Promise<void> {
    if (!this.#server.listening) return;
    const closed = once(this.#server, 'close');
    this.#server.close();
    this.#server.closeAllConnections();
    await closed;
  }
}

export async function sendPing(discovery: HostPort, ping: Parameters<typeof encodePing>[0]): Promise<void> {
  await sendRaw(discovery, encodePing(ping), ping.zmq_address);
}

/** One message from a socket of its own, as a process that has just started sends. */
export async function sendRaw(discovery: HostPort, body: Uint8Array, routingId: string): Promise<void> {
  const dealer = new Dealer({ routingId, linger: 1_000, ipv6: discovery.host.includes(':') });
  dealer.connect(zmqEndpoint(discovery));
  await dealer.send(body);
  dealer.close();
}

/** A JSON answer with the request's id in it, as a worker builds it. */
export function answerJson(status = 200, extra: Record<string, unknown> = {}): Answer {
  return (asked, out) => {
    out.writeHead(status, { 'content-type': 'application/json' });
    out.end(JSON.stringify({ id: `cmpl-${asked.headers['x-request-id']}`, ...extra }));
  };
}
