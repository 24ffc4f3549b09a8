/** Texts drawn through the masks of a grammar, over a vocabulary made up for it. */
import { serialize } from 'node:v8';
import { compileSpec, type GrammarSpec } from '../../src/grammar/grammar.ts';
import type { PartsAhead } from '../../src/grammar/mask-parts.ts';
import { type GrammarPlace, TokenGrammar } from '../../src/grammar/masks.ts';
import { commonParts, partsAhead } from '../../src/grammar/parts-ahead.ts';
import { Vocabulary, vocabularyOf } from '../../src/grammar/vocabulary.ts';

const SYLLABLES = ['a', 'ba', 'co', 'de', 'é', 'fi', 'name', '😀', '1', '20'];
const MARKS = [
  '"',
  '":',
  '": ',
  '",',
  '", "',
  '{"',
  '"}',
  '"},',
  '"]',
  '[',
  ']',
  '{}',
  ',',
  ':',
  ' ',
  '\n',
  '\n  ',
  '\\',
  '\\n',
  '\\u00',
];
const WORDS = ['true', 'false', 'null', '    ', '0', '12', 'e+', '}}', ']]'];

/** Every byte, marks of JSON, and words with marks before and behind, so that tokens cross the ends of strings in all ways. */
function tokensOf(): readonly (Uint8Array | undefined)[] {
  const texts = [...MARKS, ...WORDS];
  for (const one of SYLLABLES) {
    for (const other of SYLLABLES) {
      texts.push(
        one + other,
        ...MARKS.flatMap((mark) => [mark + one + other, one + other + mark, one + mark + other]),
      );
      texts.push(...SYLLABLES.map((third) => one + other + third));
    }
  }
  const bytes = Array.from({ length: 256 }, (_, byte) => Uint8Array.of(byte));
  const encoder = new TextEncoder();
  // A special token first, and an id without any: neither is ever allowed.
  return [undefined, ...bytes, ...texts.map((text) => encoder.encode(text)), new Uint8Array(0)];
}

export const TOKENS = tokensOf();
const VOCABULARY = new Vocabulary(vocabularyOf(TOKENS));

export function grammarOf(spec: GrammarSpec): TokenGrammar {
  return new TokenGrammar(
    compileSpec(spec, () => 0),
    VOCABULARY,
  );
}

/** The same with parts of its masks found beforehand, as a worker has it. */
export function grammarAheadOf(
  spec: GrammarSpec,
  now = () => 0,
): { grammar: TokenGrammar; ahead: PartsAhead } {
  const tables = compileSpec(spec, () => 0);
  const common = commonParts([tables], new Vocabulary(VOCABULARY.data));
  const parts = serialize(common.slice(0, common.length >> 1));
  const vocabulary = new Vocabulary({ ...VOCABULARY.data, parts });
  const ahead = structuredClone(partsAhead(tables, vocabulary, now));
  return { grammar: new TokenGrammar(tables, vocabulary, ahead), ahead };
}

export function isAllowed(mask: Uint32Array, token: number): boolean {
  return ((mask[token >>> 5]! >>> (token & 31)) & 1) === 1;
}

export function maskOf(grammar: TokenGrammar, state: GrammarPlace): Uint32Array {
  const mask = new Uint32Array(VOCABULARY.words);
  grammar.fillMask(state, mask);
  return mask;
}

export function allowedTokens(grammar: TokenGrammar, state: GrammarPlace): number[] {
  const allowed: number[] = [];
  maskOf(grammar, state).forEach((word, i) => {
    for (let bit = 0; word !== 0 && bit < 32; bit++) if ((word >>> bit) & 1) allowed.push(i * 32 + bit);
  });
  return allowed;
}

/** Whether `text` is one of the grammar. */
export function accepts(grammar: TokenGrammar, text: string): boolean {
  return grammar.acceptBytes(grammar.start, new TextEncoder().encode(text))?.mayEnd ?? false;
}

/** Numbers from 0 to below 1, the same for the same seed. */
export function randomFrom(seed: number): () => number {
  let state = (seed >>> 0) + 1;
  return () => {
    state = (Math.imul(state, 1_664_525) + 1_013_904_223) >>> 0;
    return state / 2 ** 32;
  };
}

export interface Walk {
  readonly text: string;
  /** The text ended before it was long enough. */
  readonly ended: boolean;
  readonly states: readonly GrammarPlace[];
}

/** A text of tokens drawn by `random` (0 to below 1); where it grows long, it is led to an end by short tokens of JSON's marks. */
export function walk(grammar: TokenGrammar, random: () => number, mostTokens = 60): Walk {
  const states = [grammar.start];
  const drawn: Uint8Array[] = [];
  for (let step = 0; step < mostTokens; step++) {
    const state = states.at(-1)!;
    const tired = step > mostTokens / 4;
    if (state.isOver || (state.mayEnd && (tired || random() < 0.2))) break;
    const allowed = allowedTokens(grammar, state);
    if (allowed.length === 0) throw new Error(`nothing may follow ${textOf(drawn)}`);
    const ends = tired ? allowed.filter((token) => isClosing(TOKENS[token]!)) : [];
    const marks = random() < 0.5 ? allowed.filter((token) => isMark(TOKENS[token]!)) : [];
    const from = ends.length > 0 ? ends : marks.length > 0 ? marks : allowed;
    const token = from[Math.floor(random() * from.length)]!;
    const next = grammar.accept(state, token);
    if (!next) throw new Error(`the mask allows token ${token} behind ${textOf(drawn)}, which is refused`);
    states.push(next);
    drawn.push(TOKENS[token]!);
  }
  const ended = states.at(-1)!.mayEnd;
  return { text: textOf(drawn, ended), ended, states };
}

function isClosing(bytes: Uint8Array): boolean {
  return bytes.length === 1 && '"]}'.includes(String.fromCharCode(bytes[0]!));
}

function isMark(bytes: Uint8Array): boolean {
  return bytes.length <= 3 && !/[a-zA-Z]/.test(String.fromCharCode(bytes[0]!)) && bytes[0]! < 0x80;
}

/** `whole`: no character is cut off. */
function textOf(drawn: readonly Uint8Array[], whole = false): string {
  return new TextDecoder('utf-8', { fatal: whole }).decode(Buffer.concat(drawn));
}
