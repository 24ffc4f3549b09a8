/**
 * Reads a streamed answer, with times. Pure: bytes and times are passed in. The first token is the first event that carries text, not the
 * event that only gives the assistant's role.
 */
import type { Endpoint, Failure } from './record.ts';

/** Lines of an event end with LF or CRLF; no server sends a lone CR, which the standard also allows. */
const LINE = /\r?\n/;
/** Characters of one line. */
const MAX_LINE = 64 * 1024 * 1024;

export class StreamReading {
  readonly #endpoint: Endpoint;
  readonly #decoder = new TextDecoder();
  readonly #textAt: number[] = [];
  readonly #ids: (readonly number[])[] = [];
  #rest = '';
  #data: string[] = [];
  #failure: Failure | undefined;
  #ended = false;
  #promptTokens: number | undefined;
  #outputTokens: number | undefined;

  constructor(endpoint: Endpoint) {
    this.#endpoint = endpoint;
  }

  /** `atMs`: when the bytes arrived. */
  push(bytes: Uint8Array, atMs: number): void {
    const lines = (this.#rest + this.#decoder.decode(bytes, { stream: true })).split(LINE);
    this.#rest = lines.pop()!;
    if (this.#rest.length > MAX_LINE) {
      this.#rest = '';
      this.#failure ??= { code: 'BAD_EVENT', message: `a line of more than ${MAX_LINE} characters` };
    }
    for (const line of lines) this.#line(line, atMs);
  }

  /** The stream has ended. The last empty line may be missing, as with some servers. */
  end(atMs: number): void {
    if (this.#rest !== '') this.#line(this.#rest, atMs);
    this.#line('', atMs);
    this.#rest = '';
  }

  /** When each event with text arrived. */
  get textAtMs(): readonly number[] {
    return this.#textAt;
  }

  /** Of each event with text: the tokens that it says it carries; undefined unless all of them say. */
  get ids(): readonly (readonly number[])[] | undefined {
    return this.#ids.length > 0 && this.#ids.length === this.#textAt.length ? this.#ids : undefined;
  }

  /** As counted by the server; undefined if it did not say. */
  get usage(): { readonly promptTokens: number | undefined; readonly outputTokens: number | undefined } {
    return { promptTokens: this.#promptTokens, outputTokens: this.#outputTokens };
  }

  /** What was wrong with the stream, once it has ended. */
  get failure(): Failure | undefined {
    if (this.#failure) return this.#failure;
    if (!this.#ended) {
      return { code: 'TRUNCATED', message: 'the stream ended without a finish reason and without [DONE]' };
    }
    return (this.#outputTokens ?? this.#textAt.length) === 0
      ? { code: 'NO_TOKENS', message: 'the answer has no token' }
      : undefined;
  }

  #line(line: string, atMs: number): void {
    if (line.startsWith('data:')) {
      this.#data.push(line.slice(line[5] === ' ' ? 6 : 5));
    } else if (line === '' && this.#data.length > 0) {
      const data = this.#data.join('\n');
      this.#data = [];
      this.#event(data, atMs);
    }
  }

  #event(data: string, atMs: number): void {
    if (data === '[DONE]') {
      this.#ended = true;
      return;
    }
    let event: unknown;
    try {
      event = JSON.parse(data);
    } catch {
      this.#failure ??= { code: 'BAD_EVENT', message: `an event is not JSON: ${data.slice(0, 200)}` };
      return;
    }
    const error = fieldOf(event, 'error');
    if (error !== undefined && error !== null) {
      const { code, message } = serverError(event);
      this.#failure ??= { code: code === undefined ? 'stream' : `stream ${code}`, message };
    }
    const usage = fieldOf(event, 'usage');
    this.#promptTokens = numberOf(fieldOf(usage, 'prompt_tokens')) ?? this.#promptTokens;
    this.#outputTokens = numberOf(fieldOf(usage, 'completion_tokens')) ?? this.#outputTokens;
    const choices = fieldOf(event, 'choices');
    const choice: unknown = Array.isArray(choices) ? choices[0] : undefined;
    if (this.#hasText(choice)) {
      this.#textAt.push(atMs);
      const ids = fieldOf(choice, 'token_ids');
      if (Array.isArray(ids)) this.#ids.push(ids as readonly number[]);
    }
    if (typeof fieldOf(choice, 'finish_reason') === 'string') this.#ended = true;
  }

  #hasText(choice: unknown): boolean {
    if (this.#endpoint === 'completions') return isText(fieldOf(choice, 'text'));
    const delta = fieldOf(choice, 'delta');
    const calls = fieldOf(delta, 'tool_calls');
    return (
      ['content', 'reasoning_content', 'reasoning'].some((name) => isText(fieldOf(delta, name))) ||
      (Array.isArray(calls) && calls.length > 0)
    );
  }
}

/** Code and message of a server's error, in OpenAI's form or something close to it. */
export function serverError(body: unknown): { readonly code: string | undefined; readonly message: string } {
  const error = fieldOf(body, 'error') ?? body;
  const code = fieldOf(error, 'code') ?? fieldOf(error, 'type');
  const message = fieldOf(error, 'message') ?? fieldOf(error, 'detail') ?? error;
  return {
    code: typeof code === 'string' || typeof code === 'number' ? String(code) : undefined,
    message: (typeof message === 'string' ? message : JSON.stringify(message)).slice(0, 500),
  };
}

export function fieldOf(value: unknown, name: string): unknown {
  return typeof value === 'object' && value !== null ? (value as Record<string, unknown>)[name] : undefined;
}

function numberOf(value: unknown): number | undefined {
  return typeof value === 'number' ? value : undefined;
}

function isText(value: unknown): boolean {
  return typeof value === 'string' && value !== '';
}
