/** The requests of a run, built before it begins: their texts, and the lengths of prompts and answers. */
import { readFileSync } from 'node:fs';
import { PdError } from '../../src/errors.ts';
import { uniform } from '../../src/model/random.ts';
import { inParallel } from '../measure/parallel.ts';
import { drawLength, type Length } from './lengths.ts';
import type { PlannedRequest } from './record.ts';
import type { Target } from './target.ts';
import {
  assumeWords,
  type Count,
  composeText,
  composeWords,
  measureWords,
  sampleText,
  type WordCosts,
} from './words.ts';

export interface PlanOptions {
  readonly numRequests: number;
  readonly warmUp: number;
  readonly promptTokens: Length;
  readonly outputTokens: Length;
  /** Tokens at the start of every prompt that are the same in all. */
  readonly sharedPrefix: number;
  readonly promptFile?: string | undefined;
  /** Of lengths. */
  readonly seed: number;
  /** Of the words. */
  readonly textSeed: number;
}

/** Where none is given. Far from where a sum with it would lose digits. */
export const newTextSeed = (): number => Math.floor(Math.random() * 2 ** 40);

export interface Plan {
  readonly warmUp: readonly PlannedRequest[];
  readonly requests: readonly PlannedRequest[];
  /** How the lengths of prompts were determined. */
  readonly sizedBy: 'file' | 'tokenizer' | 'estimate';
}

/** Texts counted at once. */
const WIDTH = 8;
/** For English in common tokenizers, if the server reports nothing. */
const USUAL_TOKENS_PER_WORD = 1.3;
/** Indices whose words are drawn separately from those of the run. */
const WARM_UP_INDEX = 1e9;
const PREFIX_INDEX = 2e9;

/** Throws CONFIG_INVALID for a prompt file that cannot be read, and errors of the server that counts tokens. */
export async function makePlan(
  options: PlanOptions,
  target: Target,
  signal: AbortSignal,
  onProgress: (done: number, total: number) => void,
): Promise<Plan> {
  const { numRequests, warmUp, promptFile, seed } = options;
  const outputTokens = (index: number) => drawLength(options.outputTokens, seed, 'output-length', index);
  if (promptFile !== undefined) {
    const prompts = readPrompts(promptFile);
    const planned = (index: number): PlannedRequest => {
      const prompt = prompts[index % prompts.length]!;
      return { index, prompt: prompt.text, outputTokens: prompt.outputTokens ?? outputTokens(index) };
    };
    return { warmUp: list(warmUp, planned), requests: list(numRequests, planned), sizedBy: 'file' };
  }

  const { costs, count } = await learnWords(target, signal);
  const { textSeed, sharedPrefix } = options;
  const wordsOf = (index: number) => (position: number) => uniform(textSeed, index, position);
  const prefix = sharedPrefix > 0 ? composeWords(costs, sharedPrefix, wordsOf(PREFIX_INDEX)) : [];
  const make = async (index: number): Promise<PlannedRequest> => {
    const wanted = drawLength(options.promptTokens, seed, 'prompt-length', index);
    const { text, tokens } = await composeText(costs, wanted, wordsOf(index), prefix, count);
    return { index, prompt: text, promptTokens: tokens, outputTokens: outputTokens(index) };
  };
  const indices = [...list(warmUp, (i) => WARM_UP_INDEX + i), ...list(numRequests, (i) => i)];
  let done = 0;
  const made = await inParallel(indices, WIDTH, async (index) => {
    const request = await make(index);
    onProgress(++done, indices.length);
    return request;
  });
  return {
    warmUp: made.slice(0, warmUp),
    requests: made.slice(warmUp),
    sizedBy: count ? 'tokenizer' : 'estimate',
  };
}

/** Without `count` where the server has no tokenizer: lengths are approximate then. Throws errors of the server. */
export async function learnWords(
  target: Target,
  signal: AbortSignal,
): Promise<{ readonly costs: WordCosts; readonly count?: Count }> {
  const sample = sampleText();
  if ((await target.count(sample.text, signal)) === undefined) {
    const tokens = await target.countByAnswering(sample.text, signal);
    return { costs: assumeWords(tokens === undefined ? USUAL_TOKENS_PER_WORD : tokens / sample.words) };
  }
  const count: Count = async (text) => {
    const tokens = await target.count(text, signal);
    if (tokens === undefined) throw new PdError('UPSTREAM_FAILED', 'the server no longer tokenizes');
    return tokens;
  };
  return { costs: await measureWords(count), count };
}

/** Lines of text, or, in a file named .jsonl, objects with `prompt` and optionally `output_tokens`. */
export function readPrompts(
  path: string,
): readonly { readonly text: string; readonly outputTokens?: number }[] {
  let lines: string[];
  try {
    lines = readFileSync(path, 'utf8').split(/\r?\n/);
  } catch (error) {
    throw new PdError('CONFIG_INVALID', `--prompt-file: cannot read ${path}: ${(error as Error).message}`);
  }
  const prompts = lines.flatMap((line, i) => {
    if (line.trim() === '') return [];
    if (!path.endsWith('.jsonl')) return [{ text: line }];
    return [readPrompt(line, `${path}, line ${i + 1}`)];
  });
  if (prompts.length === 0) throw new PdError('CONFIG_INVALID', `--prompt-file: ${path} contains no prompt`);
  return prompts;
}

function readPrompt(line: string, where: string): { readonly text: string; readonly outputTokens?: number } {
  const expected = 'expected {"prompt": "...", "output_tokens": 64}, the latter optional';
  let parsed: unknown;
  try {
    parsed = JSON.parse(line);
  } catch {
    throw new PdError('CONFIG_INVALID', `--prompt-file: ${where} is not JSON; ${expected}`);
  }
  const { prompt, output_tokens: tokens } = (parsed ?? {}) as Record<string, unknown>;
  const isCount = typeof tokens === 'number' && Number.isInteger(tokens) && tokens > 0;
  if (typeof prompt !== 'string' || prompt === '' || (tokens !== undefined && !isCount)) {
    throw new PdError('CONFIG_INVALID', `--prompt-file: ${where}: ${expected}`);
  }
  return { text: prompt, ...(isCount && { outputTokens: tokens }) };
}

function list<T>(length: number, make: (index: number) => T): T[] {
  return Array.from({ length }, (_, index) => make(index));
}
