/** Masks against what they stand for: a bit is set where the text goes on with the token's bytes, and only there. */
import fc from 'fast-check';
import { expect, it } from 'vitest';
import type { GrammarSpec } from '../../../src/grammar/grammar.ts';
import type { TokenGrammar } from '../../../src/grammar/masks.ts';
import {
  accepts,
  grammarAheadOf,
  grammarOf,
  isAllowed,
  maskOf,
  randomFrom,
  TOKENS,
  walk,
} from '../../support/grammars.ts';

const SPECS: readonly GrammarSpec[] = [
  { kind: 'json-object' },
  { kind: 'regex', source: '.{3,40}de' },
  { kind: 'regex', source: '([a-z]{2,30}|\\d+)( fi[^"]*)?' },
  { kind: 'regex', source: '(?:ba|co){5,20}"?' },
  { kind: 'choice', texts: ['name', 'namede', 'naïve', '{"', ''] },
  { kind: 'ebnf', source: 'root ::= word (" " word)*\nword ::= [^ \\n]+ | "(" root ")"' },
  { kind: 'ebnf', source: 'root ::= root "," item | item\nitem ::= [a-z0-9]{1,60} | "[" root "]"' },
  {
    kind: 'json-schema',
    schema: {
      type: 'object',
      properties: {
        name: { type: 'string', maxLength: 9 },
        de: { type: 'string', minLength: 60, maxLength: 300 },
        pattern: { type: 'string', pattern: '^[a-z ]+$', maxLength: 12 },
        any: {},
        child: { $ref: '#' },
      },
      required: ['name'],
    },
  },
  {
    kind: 'json-schema',
    schema: {
      type: 'array',
      uniqueItems: true,
      minItems: 3,
      items: {
        anyOf: [
          { type: 'string', pattern: '^[ab"]{0,2}$' },
          { type: 'integer', minimum: 0, maximum: 21 },
          { type: 'array', items: { type: 'boolean' }, maxItems: 2 },
          { type: 'object', properties: { a: { enum: ['a', 'ba'] } }, additionalProperties: false },
        ],
      },
    },
  },
];

it.each(SPECS)('allows what goes on and nothing else: %j', (spec) => {
  const grammar = grammarOf(spec);
  fc.assert(
    fc.property(fc.nat(), (seed) => {
      const { states } = walk(grammar, randomFrom(seed), 30);
      for (const state of [states.at(-1)!, states[states.length >> 1]!]) {
        const mask = maskOf(grammar, state);
        const wrong = [...TOKENS.keys()].filter(
          (token) => isAllowed(mask, token) !== (grammar.accept(state, token) !== undefined),
        );
        expect(wrong).toEqual([]);
      }
    }),
    { numRuns: 5 },
  );
});

it.each(SPECS)('are the same with parts that were found ahead: %j', (spec) => {
  const { grammar, ahead } = grammarAheadOf(spec);
  expect(ahead.tokens.length).toBeGreaterThan(0);
  const plain = grammarOf(spec);
  for (const seed of [1, 2, 3]) {
    const [a, b] = [walk(plain, randomFrom(seed), 30), walk(grammar, randomFrom(seed), 30)];
    expect(b.text).toBe(a.text);
    a.states.forEach((state, i) => {
      expect(maskOf(grammar, b.states[i]!)).toEqual(maskOf(plain, state));
    });
  }
});

const atom = fc.constantFrom(
  'a',
  'b',
  '[ab]',
  '[^a]',
  '.',
  '\\d',
  '\\w',
  '\\s',
  'é',
  '😀',
  '\\.',
  '[a-c0-2]',
  '"',
);
const quantifier = fc.constantFrom('', '', '*', '+', '?', '{2}', '{0,2}', '{1,}', '{2,7}', '+?');
/** Few and small: JavaScript tries every way through nested repetitions. */
const groupQuantifier = fc.constantFrom('', '', '?', '*', '{2}');
const pattern = fc.letrec<{ regex: string; item: string }>((tie) => ({
  regex: fc.oneof(
    { maxDepth: 2 },
    fc.array(tie('item'), { minLength: 1, maxLength: 3 }).map((items) => items.join('')),
    fc.tuple(tie('regex'), tie('regex')).map(([a, b]) => `${a}|${b}`),
  ),
  item: fc.oneof(
    { maxDepth: 2 },
    fc.tuple(atom, quantifier).map((parts) => parts.join('')),
    fc.tuple(tie('regex'), groupQuantifier).map(([inner, times]) => `(?:${inner})${times}`),
  ),
})).regex;
const subject = fc
  .array(fc.constantFrom('a', 'b', 'c', '1', 'é', '😀', '.', '"', ' ', '\n'), { maxLength: 6 })
  .map((parts) => parts.join(''));

/** One in thousands of these expressions takes more steps than a grammar may: refused by name, another is drawn. */
function grammarUnlessTooLarge(spec: GrammarSpec): TokenGrammar {
  try {
    return grammarOf(spec);
  } catch (error) {
    expect(error).toMatchObject({ code: 'REQUEST_INVALID', message: expect.stringContaining('too large') });
    return fc.pre(false) as never;
  }
}

it('reads a regular expression as JavaScript does', () => {
  fc.assert(
    fc.property(pattern, fc.array(subject, { minLength: 1, maxLength: 12 }), (source, subjects) => {
      const regex = new RegExp(`^(?:${source})$`, 'u');
      const grammar = grammarUnlessTooLarge({ kind: 'regex', source });
      for (const text of subjects) expect([text, accepts(grammar, text)]).toEqual([text, regex.test(text)]);
    }),
    { numRuns: 80 },
  );
});

it('reads a pattern of a schema as JavaScript does, within a JSON string', () => {
  const anchored = fc
    .tuple(fc.constantFrom('', '^'), atom, quantifier, atom, fc.constantFrom('', '$'))
    .map((parts) => parts.join(''));
  fc.assert(
    fc.property(anchored, fc.array(subject, { minLength: 1, maxLength: 12 }), (source, subjects) => {
      const regex = new RegExp(source, 'u');
      const schema = { type: 'string', pattern: source };
      const grammar = grammarUnlessTooLarge({ kind: 'json-schema', schema });
      for (const text of subjects) {
        expect([text, accepts(grammar, JSON.stringify(text))]).toEqual([text, regex.test(text)]);
      }
    }),
    { numRuns: 60 },
  );
});
