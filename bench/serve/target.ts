/** The server under test: its addresses, models and tokenizer. Every request has a deadline. */
import { Agent, type Dispatcher } from 'undici';
import { PdError } from '../../src/errors.ts';
import { EVERY_ADDRESS, reasonOf } from '../../src/net/resolve.ts';
import type { Endpoint, PlannedRequest } from './record.ts';
import { fieldOf, serverError } from './stream-reading.ts';

export interface TargetOptions {
  /** With or without /v1 at the end. */
  readonly url: string;
  /** The server that tokenizes, if it is not this one; a proxy may not. */
  readonly tokenizeUrl?: string | undefined;
  /** Absent: the first of /v1/models. */
  readonly model?: string | undefined;
  readonly apiKey?: string | undefined;
  readonly endpoint: Endpoint;
  readonly temperature: number;
  /** Answers have their full length whatever the model says. Not in OpenAI's own API. */
  readonly ignoreEos: boolean;
  /** Additional fields of every body; they override. */
  readonly extraBody?: Readonly<Record<string, unknown>> | undefined;
}

const CONNECT_TIMEOUT_MS = 10_000;
/** Of requests that are not part of the load. */
const ASK_TIMEOUT_MS = 60_000;
/** Bytes of an answer that is not a stream. */
const MAX_ANSWER = 64 * 1024 * 1024;

const PATHS = { completions: '/v1/completions', chat: '/v1/chat/completions' } as const;

export class Target {
  /** Without /v1. */
  readonly url: string;
  readonly model: string;
  readonly #options: TargetOptions;
  readonly #tokenizeUrl: string;
  readonly #agent: Agent;

  private constructor(options: TargetOptions, url: string, model: string, agent: Agent) {
    this.#options = options;
    this.url = url;
    this.model = model;
    this.#tokenizeUrl =
      options.tokenizeUrl === undefined ? url : baseUrl(options.tokenizeUrl, '--tokenize-url');
    this.#agent = agent;
  }

