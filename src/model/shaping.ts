/**
 * What is done to a row's logits before a token is drawn from them, in the order of vLLM's documentation: allowed tokens and the
 * grammar's mask, bad words, `min_tokens`, biases, then penalties (repetition, frequency, presence). Pure; both executors do what it says.
 */
import { PdError } from '../errors.ts';
import { penalizes, type SampleSpec, type SamplingParams, type TokenHistory } from '../scheduler/types.ts';

export interface Shaping {
  /** A bit per token, the lowest of the first word is token 0's; tokens without one, or beyond its end, are banned. Absent: all may be. */
  readonly mask?: Uint32Array;
  /** What is added to the logits of these tokens, all of the vocabulary; -Infinity bans one. */
  readonly edits: ReadonlyMap<number, number>;
  readonly penalties?: Penalties;
}

/** As float32. */
export interface Penalties {
  readonly repetition: number;
  readonly frequency: number;
  readonly presence: number;
  readonly history: TokenHistory;
}

/** Whether anything but a grammar may change the logits. Cheap: asked for each row of each step. */
export function isShaped({ params, outputPosition }: SampleSpec): boolean {
  const { minTokens, stopTokenIds, logitBias = [], badWords = [], allowedTokenIds } = params;
  if (allowedTokenIds || logitBias.length > 0 || badWords.length > 0 || penalizes(params)) return true;
  return outputPosition < minTokens && stopTokenIds.length > 0;
}

/** `grammar`: the mask of this step, if its sequence is under a grammar. */
export function shapingOf(spec: SampleSpec, vocab: number, grammar?: Uint32Array): Shaping {
  const fixed = fixedOf(spec.params, vocab);
  const penalties = penaltiesOf(spec);
  const mask = bothMasks(fixed.mask, grammar);
  return {
    edits: editsOf(spec, fixed, vocab),
    ...(mask && { mask }),
    ...(penalties && { penalties }),
  };
}

/** For a request whose own fields ban every token. Of several that do so together, the one that is no grammar is named. */
export function nothingLeft(sequenceId: string, { params, outputPosition }: SampleSpec): PdError {
  const { allowedTokenIds, badWords = [], minTokens, stopTokenIds, grammar } = params;
  const fields = [
    ...(allowedTokenIds ? ['allowed_token_ids'] : []),
    ...(badWords.length > 0 ? ['bad_words'] : []),
    ...(outputPosition < minTokens && stopTokenIds.length > 0 ? ['min_tokens'] : []),
  ];
  const [param] = fields;
  const banning = [...fields, ...(grammar ? ['its grammar'] : [])];
  const by = banning.length > 0 ? banning.join(' and ') : 'its penalties';
  return new PdError(
    'REQUEST_INVALID',
    `${param ? `${param}: ` : ''}no token is left to go on with, as all are banned by what the request asks for (${by})`,
    { sequenceId, ...(param ? { param } : grammar && { grammar: true }) },
  );
}

function editsOf(
  { params, outputPosition, history }: SampleSpec,
  { biases, longestWord }: Fixed,
  vocab: number,
): ReadonlyMap<number, number> {
  const tail = outputTail(history, longestWord - 1);
  const words = (params.badWords ?? []).filter((word) => completes(word, tail));
  const stops = outputPosition < params.minTokens ? params.stopTokenIds : [];
  if (words.length + stops.length === 0) return biases;
  const edits = new Map(biases);
  for (const token of [...stops, ...words.map((word) => word.at(-1)!)]) {
    if (token < vocab) edits.set(token, Number.NEGATIVE_INFINITY);
  }
  return edits;
}

/** The last tokens of the output, `most` at most. */
function outputTail(history: TokenHistory | undefined, most: number): Int32Array {
  if (!history || most <= 0) return new Int32Array();
  const { length, promptLength } = history;
  return history.tokens(Math.max(promptLength, length - most), length);
}

/** Whether the output ends in all of `word` but its last token. */
function completes(word: readonly number[], tail: Int32Array): boolean {
  const from = tail.length - (word.length - 1);
  return from >= 0 && tail.subarray(from).every((token, i) => token === word[i]);
}

function penaltiesOf({ params, history }: SampleSpec): Penalties | undefined {
  const { repetitionPenalty = 1, frequencyPenalty = 0, presencePenalty = 0 } = params;
  if (!history || !penalizes(params)) return undefined;
  return {
    repetition: Math.fround(repetitionPenalty),
    frequency: Math.fround(frequencyPenalty),
    presence: Math.fround(presencePenalty),
    history,
  };
}

interface Fixed {
  readonly mask: Uint32Array | undefined;
  readonly biases: ReadonlyMap<number, number>;
  /** Tokens of the longest bad word. */
  readonly longestWord: number;
}

/** Computed once per request, since its lists may be long. */
const fixedParts = new WeakMap<SamplingParams, Fixed>();

function fixedOf(params: SamplingParams, vocab: number): Fixed {
  const known = fixedParts.get(params);
  if (known) return known;
  const { allowedTokenIds, logitBias = [], badWords = [] } = params;
  const mask = allowedTokenIds && new Uint32Array(Math.ceil(vocab / 32));
  for (const token of allowedTokenIds ?? []) if (token < vocab) mask![token >>> 5]! |= 1 << (token & 31);
  const biases = new Map<number, number>();
  for (const [token, bias] of logitBias) if (token < vocab) biases.set(token, Math.fround(bias));
  const longestWord = badWords.reduce((most, { length }) => Math.max(most, length), 0);
  const fixed = { mask, biases, longestWord };
  fixedParts.set(params, fixed);
  return fixed;
}

function bothMasks(a: Uint32Array | undefined, b: Uint32Array | undefined): Uint32Array | undefined {
  if (!a || !b) return a ?? b;
  return a.map((word, i) => word & (b[i] ?? 0));
}

/** The logits as `shaping` leaves them; `logits` stay as they are. In float32, one rounding an operation, as the GPU does it. */
export function shaped(logits: Float32Array, { mask, edits, penalties }: Shaping): Float32Array {
  const out = logits.slice();
  if (mask) {
    for (let i = 0; i < out.length; i++) {
      if ((((mask[i >>> 5] ?? 0) >>> (i & 31)) & 1) === 0) out[i] = Number.NEGATIVE_INFINITY;
    }
  }
  for (const [token, bias] of edits) out[token]! += bias;
  if (!penalties) return out;
  const { repetition, frequency, presence, history } = penalties;
  for (const [token, count] of countsOf(history)) {
    const logit = out[token]!;
    out[token] = logit > 0 ? logit / repetition : logit * repetition;
    if (count === 0) continue;
    out[token]! -= frequency * count;
    out[token]! -= presence;
  }
  return out;
}

/** How often the output has each token of prompt and output. */
function countsOf(history: TokenHistory): Map<number, number> {
  const counts = new Map<number, number>();
  history.tokens(0, history.length).forEach((token, i) => {
    counts.set(token, (counts.get(token) ?? 0) + (i < history.promptLength ? 0 : 1));
  });
  return counts;
}
