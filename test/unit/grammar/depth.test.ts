/** Masks where few more calls may be open, over a vocabulary that is long to walk: there, what follows a state hangs on how deep it is. */
import { expect, it } from 'vitest';
import { compileSpec, type GrammarSpec } from '../../../src/grammar/grammar.ts';
import { type GrammarPlace, TokenGrammar } from '../../../src/grammar/masks.ts';
import { partsAhead } from '../../../src/grammar/parts-ahead.ts';
import { Vocabulary, vocabularyOf } from '../../../src/grammar/vocabulary.ts';
import { isAllowed } from '../../support/grammars.ts';

const encoder = new TextEncoder();
/** Whoever may begin a list has all of the numbered ones to look at. */
const TOKENS = [
  ...Array.from({ length: 256 }, (_, byte) => Uint8Array.of(byte)),
  ...['[[', '[[[[', '[[[[[[[[', '["a",[[', '[[]', '[]]', '{"a":[', '[{"a":{"b":', '],[[', ',[[[', '"]'].map(
    (text) => encoder.encode(text),
  ),
  ...Array.from({ length: 6500 }, (_, i) => encoder.encode(`["${i}`)),
];
const DATA = vocabularyOf(TOKENS);
const OPEN = '['.charCodeAt(0);

const SPECS: readonly GrammarSpec[] = [
  { kind: 'json-schema', schema: {} },
  { kind: 'ebnf', source: 'root ::= "[" (root ("," root)*)? "]" | "\\"" [a-z0-9]* "\\""' },
];

it.each(SPECS.flatMap((spec) => [false, true].map((isAhead) => ({ spec, isAhead }))))(
  'allow what is accepted, up to the deepest text: %j',
  ({ spec, isAhead }) => {
    const tables = compileSpec(spec, () => 0);
    const vocabulary = new Vocabulary(DATA);
    const ahead = isAhead ? partsAhead(tables, vocabulary, () => 0) : undefined;
    const grammar = new TokenGrammar(tables, vocabulary, ahead);
    const lists: GrammarPlace[] = [];
    for (let place: GrammarPlace | undefined = grammar.start; place; place = grammar.accept(place, OPEN)) {
      lists.push(place);
    }
    expect(lists.length).toBeGreaterThan(200);

    for (const [depth, list] of lists.entries()) {
      if (depth > 2 && depth < lists.length - 12) continue;
      for (const before of ['', '"a"', '"a",']) {
        const place = grammar.acceptBytes(list, encoder.encode(before));
        if (!place) continue;
        const mask = new Uint32Array(vocabulary.words);
        grammar.fillMask(place, mask);
        const wrong = TOKENS.filter(
          (_, token) => isAllowed(mask, token) !== (grammar.accept(place, token) !== undefined),
        );
        expect([depth, before, wrong.map((token) => new TextDecoder().decode(token))]).toEqual([
          depth,
          before,
          [],
        ]);
      }
    }
  },
);
