/** The log-probabilities of one token: the scheduler reports them, and a producer sends those of the first token. */
export interface TokenLogprob {
  readonly token: number;
  readonly logprob: number;
  /** How many tokens are at least as likely, including itself: 1 for the likeliest. Only for tokens of a prompt. */
  readonly rank?: number;
  /** Most likely first; the sampled token is not necessarily among them. */
  readonly top: readonly { readonly token: number; readonly logprob: number }[];
}
