/** What a model thinks before it answers, apart from the answer. */
import { MarkerFinder, type Part, type PartParser, TrailingBlanks } from './parts.ts';

export const REASONING_DIALECTS = ['qwen3', 'deepseek_r1', 'mistral'] as const;
export type ReasoningDialect = (typeof REASONING_DIALECTS)[number];

const MARKERS: Readonly<Record<ReasoningDialect, { readonly begin: string; readonly end: string }>> = {
  qwen3: { begin: '<think>', end: '</think>' },
  deepseek_r1: { begin: '<think>', end: '</think>' },
  mistral: { begin: '[THINK]', end: '[/THINK]' },
};

/** Special tokens around thoughts. */
export function reasoningTokens(dialect: ReasoningDialect): readonly string[] {
  const { begin, end } = MARKERS[dialect];
  return [begin, end];
}

/** Before thoughts, and behind them. */
export function thoughtMarkers(dialect: ReasoningDialect): { readonly begin: string; readonly end: string } {
  return MARKERS[dialect];
}

/** How a checkpoint's chat template marks thoughts; undefined where it does not. */
export function reasoningOf(template: string): ReasoningDialect | undefined {
  return REASONING_DIALECTS.find((dialect) => template.includes(MARKERS[dialect].end));
}

/** The prompt has opened the thoughts already, as templates of models that always think do. */
export function opensThoughts(dialect: ReasoningDialect, prompt: string): boolean {
  const { begin, end } = MARKERS[dialect];
  const opened = prompt.lastIndexOf(begin);
  // Thoughts of earlier turns, and what users write, are closed or stand further up.
  return opened > prompt.lastIndexOf(end) && prompt.slice(opened + begin.length).trim() === '';
}

/** Thoughts come out without the blanks around them, the answer without those before it; `answer` reads the answer. */
export class ReasoningParser implements PartParser {
  readonly #begin: string;
  readonly #end: MarkerFinder;
  readonly #inside: boolean;
  readonly #answer: PartParser;
  readonly #blanks = new TrailingBlanks();
  #mode: 'start' | 'thoughts' | 'gap' | 'answer' = 'start';
  /** At the start: what may be blanks and the opening marker. */
  #held = '';
  #thought = false;

  /** `inside`: the prompt has opened the thoughts. */
  constructor(dialect: ReasoningDialect, inside: boolean, answer: PartParser) {
    const { begin, end } = MARKERS[dialect];
    this.#begin = begin;
    this.#end = new MarkerFinder(end);
    this.#inside = inside;
    this.#answer = answer;
  }

  get done(): boolean {
    return this.#answer.done;
  }

  push(text: string): Part[] {
    if (this.#mode === 'start') return this.#start(text);
    if (this.#mode === 'thoughts') return this.#think(text);
    if (this.#mode === 'answer') return this.#answer.push(text);
    const rest = text.trimStart();
    if (rest === '') return [];
    this.#mode = 'answer';
    return this.#answer.push(rest);
  }

  flush(): Part[] {
    const held = this.#held;
    this.#held = '';
    if (this.#mode === 'start') {
      this.#mode = this.#inside ? 'thoughts' : 'answer';
      return [...this.push(held), ...this.flush()];
    }
    const thoughts = this.#mode === 'thoughts' ? this.#say(this.#end.flush()) : [];
    return [...thoughts, ...this.#answer.flush()];
  }

  #start(text: string): Part[] {
    this.#held += text;
    if (text.trim() === '') return [];
    const seen = this.#held.trimStart();
    if (this.#begin.startsWith(seen) && seen !== this.#begin) return [];
    const held = this.#held;
    this.#held = '';
    const opened = seen.startsWith(this.#begin);
    this.#mode = opened || this.#inside ? 'thoughts' : 'answer';
    return this.push(opened ? seen.slice(this.#begin.length) : held);
  }

  #think(text: string): Part[] {
    const { before, after } = this.#end.push(text);
    const parts = this.#say(before);
    if (after === undefined) return parts;
    this.#mode = 'gap';
    return [...parts, ...this.push(after)];
  }

  #say(text: string): Part[] {
    const certain = this.#blanks.push(text);
    const out = this.#thought ? certain : certain.trimStart();
    if (out === '') return [];
    this.#thought = true;
    return [{ type: 'reasoning', text: out }];
  }
}
