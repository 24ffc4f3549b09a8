/** A repeatable mix of requests, and how a client runs them. */
import { setTimeout as sleep } from 'node:timers/promises';

export interface Completion {
  readonly status: number;
  readonly text: string;
  readonly finishReason: string | null;
  readonly id: string;
  readonly promptTokens: number;
  readonly completionTokens: number;
  /** Present where the answer, or an event in the stream, was an error. */
  readonly error?: { readonly message: string; readonly code: string };
}

export interface CompletionRequest {
  readonly prompt: string;
  readonly max_tokens: number;
  readonly stream: boolean;
  readonly seed: number;
  readonly temperature: number;
}

/** Which the bundled model answers with Paris. */
export const CAPITAL: CompletionRequest = {
  prompt: 'What is the capital of France?',
  max_tokens: 8,
  stream: false,
  seed: 0,
  temperature: 0,
};

/** Small deterministic generator (mulberry32): a failing mix can be run again. */
function randomNumbers(seed: number): () => number {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let x = Math.imul(state ^ (state >>> 15), state | 1);
    x ^= x + Math.imul(x ^ (x >>> 7), x | 61);
    return ((x ^ (x >>> 14)) >>> 0) / 2 ** 32;
  };
}

const WORDS =
  'the dragon of an old forest asked what a capital is and why rivers run to France while stars return to number seven'.split(
    ' ',
  );

/** `count` requests of 4 to about 150 words, each unlike the others from its first words on, so that no prefix is shared. */
export function mixedRequests(count: number, seed: number): CompletionRequest[] {
  const random = randomNumbers(seed);
  return Array.from({ length: count }, (_, i) => {
    const words = 4 + Math.floor(random() ** 2 * 146);
    const text = Array.from({ length: words }, () => WORDS[Math.floor(random() * WORDS.length)]).join(' ');
    return {
      prompt: `${i} ${text}`,
      max_tokens: 2 + Math.floor(random() * 14),
      stream: random() < 0.5,
      seed: i,
      temperature: random() < 0.5 ? 0 : 0.8,
    };
  });
}

/** One completion, streamed or not, as a client sees it. Throws only when nothing at all can be read. */
export async function complete(
  url: string,
  request: CompletionRequest,
  timeoutMs = 90_000,
): Promise<Completion> {
  const response = await fetch(`${url}/v1/completions`, {
    method: 'POST',
    headers: { 'content-type': 'application/json' },
    body: JSON.stringify({
      ...request,
      model: 'demo',
      ...(request.stream ? { stream_options: { include_usage: true } } : {}),
    }),
    signal: AbortSignal.timeout(timeoutMs),
  });
  const body = await response.text();
  const events: Record<string, unknown>[] =
    request.stream && response.ok
      ? body
          .split('\n\n')
          .filter((event) => event.startsWith('data: ') && event !== 'data: [DONE]')
          .map((event) => JSON.parse(event.slice(6)) as Record<string, unknown>)
      : [JSON.parse(body) as Record<string, unknown>];
  let text = '';
  let finishReason: string | null = null;
  let id = response.headers.get('x-request-id') ?? '';
  let usage = { prompt_tokens: 0, completion_tokens: 0 };
  let error: Completion['error'];
  for (const event of events) {
    if (event['error']) error = event['error'] as NonNullable<Completion['error']>;
    if (typeof event['id'] === 'string') id = event['id'];
    const choices = (event['choices'] ?? []) as { text: string; finish_reason: string | null }[];
    for (const choice of choices) {
      text += choice.text;
      finishReason = choice.finish_reason ?? finishReason;
    }
    if (event['usage']) usage = event['usage'] as typeof usage;
  }
  return {
    status: response.status,
    text,
    finishReason,
    id,
    promptTokens: usage.prompt_tokens,
    completionTokens: usage.completion_tokens,
    ...(error ? { error } : {}),
  };
}

/** Polls `condition` until it returns true; throws with `what` at the deadline. For states that announce themselves nowhere. */
export async function eventually(
  what: string,
  timeoutMs: number,
  condition: () => Promise<boolean>,
): Promise<void> {
  const deadline = performance.now() + timeoutMs;
  while (!(await condition())) {
    if (performance.now() > deadline) throw new Error(`not within ${timeoutMs} ms: ${what}`);
    await sleep(20);
  }
}
