/** One prompt of the demo: its answers through the proxy and from an undivided worker, and what the consumer's metrics say about it. */

import { type KvShape, kvBlockBytes } from '../support/kv-shape.ts';
import { type Addresses, metricsOf } from '../support/serving.ts';

export interface Prompt {
  readonly prompt: string;
  readonly maxTokens: number;
}

/** The runbook's. */
export const PROMPTS: readonly Prompt[] = [
  { prompt: 'Hello world', maxTokens: 10 },
  { prompt: 'What is the capital of France?', maxTokens: 8 },
  {
    prompt: 'def fibonacci(n):\n    if n <= 1:\n        return n\n    else:\n        return',
    maxTokens: 12,
  },
  {
    prompt: 'Once upon a time in a magical forest, there lived a wise old dragon who',
    maxTokens: 20,
  },
];

export interface PromptResult {
  readonly text: string;
  readonly firstTokenMs: number;
  readonly bytesMoved: number;
  readonly moveMs: number;
  /** Empty if it passed. */
  readonly problems: readonly string[];
}

const DEADLINE_MS = 60_000;

/** Without `undividedUrl` the text is not compared; the consumer's metrics still show whether KV moved. */
export async function runPrompt(
  { prompt, maxTokens }: Prompt,
  model: string,
  system: Addresses,
  undividedUrl: string | undefined,
  shape: KvShape,
): Promise<PromptResult> {
  const consumer = system.consumers[0]!;
  const producer = system.producers[0]!;
  const request = { model, prompt, max_tokens: maxTokens, temperature: 0 };
  const before = await metricsOf(consumer.url);
  const answer = await complete(system.proxy.url, request);
  const after = await metricsOf(consumer.url);
  const undivided = undividedUrl === undefined ? answer : await complete(undividedUrl, request);
  const rise = (name: string) => (after.get(name) ?? Number.NaN) - (before.get(name) ?? Number.NaN);

  const blocks = Math.ceil(answer.promptTokens / shape.blockSize);
  const expected: readonly (readonly [string, number])[] = [
    ['pd_kv_loads_total{result="ok"}', 1],
    ['pd_kv_loads_total{result="recomputed"}', 0],
    ['pd_kv_loads_total{result="failed"}', 0],
    ['pd_kv_received_bytes_total', blocks * kvBlockBytes(shape)],
  ];
  const problems = expected
    .filter(([name, value]) => rise(name) !== value)
    .map(([name, value]) => `${name} of ${consumer.name} rose by ${rise(name)}, not ${value}`);
  const [computed, loaded] = ['computed', 'loaded'].map((from) =>
    rise(`pd_prompt_tokens_total{source="${from}"}`),
  ) as [number, number];
  // By the native hand-over the first token comes along; by the frozen wire the last position is computed.
  if (!(computed <= 1 && computed + loaded === answer.promptTokens)) {
    problems.push(`${consumer.name} computed ${computed} prompt tokens and loaded ${loaded}`);
  }
  if (answer.text === '') problems.push('the completion is empty');
  if (answer.text !== undivided.text) {
    problems.push(`the undivided worker says ${JSON.stringify(undivided.text)}`);
  }
  for (const address of [producer.kv, consumer.kv]) {
    if (!answer.id.includes(address)) problems.push(`the response id ${answer.id} does not carry ${address}`);
  }
  return {
    text: answer.text,
    firstTokenMs: answer.firstTokenMs,
    bytesMoved: rise('pd_kv_received_bytes_total'),
    moveMs: rise('pd_transfer_seconds_sum') * 1_000,
    problems,
  };
}

interface Streamed {
  readonly id: string;
  readonly text: string;
  readonly promptTokens: number;
  readonly firstTokenMs: number;
}

interface Chunk {
  readonly id?: string;
  readonly choices?: readonly { readonly text: string }[];
  readonly usage?: { readonly prompt_tokens: number } | null;
  readonly error?: { readonly message: string };
}

/** One streamed completion. Throws the server's error. */
async function complete(url: string, request: object): Promise<Streamed> {
  const started = performance.now();
  const response = await fetch(`${url}/v1/completions`, {
    method: 'POST',
    headers: { 'content-type': 'application/json' },
    body: JSON.stringify({ ...request, stream: true, stream_options: { include_usage: true } }),
    signal: AbortSignal.timeout(DEADLINE_MS),
  });
  if (!response.ok || !response.body) {
    throw new Error(`${url} answers ${response.status}: ${await response.text()}`);
  }
  let id = '';
  let text = '';
  let promptTokens = 0;
  let firstTokenMs = Number.NaN;
  for await (const event of events(response.body)) {
    if (event.error) throw new Error(`${url}: ${event.error.message}`);
    id = event.id ?? id;
    promptTokens = event.usage?.prompt_tokens ?? promptTokens;
    for (const choice of event.choices ?? []) {
      if (Number.isNaN(firstTokenMs)) firstTokenMs = performance.now() - started;
      text += choice.text;
    }
  }
  return { id, text, promptTokens, firstTokenMs };
}

async function* events(body: ReadableStream<Uint8Array>): AsyncGenerator<Chunk> {
  let held = '';
  const decoder = new TextDecoder();
  for await (const bytes of body) {
    const parts = (held + decoder.decode(bytes, { stream: true })).split('\n\n');
    held = parts.pop() ?? '';
    for (const part of parts) {
      const data = part.replace(/^data: /, '');
      if (data !== '[DONE]') yield JSON.parse(data) as Chunk;
    }
  }
}
