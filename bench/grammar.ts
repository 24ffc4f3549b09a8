/**
 * What a grammar costs: to build, and a mask of it a token. Texts are read token by token, the longest that is allowed each time, in a first
 * request of a grammar and in a second one. Without a tokenizer the vocabulary is made up: 128k words with and without marks around them.
 *
 *   ./scripts/build.sh && node dist/bench/grammar.js [--tokenizer tokenizer.json] [--json]
 */
import { Command } from 'commander';
import { compileSpec, type GrammarSpec } from '../src/grammar/grammar.ts';
import { TokenGrammar } from '../src/grammar/masks.ts';
import { Vocabulary, vocabularyOf } from '../src/grammar/vocabulary.ts';
import { type Spread, spreadOf } from './measure/statistics.ts';
import { plainTable } from './measure/table.ts';
import { madeUpTokens, tokensOf } from './measure/tokens.ts';

const LONGEST_TOKEN = 64;

const PERSON = {
  type: 'object',
  properties: {
    name: { type: 'string', maxLength: 60 },
    age: { type: 'integer', minimum: 0, maximum: 150 },
    email: { type: 'string', format: 'email' },
    tags: { type: 'array', items: { enum: ['new', 'vip', 'lost'] }, maxItems: 8 },
    notes: { type: 'array', items: { $ref: '#/$defs/note' } },
  },
  required: ['name', 'age', 'notes'],
  additionalProperties: false,
  $defs: {
    note: {
      type: 'object',
      properties: { text: { type: 'string' }, replies: { type: 'array', items: { $ref: '#/$defs/note' } } },
      required: ['text'],
    },
  },
};
const NOTE = {
  text: 'Called at noon, "nobody" there — try again.',
  replies: [{ text: 'Dann morgen früh!', when: [1, 2.5e3, null] }],
};
const SAMPLE = {
  name: 'Ada Lovelace',
  age: 36,
  email: 'ada@example.org',
  tags: ['new', 'vip'],
  notes: [NOTE, NOTE],
};

const CASES: readonly (readonly [name: string, spec: GrammarSpec, text: string])[] = [
  ['any object', { kind: 'json-object' }, JSON.stringify(SAMPLE, undefined, 2)],
  ['schema', { kind: 'json-schema', schema: PERSON }, JSON.stringify(SAMPLE)],
  [
    'pattern',
    { kind: 'regex', source: '[A-Z][a-z]+( [A-Z][a-z]+)*, \\d{4}-\\d{2}-\\d{2}(: .{0,80})?' },
    'Ada Lovelace, 1815-12-10: first to write a program for a machine',
  ],
  [
    'choice of 1000',
    { kind: 'choice', texts: Array.from({ length: 1000 }, (_, i) => `answer number ${i}`) },
    'answer number 777',
  ],
  [
    'arithmetic',
    {
      kind: 'ebnf',
      source:
        'root ::= sum\nsum ::= sum [+-] product | product\nproduct ::= product [*/] term | term\nterm ::= [0-9]+ | "(" sum ")"',
    },
    '12+(3*45-6)/7*(8+9)',
  ],
];

interface Row {
  readonly name: string;
  readonly tokens: number;
  readonly buildMs: number;
  /** Of a mask, in microseconds. */
  readonly first: Spread;
  readonly second: Spread;
}

const command = new Command('grammar')
  .option('--tokenizer <file>', 'tokenizer.json of a byte-level BPE')
  .option('--json', 'print JSON')
  .parse();
const { tokenizer, json } = command.opts<{ tokenizer?: string; json?: boolean }>();
const tokens = tokenizer === undefined ? madeUpTokens() : tokensOf(tokenizer);
const ids = new Map(
  tokens.flatMap((bytes, id) => (bytes ? [[Buffer.from(bytes).toString('latin1'), id]] : [])),
);
const before = performance.now();
const vocabulary = new Vocabulary(vocabularyOf(tokens));
const trieMs = performance.now() - before;
// Code that has not run yet is slow, and a worker has run it before.
for (const one of CASES) measure(one);
const rows = CASES.map(measure);
if (json) console.log(JSON.stringify({ tokens: tokens.length, trieMs, rows }, undefined, 2));
else {
  console.log(`${tokens.length} tokens, trie in ${trieMs.toFixed(0)} ms; microseconds a mask`);
  const shown = ({ p50, p99, max }: Spread) => [p50, p99, max].map((value) => value.toFixed(0));
  console.log(
    plainTable({
      head: ['grammar', 'tokens', 'build ms', 'first: p50', 'p99', 'max', 'second: p50', 'p99', 'max'],
      rows: rows.map(({ name, tokens: count, buildMs, first, second }) => [
        name,
        String(count),
        buildMs.toFixed(1),
        ...shown(first),
        ...shown(second),
      ]),
    }),
  );
}

function measure([name, spec, text]: (typeof CASES)[number]): Row {
  const start = performance.now();
  const tables = compileSpec(spec, () => performance.now());
  const buildMs = performance.now() - start;
  const grammar = new TokenGrammar(tables, vocabulary);
  const first = read(grammar, text);
  const second = read(grammar, text);
  return { name, tokens: first.length, buildMs, first: spreadOf(first)!, second: spreadOf(second)! };
}

/** Microseconds of each mask on the way through `text`. */
function read(grammar: TokenGrammar, text: string): number[] {
  const mask = new Uint32Array(vocabulary.words);
  const bytes = Buffer.from(text).toString('latin1');
  const times: number[] = [];
  let state = grammar.start;
  for (let at = 0; at < bytes.length; ) {
    const start = performance.now();
    grammar.fillMask(state, mask);
    times.push((performance.now() - start) * 1_000);
    let length = Math.min(LONGEST_TOKEN, bytes.length - at);
    const isAllowed = () => {
      const id = ids.get(bytes.slice(at, at + length));
      return id !== undefined && ((mask[id >>> 5]! >>> (id & 31)) & 1) === 1;
    };
    while (length > 0 && !isAllowed()) length--;
    const next = length > 0 && grammar.accept(state, ids.get(bytes.slice(at, at + length))!);
    if (!next) throw new Error(`the grammar stops before ${JSON.stringify(text.slice(at, at + 20))}`);
    state = next;
    at += length;
  }
  return times;
}
