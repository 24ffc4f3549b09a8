/** The request that the producer gets: the same prompt, one token, nothing that only the answer needs. */

export type JsonObject = Readonly<Record<string, unknown>>;

/** Only the answer needs them, and with `max_tokens` 1 or without streaming servers reject some of them. */
const DROPPED = [
  'min_tokens',
  'logprobs',
  'top_logprobs',
  'prompt_logprobs',
  'return_token_ids',
  'return_tokens_as_token_ids',
  'stream_options',
] as const;

/** Set where present: what is absent has this value already, and unknown fields could be refused. */
const REPLACED = { max_completion_tokens: 1, stream: false, n: 1, best_of: 1, echo: false } as const;

/** Leaves `body` as it is. */
export function prefillCopy(body: JsonObject): JsonObject {
  const copy: Record<string, unknown> = { ...body, max_tokens: 1 };
  for (const field of DROPPED) delete copy[field];
  for (const [field, value] of Object.entries(REPLACED)) if (field in copy) copy[field] = value;
  return copy;
}
