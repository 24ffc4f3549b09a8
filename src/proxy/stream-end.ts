/** How a stream ends that has broken off, by the API it belongs to. Pure. */
import type { PdError } from '../errors.ts';
import { eventText, failedResponse, type OpenAiError, openAiError } from '../openai-error.ts';

type Failure = Pick<OpenAiError['error'], 'message' | 'code' | 'param'>;

/** Of one stream, which may come from one instance and, before its first event, go on with another. */
export interface StreamEnd {
  /** What has gone to the client, in order: events, but that a long one may come in parts. */
  passed(bytes: Buffer): void;
  /** The last events where the proxy ends it. */
  failed(error: PdError): string;
  /** Likewise where nothing has passed and an instance has answered with an error: `body` is its answer. */
  refused(body: Buffer): string;
}

export function streamEnd(route: string): StreamEnd {
  return route === '/v1/responses' ? new ResponseEnd() : CHOICES_END;
}

const DONE = eventText('[DONE]');

/** Of completions and chats. */
const CHOICES_END: StreamEnd = {
  passed() {},
  failed: (error) => eventText(JSON.stringify(openAiError(error))) + DONE,
  refused: (body) => eventText(body.toString('utf8').replace(/\s*\n\s*/g, ' ')) + DONE,
};

/** Of what has passed, while a stream is under way. Bytes: a client's body is held as long, and its answer repeats little more than that. */
const MOST_KEPT = 2 ** 20;

const CREATED = 'event: response.created';
const ITEM_DONE = 'event: response.output_item.done';
const NOTHING = Buffer.alloc(0);

/**
 * It ends with the response as it has failed: so the event that it began with is kept, and those of its items that are done. Where they are
 * too long, or not what they should be, its error alone ends it.
 */
class ResponseEnd implements StreamEnd {
  /** Events that have passed: they are numbered from 0. */
  #count = 0;
  /** Of one that has passed in part. */
  #open: Buffer = NOTHING;
  /** Undefined: too long. */
  #kept: string[] | undefined = [];
  #keptBytes = 0;

  passed(bytes: Buffer): void {
    let rest = this.#open.length > 0 ? Buffer.concat([this.#open, bytes]) : bytes;
    for (let end = endOfEvent(rest); end > 0; end = endOfEvent(rest)) {
      this.#event(rest.subarray(0, end));
      rest = rest.subarray(end);
    }
    if (rest.length > MOST_KEPT) {
      this.#kept = undefined;
      rest = Buffer.from(rest.subarray(-SEPARATOR)); // its end will be seen by that
    }
    this.#open = rest.length > 0 ? rest : NOTHING;
  }

  failed(error: PdError): string {
    return this.#ending(openAiError(error).error);
  }

  refused(body: Buffer): string {
    return this.#ending(failureIn(body));
  }

  #event(bytes: Buffer): void {
    const name = this.#count++ === 0 ? CREATED : ITEM_DONE;
    if (bytes.toString('latin1', 0, name.length) !== name) return;
    this.#keptBytes += bytes.length;
    if (this.#keptBytes > MOST_KEPT) this.#kept = undefined;
    this.#kept?.push(bytes.toString('utf8'));
  }

  #ending(failure: Failure): string {
    const inPart = this.#open.length > 0;
    // Which has its number, and is ended.
    const events = failedResponse(failure, this.#count + (inPart ? 1 : 0), this.#response());
    return `${inPart ? '\n\n' : ''}${events.map(({ name, data }) => eventText(JSON.stringify(data), name)).join('')}`;
  }

  #response(): object | undefined {
    const [created, ...done] = this.#kept ?? [];
    const response = created?.startsWith(CREATED) ? fieldOf(created, 'response') : undefined;
    const output = done.map((event) => fieldOf(event, 'item'));
    return response && !output.includes(undefined) ? { ...response, output } : undefined;
  }
}

/** Bytes of the longest separator, but one. */
const SEPARATOR = 3;

const CR = 0x0d;
const LF = 0x0a;

/** Where the first event ends, behind an empty line; 0: not yet. */
function endOfEvent(bytes: Buffer): number {
  for (let at = bytes.indexOf(LF); at >= 0; at = bytes.indexOf(LF, at + 1)) {
    if (bytes[at + 1] === LF) return at + 2;
    if (bytes[at + 1] === CR && bytes[at + 2] === LF) return at + 3;
  }
  return 0;
}

/** An object in the data of an event. */
function fieldOf(event: string, name: string): object | undefined {
  const data = /^data: ?(.*)$/m.exec(event)?.[1];
  const value = objectIn(data ?? '')?.[name];
  return typeof value === 'object' && value !== null ? value : undefined;
}

function objectIn(json: string): Readonly<Record<string, unknown>> | undefined {
  try {
    const value: unknown = JSON.parse(json);
    return typeof value === 'object' && value !== null ? (value as Record<string, unknown>) : undefined;
  } catch {
    return undefined;
  }
}

/** As servers answer: OpenAI's form, or that of older vLLM, which has its fields outside. */
function failureIn(body: Buffer): Failure {
  const text = body.toString('utf8');
  const answer = objectIn(text);
  const inner = answer?.['error'];
  const told = typeof inner === 'object' && inner !== null ? (inner as Record<string, unknown>) : answer;
  const { message = text.slice(0, 1_000), code, param } = told ?? {};
  return {
    message: String(message),
    code: String(code ?? 'UPSTREAM_FAILED'),
    param: typeof param === 'string' ? param : null,
  };
}
