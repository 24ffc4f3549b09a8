/** A server with the OpenAI API that answers as the test says, event by event, and never by the wall clock. */
import { once } from 'node:events';
import { createServer, type Server, type ServerResponse } from 'node:http';
import type { AddressInfo } from 'node:net';

export interface AskedBody {
  readonly path: string;
  readonly body: Record<string, unknown>;
}

export type Answering = (asked: AskedBody, out: ServerResponse, index: number) => void | Promise<void>;

export class FakeOpenAi {
  /** Completions and chats, in the order in which they came. */
  readonly asked: AskedBody[] = [];
  authorization: string | undefined;
  readonly #server: Server;

  private constructor(answer: Answering, tokenizes: boolean) {
    this.#server = createServer(async (request, out) => {
      this.authorization = request.headers.authorization;
      const chunks: Buffer[] = [];
      for await (const chunk of request) chunks.push(chunk as Buffer);
      const text = Buffer.concat(chunks).toString();
      const body = (text === '' ? {} : JSON.parse(text)) as Record<string, unknown>;
      const path = request.url ?? '';
      if (path === '/v1/models') return json(out, 200, { data: [{ id: 'first' }, { id: 'second' }] });
      if (path === '/tokenize') {
        return tokenizes
          ? json(out, 200, { count: countTokens(body) })
          : json(out, 404, { detail: 'Not Found' });
      }
      const asked = { path, body };
      this.asked.push(asked);
      await answer(asked, out, this.asked.length - 1);
    });
  }

  static async start(answer: Answering, { tokenizes = true } = {}): Promise<FakeOpenAi> {
    const fake = new FakeOpenAi(answer, tokenizes);
    fake.#server.listen(0, '127.0.0.1');
    await once(fake.#server, 'listening');
    return fake;
  }

  get url(): string {
    return `http://127.0.0.1:${(this.#server.address() as AddressInfo).port}`;
  }

  async close(): Promise<void> {
    const closed = once(this.#server, 'close');
    this.#server.close();
    this.#server.closeAllConnections();
    await closed;
  }
}

/** A token per word, and one at the beginning; of a chat, five for its template. */
export function countTokens(body: Record<string, unknown>): number {
  const { prompt, messages } = body as { prompt?: string; messages?: { content: string }[] };
  const text = prompt ?? messages![0]!.content;
  return text.split(' ').length + (messages ? 5 : 1);
}

export function json(out: ServerResponse, status: number, body: object): void {
  out.writeHead(status, { 'content-type': 'application/json' });
  out.end(JSON.stringify(body));
}

/** Writes one event of a completion; resolves once it is handed to the system. */
export function writeEvent(out: ServerResponse, data: object | '[DONE]'): Promise<void> {
  if (!out.headersSent) out.writeHead(200, { 'content-type': 'text/event-stream; charset=utf-8' });
  const text = typeof data === 'string' ? data : JSON.stringify(data);
  return new Promise((resolve) => {
    out.write(`data: ${text}\n\n`, () => resolve());
  });
}

/** A whole completion of so many tokens as it was asked for, at once. */
export async function answerAtOnce({ body }: AskedBody, out: ServerResponse): Promise<void> {
  const tokens = Number(body['max_tokens']);
  const usage = { prompt_tokens: countTokens(body), completion_tokens: tokens };
  if (body['stream'] !== true) return json(out, 200, { choices: [{ text: 'x' }], usage });
  for (let i = 0; i < tokens; i++) {
    await writeEvent(out, { choices: [{ text: 'x', finish_reason: i === tokens - 1 ? 'length' : null }] });
  }
  await writeEvent(out, { choices: [], usage });
  await writeEvent(out, '[DONE]');
  out.end();
}
