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
  readonly signal: AbortSignal;
}

/** What our own tools show to servers that need a key. */
function keyHeader(): { readonly authorization?: string } {
  const key = process.env['PD_API_KEY'];
  return key ? { authorization: `Bearer ${key}` } : {};
}

/** The whole answer. Shows the key in PD_API_KEY, if there is one. Throws the error of the connection (`reasonOf` puts it into words), and the reason of `signal`. */
export async function fetchAll(url: string, { json, signal }: Asked): Promise<Answer> {
  const open = url.startsWith('https:') ? requestSecurely : request;
  const headers = keyHeader();
  const options = { ...EVERY_ADDRESS, agent: false, signal, headers } as const;
  try {
    const sent =
      json === undefined
        ? open(url, options).end()
        : open(url, {
            ...options,
            method: 'POST',
            headers: { ...headers, 'content-type': 'application/json' },
          }).end(JSON.stringify(json));
    sent.on('error', () => {}); // thrown by `once` before the response, by the response itself during it
    const [response] = (await once(sent, 'response')) as [IncomingMessage];
    const { statusCode: status = 0 } = response;
    const body = await text(response);
    return { status, ok: status >= 200 && status < 300, text: body, json: () => JSON.parse(body) as unknown };
  } catch (error) {
    throw signal.aborted ? signal.reason : error;
  }
}

/** A GET with one deadline for all of it, body included. Past it: a `TimeoutError`. */
export function ask(url: string, timeoutMs: number): Promise<Answer> {
  return fetchAll(url, { signal: AbortSignal.timeout(timeoutMs) });
}
