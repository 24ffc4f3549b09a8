/** An HTTP client for our own tools that tries every address of a name. Node's own underneath, since undici takes a while to load. */
import { once } from 'node:events';
import { type IncomingMessage, request } from 'node:http';
import { request as requestSecurely } from 'node:https';
import { text } from 'node:stream/consumers';
import { EVERY_ADDRESS } from './resolve.ts';

export interface Answer {
  readonly status: number;
  /** 200 to 299. */
  readonly ok: boolean;
  readonly text: string;
  /** `text` parsed. Throws if it is not JSON. */
  json(): unknown;
}

export interface Asked {
  /** The body of a POST; absent: GET. */
  readonly json?: object;
  /** Shown as `Authorization: Bearer`. */
  readonly key?: string | undefined;
  readonly signal: AbortSignal;
}

/** The key that our own tools show, in PD_API_KEY: to servers that their user has named, never to one that was only announced to them. */
export function ownKey(): string | undefined {
  return process.env['PD_API_KEY'] || undefined;
}

/** The whole answer. Throws the error of the connection (`reasonOf` puts it into words), and the reason of `signal`. */
export async function fetchAll(url: string, { json, key, signal }: Asked): Promise<Answer> {
  const open = url.startsWith('https:') ? requestSecurely : request;
  const headers = {
    ...(key !== undefined && { authorization: `Bearer ${key}` }),
    ...(json && { 'content-type': 'application/json' }),
  };
  const options = { ...EVERY_ADDRESS, agent: false, signal, method: json ? 'POST' : 'GET', headers } as const;
  try {
    const sent = open(url, options).end(json && JSON.stringify(json));
    sent.on('error', () => {}); // thrown by `once` before the response, by the response itself during it
    const [response] = (await once(sent, 'response')) as [IncomingMessage];
    const { statusCode: status = 0 } = response;
    const body = await text(response);
    return { status, ok: status >= 200 && status < 300, text: body, json: () => JSON.parse(body) as unknown };
  } catch (error) {
    throw signal.aborted ? signal.reason : error;
  }
}

/** Of the status of an answer to GET /health: a server that has no such route, or wants a key for it, is well too. */
export function isWell(status: number): boolean {
  return status < 500;
}

/** A GET with one deadline for all of it, body included. Past it: a `TimeoutError`. */
export function ask(url: string, timeoutMs: number, key?: string): Promise<Answer> {
  return fetchAll(url, { key, signal: AbortSignal.timeout(timeoutMs) });
}
