/** What explodes is refused by name, before it costs anything; what merely looks so is not. */
import { describe, expect, it } from 'vitest';
import type { GrammarSpec } from '../../../src/grammar/grammar.ts';
import { compileSpec } from '../../../src/grammar/grammar.ts';
import { HOSTILE_BODIES } from '../../../support/hostile-bodies.ts';
import {
  accepts,
  allowedTokens,
  grammarAheadOf,
  grammarOf,
  maskOf,
  randomFrom,
  TOKENS,
  walk,
} from '../../support/grammars.ts';

function nested(levels: number, inner: unknown, wrap: (inner: unknown) => unknown): unknown {
  let schema = inner;
  for (let i = 0; i < levels; i++) schema = wrap(schema);
  return schema;
}

/** The same to whoever reads it. */
function countingReads<T>(value: T, read: () => void, known = new Map<unknown, unknown>()): T {
  if (typeof value !== 'object' || value === null) return value;
  const counting =
    known.get(value) ??
    new Proxy(value, {
      get(target, key) {
        read();
        return countingReads(Reflect.get(target, key) as unknown, read, known);
      },
      ownKeys(target) {
        read();
        return Reflect.ownKeys(target);
      },
    });
  known.set(value, counting);
  return counting as T;
}

const REFUSED: readonly (readonly [string, GrammarSpec])[] = [
  ['a megabyte of groups', { kind: 'regex', source: '('.repeat(2 ** 20) }],
  ['deep groups', { kind: 'regex', source: `${'('.repeat(5000)}${')'.repeat(5000)}` }],
  ['counts of counts', { kind: 'regex', source: '((a{1,999}b){1,999}c){1,999}' }],
  ['a count beyond all', { kind: 'regex', source: '(ab?){999999999}' }],
  ['a backreference', { kind: 'regex', source: '(a)\\1' }],
  ['a text that never ends', { kind: 'ebnf', source: 'root ::= "a" root' }],
  ['recursion on the left', { kind: 'ebnf', source: 'root ::= a\na ::= b "x"\nb ::= a? "y"' }],
  ['a rule that is not there', { kind: 'ebnf', source: 'root ::= other' }],
  ['deep groups of a grammar', { kind: 'ebnf', source: `root ::= ${'('.repeat(5000)}` }],
  ['half a grammar', { kind: 'ebnf', source: 'root ::= "a' }],
  ['no choice', { kind: 'choice', texts: [] }],
  ['long choices', { kind: 'choice', texts: Array.from({ length: 5000 }, (_, i) => `${i}`.repeat(40)) }],
  [
    '500 nested objects',
    { kind: 'json-schema', schema: nested(500, {}, (a) => ({ type: 'object', properties: { a } })) },
  ],
  ['deep lists', { kind: 'json-schema', schema: { enum: [nested(100_000, 1, (inner) => [inner])] } }],
  ['many items', { kind: 'json-schema', schema: { type: 'array', minItems: 1e9 } }],
  [
    'a long pattern with a length',
    { kind: 'json-schema', schema: { type: 'string', pattern: '(a|b)*a(a|b){30}$', maxLength: 400 } },
  ],
  [
    'a circle of references',
    {
      kind: 'json-schema',
      schema: { enum: [1], $ref: '#/$defs/a', $defs: { a: { $ref: '#/$defs/b' }, b: { $ref: '#/$defs/a' } } },
    },
  ],
];

