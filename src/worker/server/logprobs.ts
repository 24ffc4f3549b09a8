/** Log-probabilities in the two forms of OpenAI's API. */
import type { TextModel } from '../../model/tokenizer.ts';
import { unpackLogprobs } from '../../scheduler/prompt-logprobs.ts';
import type { TokenLogprob } from '../../wire/token-logprob.ts';
import type { ChoiceEvent, ChoiceLogprob } from './choice.ts';
import type { SamplingBody } from './fields.ts';
import { turns } from './turns.ts';

/** JSON knows no -Infinity, and clients take exp() of it. */
const LEAST = -9999;
const finite = (logprob: number): number => Math.max(logprob, LEAST);

/** A token on its own as text; one that is part of a character as `bytes:\xe2\x80`, as OpenAI writes it. */
function tokenText(model: TextModel, token: number): string {
  const text = model.tokenString(token);
  if (!text.includes('\ufffd')) return text;
  const bytes = model.tokenBytes(token);
  if (!bytes) return text;
  return `bytes:${Array.from(bytes, (byte) => `\\x${byte.toString(16).padStart(2, '0')}`).join('')}`;
}

/** Under `return_tokens_as_token_ids`, as vLLM writes it: no two tokens share it. */
function idText(_model: TextModel, token: number): string {
  return `token_id:${token}`;
}

export interface CompletionLogprobs {
  tokens: string[];
  /** Null for the first prompt token, which nothing predicts. */
  token_logprobs: (number | null)[];
  top_logprobs: (Record<string, number> | null)[];
  text_offset: number[];
}

/** For /v1/completions. `first`: a prompt token before the entries that has no log-probability of its own. */
export async function completionLogprobs(
  model: TextModel,
  entries: Iterable<ChoiceLogprob>,
  top: number,
  first?: { readonly token: number },
  asIds = false,
): Promise<CompletionLogprobs> {
  const nameOf = asIds ? idText : tokenText;
  const result: CompletionLogprobs = { tokens: [], token_logprobs: [], top_logprobs: [], text_offset: [] };
  if (first) {
    result.tokens.push(nameOf(model, first.token));
    result.token_logprobs.push(null);
    result.top_logprobs.push(null);
    result.text_offset.push(0);
  }
  const turn = turns();
  for (const { logprob, offset } of entries) {
    await turn();
    const text = nameOf(model, logprob.token);
    result.tokens.push(text);
    result.token_logprobs.push(finite(logprob.logprob));
    result.top_logprobs.push(top === 0 ? null : topOf(model, logprob, text, top, nameOf));
    result.text_offset.push(offset);
  }
  return result;
}

/** The `top` most likely and the sampled one, by text; of two tokens with one text the likelier stands. */
function topOf(
  model: TextModel,
  entry: TokenLogprob,
  text: string,
  top: number,
  nameOf: typeof tokenText,
): Record<string, number> {
  const byText: Record<string, number> = {};
  for (const { token, logprob } of entry.top.slice(0, top)) {
    byText[nameOf(model, token)] ??= finite(logprob);
  }
  byText[text] ??= finite(entry.logprob);
  return byText;
}

interface ChatToken {
  readonly token: string;
  readonly logprob: number;
  readonly bytes: readonly number[];
}

export interface ChatLogprobs {
  readonly content: readonly (ChatToken & { readonly top_logprobs: readonly ChatToken[] })[];
  readonly refusal: null;
}

/** For /v1/chat/completions. */
export async function chatLogprobs(
  model: TextModel,
  entries: readonly ChoiceLogprob[],
  top: number,
  asIds = false,
): Promise<ChatLogprobs> {
  const chatToken = (token: number, logprob: number): ChatToken => {
    const text = model.tokenString(token);
    const bytes = model.tokenBytes(token) ?? new TextEncoder().encode(text);
    return { token: asIds ? idText(model, token) : text, logprob: finite(logprob), bytes: [...bytes] };
  };
  const content: ChatLogprobs['content'][number][] = [];
  const turn = turns();
  for (const { logprob } of entries) {
    await turn();
    content.push({
      ...chatToken(logprob.token, logprob.logprob),
      top_logprobs: logprob.top.slice(0, top).map((entry) => chatToken(entry.token, entry.logprob)),
    });
  }
  return { content, refusal: null };
}

interface PromptLogprob {
  readonly logprob: number;
  readonly rank: number;
  readonly decoded_token: string;
}

/** The field that `prompt_logprobs` adds, as vLLM writes it: for each prompt token the likeliest ones and itself, by id; null for the first. */
export async function promptLogprobsOf(
  model: TextModel,
  { prompt_logprobs: count }: Pick<SamplingBody, 'prompt_logprobs'>,
  start: ChoiceEvent['start'],
): Promise<{ readonly prompt_logprobs?: readonly (Record<string, PromptLogprob> | null)[] }> {
  if (count === undefined || !start) return {};
  const entries: (Record<string, PromptLogprob> | null)[] = [null];
  const turn = turns();
  for (const { token, logprob, rank = 0, top } of start.promptLogprobs
    ? unpackLogprobs(start.promptLogprobs)
    : []) {
    await turn();
    const about = (id: number, of: number, place: number): PromptLogprob => ({
      logprob: finite(of),
      rank: place,
      decoded_token: model.tokenString(id),
    });
    const likeliest = top
      .slice(0, count)
      .map((other, i) => [other.token, about(other.token, other.logprob, i + 1)]);
    entries.push({ [token]: about(token, logprob, rank), ...Object.fromEntries(likeliest) });
  }
  return { prompt_logprobs: entries };
}
