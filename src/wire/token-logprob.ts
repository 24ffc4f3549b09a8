/** What a model says of one token: the scheduler reports it, and a producer tells it of the first token. */
export interface TokenLogprob {
  readonly token: number;
  readonly logprob: number;
  /** How many tokens are at least as likely, itself among them: 1 for the likeliest. Of tokens of a prompt alone. */
  readonly rank?: number;
  /** The most likely first, the sampled one not necessarily among them. */
  readonly top: readonly { readonly token: number; readonly logprob: number }[];
}
