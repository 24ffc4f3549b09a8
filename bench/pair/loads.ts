/** The requests for both the pair and the undivided worker: random prompts of token ids, the same in every run. Pure. */
import { uniform } from '../../src/model/random.ts';

export interface LoadRequest {
  readonly prompt: readonly number[];
  readonly maxTokens: number;
  /** 0 is greedy. */
  readonly temperature: number;
  readonly seed: number;
}

/** What a load is meant to cause, besides answers, as shown by the workers' metrics. */
export type Effect = 'chunks' | 'prefix hits' | 'preemption';

export interface Load {
  readonly name: string;
  /** Requests in flight. */
  readonly width: number;
  readonly requests: readonly LoadRequest[];
  readonly effect?: Effect;
}

export interface LoadOptions {
  /** Prompts have ids below this. */
  readonly vocab: number;
  /** Otherwise all are greedy: a different order of summation then changes a token only if two are about equally likely. */
  readonly sampled: boolean;
  readonly small: boolean;
  /** Length of answers when blocks are meant to run out. A small model needs longer ones, or each ends before the next begins. */
  readonly growTo: number;
}

/** Limits of the workers for these loads: enough blocks for 32 short sequences at once, too few for what those grow to. */
export interface LoadLimits {
  readonly maxModelLen: number;
  readonly numBlocks: number;
  readonly maxNumSeqs: number;
  /** Prompts of `chunks` are longer. */
  readonly maxNumBatchedTokens: number;
}

export const BLOCK_SIZE = 16;
const FULL: LoadLimits = { maxModelLen: 1_664, numBlocks: 240, maxNumSeqs: 32, maxNumBatchedTokens: 512 };
const SMALL: LoadLimits = { maxModelLen: 256, numBlocks: 16, maxNumSeqs: 4, maxNumBatchedTokens: 96 };

export function limitsOf(small: boolean): LoadLimits {
  return small ? SMALL : FULL;
}

/** Smallest and largest value, both included. */
type Range = readonly [number, number];

export function makeLoads({ vocab, sampled, small, growTo }: LoadOptions): readonly Load[] {
  const { maxNumSeqs: batch, maxNumBatchedTokens } = limitsOf(small);
  let made = 0;
  const ids = (count: number): number[] => {
    const stream = made++;
    return Array.from({ length: count }, (_, at) => Math.floor(uniform(1, stream, at) * vocab));
  };
  const between = ([from, to]: Range, index: number) =>
    from + Math.floor(uniform(2, made, index) * (to - from + 1));
  const requests = (count: number, prompt: Range, output: Range, prefix: readonly number[] = []) =>
    Array.from({ length: count }, (_, index): LoadRequest => {
      const maxTokens = between(output, 2 * index);
      const temperature = sampled && index % 2 === 1 ? 0.8 : 0;
      return {
        prompt: [...prefix, ...ids(between(prompt, 2 * index + 1))],
        maxTokens,
        temperature,
        seed: index,
      };
    });
  const [short, long] = small ? [2 * BLOCK_SIZE, 2 * maxNumBatchedTokens] : [6 * BLOCK_SIZE, 1_500];
  const shared = requests(
    small ? 4 : 16,
    [1, 40],
    [4, 16],
    ids(small ? 3 * BLOCK_SIZE : 20 * BLOCK_SIZE + 5),
  );
  return [
    {
      name: 'mixed',
      width: small ? 4 : 16,
      requests: requests(small ? 10 : 200, [4, small ? 80 : 300], [2, 16]),
    },
    {
      name: `batches of ${batch}`,
      width: batch,
      requests: requests(2 * batch, [short / 2, short], [10, BLOCK_SIZE]),
    },
    {
      name: 'long prompts',
      width: small ? 1 : 4,
      requests: requests(small ? 2 : 8, [long / 2, long], [8, 16]),
      effect: 'chunks',
    },
    {
      name: 'shared beginnings',
      width: small ? 2 : 8,
      requests: [...shared, ...shared.slice(0, shared.length / 2)],
      effect: 'prefix hits',
    },
    {
      name: 'too few blocks',
      width: batch,
      requests: requests(batch, [short - 4, short], [growTo - 32, growTo]),
      effect: 'preemption',
    },
  ];
}

/** For times to first token: prompts that all differ. */
export function timedPrompt(vocab: number, tokens: number, index: number): number[] {
  return Array.from({ length: tokens }, (_, at) => Math.floor(uniform(3, index, at) * vocab));
}
