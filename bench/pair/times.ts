/** Times to first token of an undivided worker and a pair, in turn, with the same prompts. */
import { median } from '../measure/statistics.ts';
import type { Client } from './client.ts';
import { timedPrompt } from './loads.ts';

export interface FirstTokenTimes {
  readonly sendType: string;
  readonly promptTokens: number;
  readonly rounds: number;
  /** Medians, milliseconds. */
  readonly undividedMs: number;
  readonly pairMs: number;
  /** Time from one token of the undivided worker to the next: a decode step as a client sees it. */
  readonly stepMs: number;
  readonly pairStepMs: number;
}

export interface TimesOptions {
  readonly sendType: string;
  readonly vocab: number;
  readonly promptTokens: number;
  /** Rounds that do not count: they open pairs and give Node time to compile, as in a worker that has served for a while. */
  readonly warmUp: number;
  readonly rounds: number;
  /** Index of the first of `warmUp + rounds` prompts, none of which the undivided worker may have seen. */
  readonly firstPrompt: number;
  readonly undivided: Client;
  readonly pair: Client;
}

const OUTPUT_TOKENS = 24;

export async function timeFirstTokens(options: TimesOptions): Promise<FirstTokenTimes> {
  const { sendType, vocab, promptTokens, warmUp, rounds, firstPrompt, undivided, pair } = options;
  const first: Record<'undivided' | 'pair', number[]> = { undivided: [], pair: [] };
  const steps: Record<'undivided' | 'pair', number[]> = { undivided: [], pair: [] };
  for (let round = -warmUp; round < rounds; round++) {
    const prompt = timedPrompt(vocab, promptTokens, firstPrompt + warmUp + round);
    for (const [name, client] of [
      ['undivided', undivided],
      ['pair', pair],
    ] as const) {
      const { firstMs, stepMs } = await client.timed(prompt, OUTPUT_TOKENS);
      if (round < 0) continue;
      first[name].push(firstMs);
      steps[name].push(stepMs);
    }
  }
  return {
    sendType,
    promptTokens,
    rounds,
    undividedMs: median(first.undivided),
    pairMs: median(first.pair),
    stepMs: median(steps.undivided),
    pairStepMs: median(steps.pair),
  };
}

/** How much longer a pair may take at 2,048 tokens, in addition to one decode step. */
export const EXTRA_MS = 10;

export function extraMs({ undividedMs, pairMs, stepMs }: FirstTokenTimes): number {
  return pairMs - undividedMs - stepMs;
}
