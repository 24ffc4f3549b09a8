/** The client of the checks: completions by token ids, and the times of streamed ones. */
import { monotonicMs } from '../measure/machine.ts';
import type { Generated, TopLogprobs } from './compare.ts';
import type { LoadRequest } from './loads.ts';

/** Deadline of one answer: longer than a busy worker takes, and than `--kv-load-timeout`, whose error says more. */
const ANSWER_MS = 90_000;
/** The maximum of the API. */
const TOP = 20;

interface Choice {
  readonly token_ids: readonly number[];
  readonly text: string;
  readonly logprobs?: { readonly top_logprobs: readonly Readonly<Record<string, number>>[] } | null;
}

export class Client {
  readonly url: string;
  readonly #model: string;

  private constructor(url: string, model: string) {
    this.url = url;
    this.#model = model;
  }

  static async connect(url: string): Promise<Client> {
    const response = await fetch(`${url}/v1/models`, { signal: AbortSignal.timeout(ANSWER_MS) });
    const { data } = (await response.json()) as { data: readonly { readonly id: string }[] };
    return new Client(url, data[0]!.id);
  }

  /** The tokens of the answer. Throws the server's error. */
  async tokens(request: LoadRequest): Promise<readonly number[]> {
    return (await this.#complete(request, {})).token_ids;
  }

  /** With log-probabilities of the likeliest tokens, most likely first. */
  async generate(request: LoadRequest): Promise<Generated> {
    const choice = await this.#complete(request, { logprobs: TOP, return_tokens_as_token_ids: true });
    const top = (choice.logprobs?.top_logprobs ?? []).map(
      (byName): TopLogprobs =>
        new Map(Object.entries(byName).map(([name, logprob]) => [tokenOf(name), logprob] as const)),
    );
    return { tokens: choice.token_ids, top };
  }

  /**
   * Milliseconds to the first event with text, and per token from there to the last (events may come several at a time). `sentAt`:
   * `monotonicMs`.
   */
  async timed(
    prompt: readonly number[],
    maxTokens: number,
  ): Promise<{ readonly sentAt: number; readonly firstMs: number; readonly stepMs: number }> {
    const body = this.#body({ prompt, maxTokens, temperature: 0, seed: 0 }, { stream: true });
    const sentAt = monotonicMs();
    const response = await this.#post(body);
    const times: number[] = [];
    const decoder = new TextDecoder();
    let held = '';
    for await (const bytes of response.body!) {
      const now = monotonicMs();
      const events = (held + decoder.decode(bytes, { stream: true })).split('\n\n');
      held = events.pop() ?? '';
      for (const event of events) {
        if (event.includes('"error"')) throw new Error(`${this.url}: ${event}`);
        if (event.includes('"choices":[{') && !event.includes('"text":""')) times.push(now - sentAt);
      }
    }
    const [firstMs, lastMs] = [times[0], times.at(-1)];
    if (firstMs === undefined || lastMs === undefined) throw new Error(`${this.url}: an answer without text`);
    return { sentAt, firstMs, stepMs: (lastMs - firstMs) / (maxTokens - 1) };
  }

  #body(request: LoadRequest, further: object): object {
    const { prompt, maxTokens, temperature, seed } = request;
    return {
      model: this.#model,
      prompt,
      max_tokens: maxTokens,
      ignore_eos: true,
      temperature,
      seed,
      ...further,
    };
  }

  async #complete(request: LoadRequest, further: object): Promise<Choice> {
    const response = await this.#post(this.#body(request, { return_token_ids: true, ...further }));
    const answer = (await response.json()) as { readonly choices: readonly Choice[] };
    return answer.choices[0]!;
  }

  async #post(body: object): Promise<Response> {
    const response = await fetch(`${this.url}/v1/completions`, {
      method: 'POST',
      headers: { 'content-type': 'application/json' },
      body: JSON.stringify(body),
      signal: AbortSignal.timeout(ANSWER_MS),
    });
    if (response.ok) return response;
    throw new Error(`${this.url} answers ${response.status}: ${(await response.text()).slice(0, 400)}`);
  }
}

/** `token_id:17` */
function tokenOf(name: string): number {
  return Number(name.slice(name.indexOf(':') + 1));
}
