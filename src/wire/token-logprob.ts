/** What a model says of one token: the scheduler reports it, and a producer tells it of the first token. */
export interface TokenLogprob {
  readonly token: number;
  readonly logprob: number;
  /** The most likely first, the sampled one not necessarily among them. */
  readonly top: readonly { readonly token: number; readonly logprob: number }[];
}