  /** Asks for the model's name if none is given. Throws UPSTREAM_FAILED or UPSTREAM_TIMEOUT, and CONFIG_INVALID for an invalid URL. */
  static async open(options: TargetOptions, signal: AbortSignal): Promise<Target> {
    const url = baseUrl(options.url, '--url');
    const agent = new Agent({
      connect: { timeout: CONNECT_TIMEOUT_MS, ...EVERY_ADDRESS },
      connections: null, // as many as there are requests in flight
      pipelining: 1,
      headersTimeout: 0, // each request has its own deadline
      bodyTimeout: 0,
      // Shorter than the 5 s after which Node's and vLLM's servers close an idle connection.
      keepAliveTimeout: 3_000,
      keepAliveMaxTimeout: 3_000,
    });
    const target = new Target(options, url, options.model ?? '', agent);
    if (options.model !== undefined) return target;
    try {
      return new Target(options, url, await target.#firstModel(signal), agent);
    } catch (error) {
      await agent.destroy();
      throw error;
    }
  }

  close(): Promise<void> {
    return this.#agent.destroy();
  }

  /** Resolves with the head of the answer; its body streams. */
  stream(request: PlannedRequest, signal: AbortSignal): Promise<Dispatcher.ResponseData> {
    return this.#post(this.url + PATHS[this.#options.endpoint], this.bodyOf(request), signal);
  }

  bodyOf({ prompt, outputTokens }: PlannedRequest): object {
    const { temperature, ignoreEos, extraBody } = this.#options;
    return {
      model: this.model,
      ...this.#promptFields(prompt),
      max_tokens: outputTokens,
      temperature,
      stream: true,
      stream_options: { include_usage: true },
      ...(ignoreEos && { ignore_eos: true }),
      ...extraBody,
    };
  }

  /** Tokens of a prompt as the endpoint would see it, special tokens and chat template included; undefined if there is no tokenizer. */
  async count(prompt: string, signal: AbortSignal): Promise<number | undefined> {
    const { what, answer } = await this.#tokenized(prompt, signal);
    if (answer.status === 404 || answer.status === 405 || answer.status === 501) return undefined;
    const count = fieldOf(answer.body, 'count');
    if (answer.status === 200 && typeof count === 'number') return count;
    throw failed(what, answer);
  }

  /** The same, the tokens themselves. Throws UPSTREAM_FAILED where there is no tokenizer. */
  async tokenize(prompt: string, signal: AbortSignal): Promise<readonly number[]> {
    const { what, answer } = await this.#tokenized(prompt, signal);
    const tokens = fieldOf(answer.body, 'tokens');
    if (answer.status === 200 && Array.isArray(tokens)) return tokens as readonly number[];
    throw failed(what, answer);
  }

  async #tokenized(prompt: string, signal: AbortSignal) {
    const what = `POST ${this.#tokenizeUrl}/tokenize`;
    const body = {
      ...(this.#tokenizeUrl === this.url && { model: this.model }),
      ...this.#promptFields(prompt),
      ...(this.#options.endpoint === 'chat' && { add_generation_prompt: true }),
    };
    const answer = await this.#ask(what, signal, (limit) =>
      this.#post(`${this.#tokenizeUrl}/tokenize`, body, limit),
    );
    return { what, answer };
  }

  /** Tokens of a prompt by the usage of an answer of one token; undefined if the server does not report it. */
  async countByAnswering(prompt: string, signal: AbortSignal): Promise<number | undefined> {
    const path = PATHS[this.#options.endpoint];
    const what = `POST ${this.url}${path}`;
    const { extraBody } = this.#options;
    const body = { model: this.model, ...this.#promptFields(prompt), max_tokens: 1, ...extraBody };
    const answer = await this.#ask(what, signal, (limit) => this.#post(this.url + path, body, limit));
    if (answer.status !== 200) throw failed(what, answer);
    const count = fieldOf(fieldOf(answer.body, 'usage'), 'prompt_tokens');
    return typeof count === 'number' ? count : undefined;
  }

  #promptFields(prompt: string | readonly number[]): object {
    return this.#options.endpoint === 'chat' ? { messages: [{ role: 'user', content: prompt }] } : { prompt };
  }

  async #firstModel(signal: AbortSignal): Promise<string> {
    const what = `GET ${this.url}/v1/models`;
    const answer = await this.#ask(what, signal, (limit) =>
      this.#agent.request({
        ...addressOf(`${this.url}/v1/models`),
        method: 'GET',
        headers: this.#headers(),
        signal: limit,
      }),
    );
    if (answer.status !== 200) throw failed(what, answer);
    const data = fieldOf(answer.body, 'data');
    const id = fieldOf(Array.isArray(data) ? data[0] : undefined, 'id');
    if (typeof id === 'string') return id;
    throw new PdError('MODEL_NOT_FOUND', `${what} lists no model; give one with --model`);
  }

  async #ask(
    what: string,
    signal: AbortSignal,
    ask: (signal: AbortSignal) => Promise<Dispatcher.ResponseData>,
  ): Promise<{ readonly status: number; readonly body: unknown }> {
    const deadline = AbortSignal.timeout(ASK_TIMEOUT_MS);
    try {
      const { statusCode, body } = await ask(AbortSignal.any([signal, deadline]));
      return { status: statusCode, body: await readJson(body) };
    } catch (cause) {
      if (signal.aborted) throw signal.reason;
      if (deadline.aborted)
        throw new PdError('UPSTREAM_TIMEOUT', `${what}: no answer within ${ASK_TIMEOUT_MS} ms`);
      throw new PdError('UPSTREAM_FAILED', `${what}: ${reasonOf(cause)}`, {}, { cause });
    }
  }

  #post(url: string, body: object, signal: AbortSignal): Promise<Dispatcher.ResponseData> {
    const headers = { ...this.#headers(), 'content-type': 'application/json' };
    return this.#agent.request({
      ...addressOf(url),
      method: 'POST',
      headers,
      body: JSON.stringify(body),
      signal,
    });
  }

  #headers(): Record<string, string> {
    const { apiKey } = this.#options;
    return apiKey === undefined ? {} : { authorization: `Bearer ${apiKey}` };
  }
}

/** The parsed body, or its text if it is not JSON. */
export async function readJson(body: Dispatcher.ResponseData['body']): Promise<unknown> {
  const chunks: Buffer[] = [];
  let size = 0;
  for await (const chunk of body as AsyncIterable<Buffer>) {
    size += chunk.length;
    if (size > MAX_ANSWER) throw new Error(`an answer of more than ${MAX_ANSWER} bytes`);
    chunks.push(chunk);
  }
  const text = Buffer.concat(chunks).toString();
  try {
    return JSON.parse(text);
  } catch {
    return text;
  }
}

function baseUrl(text: string, flag: string): string {
  const url = URL.canParse(text) ? new URL(text) : undefined;
  if (!url || !/^https?:$/.test(url.protocol) || url.search !== '' || url.hash !== '') {
    const given = JSON.stringify(text);
    throw new PdError('CONFIG_INVALID', `${flag}: ${given} is not a URL such as http://localhost:10002`);
  }
  return (url.origin + url.pathname).replace(/\/+$/, '').replace(/\/v1$/, '');
}

function addressOf(url: string): { readonly origin: string; readonly path: string } {
  const { origin, pathname } = new URL(url);
  return { origin, path: pathname };
}

function failed(what: string, { status, body }: { status: number; body: unknown }): PdError {
  return new PdError('UPSTREAM_FAILED', `${what}: HTTP ${status}: ${serverError(body).message}`);
}
