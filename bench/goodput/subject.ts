/** A server under load: its target, and prompts of the length that is wanted. */
import { setMaxListeners } from 'node:events';
import { PdError } from '../../src/errors.ts';
import { uniform } from '../../src/model/random.ts';
import { runLoad, type Send } from '../serve/load.ts';
import { learnWords } from '../serve/plan.ts';
import { sendRequest } from '../serve/send.ts';
import { REAL_CLOCK } from '../serve/serve.ts';
import { Target, type TargetOptions } from '../serve/target.ts';
import { composeText, LEAD, type WordCosts } from '../serve/words.ts';

/** Prompts of the warm-up: none that a run sends. */
const WARM_UP_SEED = 7_777_777;
const WARM_UP = { requests: 12, width: 4, outputTokens: 32, timeoutMs: 60_000 };

export class Subject {
  readonly target: Target;
  readonly #costs: WordCosts;
  /** Lengths of prompts are by the server's tokenizer, else estimated. */
  readonly exact: boolean;

  private constructor(target: Target, costs: WordCosts, exact: boolean) {
    this.target = target;
    this.#costs = costs;
    this.exact = exact;
  }

  /** Throws what `Target.open` throws, and errors of the server that counts tokens. */
  static async open(options: TargetOptions, signal: AbortSignal): Promise<Subject> {
    const target = await Target.open(options, signal);
    try {
      const { costs, count } = await learnWords(target, signal);
      return new Subject(target, costs, count !== undefined);
    } catch (error) {
      await target.close();
      throw error;
    }
  }

  close(): Promise<void> {
    return this.target.close();
  }

  /** Of random words, the same for the same seed and index. */
  async prompt(tokens: number, seed: number, index: number): Promise<string> {
    const random = (position: number) => uniform(seed, index, position);
    const { text } = await composeText(this.#costs, tokens, random, [LEAD]);
    return text;
  }

  /** `timeoutMs`: of a whole answer. */
  sender(timeoutMs: number): Send {
    const options = { target: this.target, endpoint: 'completions', timeoutMs, clock: REAL_CLOCK } as const;
    return (request, startMs, signal) => sendRequest(options, request, startMs, signal);
  }

  /** Lets a server open, compile and capture what it does at first use. Throws UPSTREAM_FAILED where nothing is answered. */
  async warmUp(promptTokens: number, signal: AbortSignal): Promise<void> {
    const { requests: count, width, outputTokens, timeoutMs } = WARM_UP;
    setMaxListeners(0, signal);
    const requests = await Promise.all(
      Array.from({ length: count }, async (_, index) => ({
        index,
        prompt: await this.prompt(promptTokens, WARM_UP_SEED, index),
        outputTokens,
      })),
    );
    const { records } = await runLoad({
      requests,
      arrival: { kind: 'concurrency', width },
      seed: 0,
      send: this.sender(timeoutMs),
      clock: REAL_CLOCK,
      signal,
    });
    if (records.some(({ outcome }) => outcome === 'done')) return;
    signal.throwIfAborted();
    const { code, message } = records[0]!.failure!;
    throw new PdError('UPSTREAM_FAILED', `none of ${count} warm-up requests succeeded: ${code}: ${message}`);
  }
}
