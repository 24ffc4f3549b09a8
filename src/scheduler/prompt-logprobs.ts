/** Log-probabilities of a whole prompt in a few arrays: as objects they would take the thread that hears of them seconds to receive. */
import type { TokenLogprob } from '../wire/token-logprob.ts';

/** One entry per prompt token from the second on. */
export interface PromptLogprobs {
  readonly tokens: Int32Array;
  readonly logprobs: Float64Array;
  /** 0 where unknown. */
  readonly ranks: Int32Array;
  /** Alternatives of each entry, [entries, alternatives] as rows. */
  readonly alternatives: number;
  readonly topTokens: Int32Array;
  readonly topLogprobs: Float64Array;
}

/** All entries have as many alternatives. */
export function packLogprobs(entries: readonly TokenLogprob[]): PromptLogprobs {
  const alternatives = entries[0]?.top.length ?? 0;
  const topTokens = new Int32Array(entries.length * alternatives);
  const topLogprobs = new Float64Array(entries.length * alternatives);
  entries.forEach(({ top }, i) => {
    top.forEach(({ token, logprob }, k) => {
      topTokens[i * alternatives + k] = token;
      topLogprobs[i * alternatives + k] = logprob;
    });
  });
  return {
    tokens: Int32Array.from(entries, ({ token }) => token),
    logprobs: Float64Array.from(entries, ({ logprob }) => logprob),
    ranks: Int32Array.from(entries, ({ rank = 0 }) => rank),
    alternatives,
    topTokens,
    topLogprobs,
  };
}

/** One after another: nobody needs all at once. */
export function* unpackLogprobs(packed: PromptLogprobs): Generator<TokenLogprob> {
  const { tokens, logprobs, ranks, alternatives, topTokens, topLogprobs } = packed;
  for (let i = 0; i < tokens.length; i++) {
    const top = Array.from({ length: alternatives }, (_, k) => ({
      token: topTokens[i * alternatives + k]!,
      logprob: topLogprobs[i * alternatives + k]!,
    }));
    const rank = ranks[i]!;
    yield { token: tokens[i]!, logprob: logprobs[i]!, ...(rank > 0 && { rank }), top };
  }
}
