/**
 * Texts of an exact number of tokens, for a tokenizer that can only be asked for counts. Tokenizers split at spaces first, so a word costs
 * the same wherever it stands; a final count of the whole text verifies this, and words of one token correct it.
 */

const WORDS = (
  'a I the of and to in is it was for on that by this with you not or be are from at as your all have new more an we can if my has ' +
  'time man year way day thing world life hand part child eye woman place work week case point government company number group problem ' +
  'fact river forest dragon city stone water light morning paper garden winter horse bread letter market window music silver'
).split(' ');

/** How many tokens our words take. */
export interface WordCosts {
  /** Tokens of a text besides those of its words: special tokens, a chat template. */
  readonly fixed: number;
  readonly words: readonly { readonly word: string; readonly tokens: number }[];
}

export type Count = (text: string) => Promise<number>;
/** In [0, 1), by position. */
export type Random = (position: number) => number;

/** Begins every text whose length is to be exact without a count: at a text's beginning another word may cost more or less. */
export const LEAD = 'the';
/** Counts per text before it is accepted as it is. */
const MAX_COUNTS = 12;

export async function measureWords(count: Count): Promise<WordCosts> {
  const lead = await count(LEAD);
  const words = await Promise.all(
    WORDS.map(async (word) => ({ word, tokens: (await count(`${LEAD} ${word}`)) - lead })),
  );
  const cost = words.find(({ word }) => word === LEAD)!.tokens;
  return { fixed: lead - cost, words: words.filter(({ tokens }) => tokens > 0) };
}

/** Without a tokenizer: the same for every word. Lengths of texts are then approximate. */
export function assumeWords(tokensPerWord: number): WordCosts {
  return { fixed: 0, words: WORDS.map((word) => ({ word, tokens: tokensPerWord })) };
}

/** All words, to find out how many tokens they take on average. */
export function sampleText(): { readonly text: string; readonly words: number } {
  return { text: WORDS.join(' '), words: WORDS.length };
}

/** Words, the same for the same random numbers, that cost `tokens`, or as few less as possible. At least one word. */
export function composeWords({ words }: WordCosts, tokens: number, random: Random): string[] {
  const picked: string[] = [];
  let left = tokens;
  const most = Math.max(...words.map((word) => word.tokens));
  while (left > 0 || picked.length === 0) {
    const fitting = left >= most ? words : words.filter((word) => word.tokens <= left + 0.5);
    if (fitting.length === 0 && picked.length > 0) break;
    const { word, tokens: cost } = pick(fitting.length > 0 ? fitting : words, random(picked.length));
    picked.push(word);
    left -= cost;
  }
  return picked;
}

/**
 * A text that begins with `prefix` and has `tokens` tokens in all according to `count`, or as close as this tokenizer permits. Without
 * `count`, according to the costs alone.
 */
export async function composeText(
  costs: WordCosts,
  tokens: number,
  random: Random,
  prefix: readonly string[] = [],
  count?: Count,
): Promise<{ readonly text: string; readonly tokens: number }> {
  const costOf = new Map(costs.words.map(({ word, tokens: cost }) => [word, cost]));
  const prefixCost = prefix.reduce((sum, word) => sum + (costOf.get(word) ?? 1), 0);
  const own = composeWords(costs, tokens - costs.fixed - prefixCost, random);
  const text = () => [...prefix, ...own].join(' ');
  if (!count) return { text: text(), tokens };
  const single = costs.words.filter((word) => word.tokens === 1);
  let best = { text: '', tokens: Number.NaN };
  for (let counts = 0; counts < MAX_COUNTS; counts++) {
    const counted = await count(text());
    if (!(Math.abs(best.tokens - tokens) <= Math.abs(counted - tokens)))
      best = { text: text(), tokens: counted };
    const missing = tokens - counted;
    if (missing === 0) break;
    const filler = single.length > 0 ? single : costs.words;
    for (let i = 0; i < missing; i++) own.push(pick(filler, random(own.length)).word);
    if (missing < 0) {
      if (own.length === 1) break;
      own.splice(Math.max(1, own.length + missing));
    }
  }
  return best;
}

function pick<T>(items: readonly T[], random: number): T {
  return items[Math.floor(random * items.length)]!;
}