describe('grammars', () => {
  it.each(REFUSED)('refuse %s', (_, spec) => {
    expect(() => grammarOf(spec)).toThrow(expect.objectContaining({ code: 'REQUEST_INVALID' }));
  });

  const texts = Array.from({ length: 500 }, (_, i) => `${i} and so on`);
  it('are refused once they have taken too long, by the clock that is given', () => {
    let now = 0;
    const clock = () => (now += 400);
    expect(() => compileSpec({ kind: 'choice', texts }, clock)).toThrow('takes longer than 700 ms');
  });

  it('are not refused for what else the machine did meanwhile, for four seconds in all', () => {
    let now = 0;
    let cpu = 0;
    let looks = 0;
    const spec = { kind: 'choice', texts } as const;
    compileSpec(
      spec,
      () => (looks++ === 0 ? 0 : 3_999),
      () => 699,
    );
    expect(() =>
      compileSpec(
        spec,
        () => (now += 4_000),
        () => 0,
      ),
    ).toThrow('takes longer than 4000 ms');
    expect(() =>
      compileSpec(
        spec,
        () => (now += 400),
        () => (cpu += 300),
      ),
    ).toThrow('takes longer than 700 ms');
  });

  it.each(['a schema of oneOf that triples', 'a schema of 2,000 alternatives that may all hold'])(
    'are refused before they are read over and over: %s',
    (name) => {
      const { body } = HOSTILE_BODIES.find((one) => one.name === name)!;
      const { schema } = (JSON.parse(body()) as { response_format: { json_schema: { schema: object } } })
        .response_format.json_schema;
      let reads = 0;
      expect(() => grammarOf({ kind: 'json-schema', schema: countingReads(schema, () => reads++) })).toThrow(
        'takes too many steps',
      );
      expect(reads).toBeLessThan(500_000);
    },
  );

  it('take six nested anyOf of eight that all begin alike', () => {
    const levels = Array.from({ length: 6 }, (_, level) => ({
      anyOf: Array.from({ length: 8 }, (_, i) => ({
        type: 'object',
        properties: {
          a: level === 5 ? { type: 'integer' } : { $ref: `#/$defs/${level + 1}` },
          [`only${i}`]: { type: 'null' },
        },
        required: ['a', `only${i}`],
        additionalProperties: false,
      })),
    }));
    const schema = { $ref: '#/$defs/0', $defs: Object.fromEntries(levels.entries()) };
    const grammar = grammarOf({ kind: 'json-schema', schema });
    const text = nested(6, 7, (a) => ({ a, only3: null }));
    expect(accepts(grammar, JSON.stringify(text))).toBe(true);
    expect(accepts(grammar, JSON.stringify({ a: text, only3: null }))).toBe(false);
  });

  it('have parts found ahead within bounds of time and memory', () => {
    const spec = { kind: 'regex', source: '([^x]{0,30}x){20}' } as const;
    const { grammar, ahead } = grammarAheadOf(spec);
    const bytes = Object.values(ahead).reduce(
      (sum, one) => sum + (one instanceof Int32Array ? one.byteLength : 0),
      0,
    );
    expect(bytes).toBeLessThan(1.1 * 2 ** 20);
    const plain = grammarOf(spec);
    const [a, b] = [walk(plain, randomFrom(1), 30), walk(grammar, randomFrom(1), 30)];
    b.states.forEach((state, i) => {
      expect(maskOf(grammar, state)).toEqual(maskOf(plain, a.states[i]!));
    });
    let now = 0;
    const late = grammarAheadOf(spec, () => (now += 60));
    expect(late.ahead.tokenStart.length).toBeLessThan(4);
  });

  it('mask alike at any depth, with parts found ahead or without', () => {
    const spec = { kind: 'json-object' } as const;
    const open = TOKENS.findIndex((token) => token?.length === 1 && token[0] === 0x5b);
    const begin = new TextEncoder().encode('{"a":');
    const [plain, { grammar }] = [grammarOf(spec), grammarAheadOf(spec)];
    let [a, b] = [plain.acceptBytes(plain.start, begin), grammar.acceptBytes(grammar.start, begin)];
    for (let depth = 0; a && b; depth++) {
      if (depth < 8 || depth > 490) expect(maskOf(grammar, b)).toEqual(maskOf(plain, a));
      [a, b] = [plain.accept(a, open), grammar.accept(b, open)];
    }
    expect([a, b]).toEqual([undefined, undefined]);
  });

  it('lead out of any depth', () => {
    const grammar = grammarOf({ kind: 'json-object' });
    let state = grammar.acceptBytes(grammar.start, new TextEncoder().encode('{"a":'))!;
    const open = TOKENS.findIndex((token) => token?.length === 1 && token[0] === 0x5b);
    let depth = 0;
    for (let next = grammar.accept(state, open); next; next = grammar.accept(next, open)) {
      state = next;
      depth++;
    }
    expect(depth).toBeGreaterThan(200);
    expect(allowedTokens(grammar, state)).not.toContain(open);
    expect(grammar.acceptBytes(state, new TextEncoder().encode(`${']'.repeat(depth)}}`))?.isOver).toBe(true);
  });

  it('with many readings at once stay within their budget or fail by name', () => {
    const grammar = grammarOf({ kind: 'regex', source: '(a|b)*a(a|b){400}' });
    const drive = () => walk(grammar, () => 0.4, 60);
    try {
      drive();
    } catch (error) {
      expect(error).toMatchObject({ code: 'REQUEST_INVALID' });
    }
  });

  it('recursive lists on the right stay flat', () => {
    const grammar = grammarOf({ kind: 'ebnf', source: 'root ::= "a" root | "b"' });
    expect(accepts(grammar, `${'a'.repeat(5000)}b`)).toBe(true);
  });
});
