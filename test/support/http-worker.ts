import { afterEach, expect } from 'vitest';
import { Guard } from '../../src/access/guard.ts';
import type { AccessConfig } from '../../src/config/access-options.ts';
import { workerConfig } from '../../src/config/embedded.ts';
import { createLogger, RateLimitedLog } from '../../src/observability/log.ts';
import { MetricsPage } from '../../src/observability/metrics.ts';
import type { ServerContext } from '../../src/worker/server/context.ts';
import { InFlight } from '../../src/worker/server/in-flight.ts';
import { createServer } from '../../src/worker/server/server.ts';
import { BYTE_MODEL, BYTE_READER, FakeCore, type Script, saying } from './fake-core.ts';

/** What these answers may hold; a test reads what it knows to be there. */
export interface Answer {
  readonly [key: string]: unknown;
  readonly choices: {
    readonly index: number;
    readonly text: string;
    readonly delta: object;
    readonly finish_reason: string | null;
    readonly logprobs: { readonly token_logprobs: readonly number[] };
  }[];
  readonly error: { readonly message: string };
  readonly data: { readonly id: string }[];
}

export const LOG = createLogger({ level: 'silent', format: 'json' }, 'main');
export const closers: (() => Promise<void>)[] = [];
afterEach(async () => {
  await Promise.all(closers.splice(0).map((close) => close()));
});

/** A server with a core that follows `script`, closed after the test. */
export async function startServer(
  script: Script = saying('hello'),
  config: Partial<ServerContext['config']> = {},
  reader: ServerContext['reader'] = BYTE_READER,
  access: Partial<AccessConfig> = {},
) {
  const core = new FakeCore(script);
  const client = await core.connect();
  const metrics = new MetricsPage();
  const inFlight = new InFlight();
  const guard = new Guard({ config: { corsOrigins: [], ...access }, log: LOG });
  const server = createServer({
    config: { ...workerConfig(), servedModelNames: ['demo', 'alias'], maxNumSeqs: 8, ...config },
    core: client,
    reader,
    model: BYTE_MODEL,
    guard,
    inFlight,
    metrics,
    pages: [metrics],
    version: '1.2.3',
    log: LOG,
    limited: new RateLimitedLog(),
  });
  closers.push(async () => guard.close());
  closers.push(async () => {
    await client.close();
    await server.close();
  });
  const post = async (url: string, payload: unknown, headers: Record<string, string> = {}) => {
    const response = await server.inject({
      method: 'POST',
      url,
      payload: typeof payload === 'string' ? payload : JSON.stringify(payload),
      headers: { 'content-type': 'application/json', ...headers },
    });
    return { status: response.statusCode, headers: response.headers, body: response.body };
  };
  const json = async (url: string, payload: unknown, headers?: Record<string, string>) => {
    const { status, body } = await post(url, payload, headers);
    return { status, body: JSON.parse(body) as Answer };
  };
  /** The events of a stream, `[DONE]` checked and left out. */
  const events = async (url: string, payload: object) => {
    const { status, headers, body } = await post(url, { ...payload, stream: true });
    expect(headers['content-type']).toMatch(/^text\/event-stream/);
    const data = body.split('\n\n').filter((part) => part !== '');
    expect(data.pop()).toBe('data: [DONE]');
    return { status, events: data.map((part) => JSON.parse(part.replace(/^data: /, '')) as Answer) };
  };
  return { core, client, server, metrics, inFlight, post, json, events };
}

export const COMPLETIONS = '/v1/completions';
export const CHAT = '/v1/chat/completions';
export const user = (content: unknown) => [{ role: 'user', content }];
