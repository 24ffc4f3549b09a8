import { afterEach, expect, it, vi } from 'vitest';
import { TokenGrammar } from '../../../src/grammar/masks.ts';
import type { GrammarUse, ScheduledSequence } from '../../../src/scheduler/types.ts';
import { CoreGrammars } from '../../../src/worker/core-grammars.ts';
import { GrammarCompiler } from '../../../src/worker/grammar-compiler.ts';

const WORDS = 256;
const compiler = new GrammarCompiler(
  {
    isSpecial: () => false,
    tokenBytes: (id) => Uint8Array.of(id),
    tokenString: String,
  },
  () => 0,
);

function useOf(i: number): GrammarUse {
  const schema = { type: 'object', properties: { [`field${i}`]: { type: 'string', maxLength: i + 1 } } };
  return compiler.compile({ spec: { kind: 'json-schema', schema }, param: 'form' }, WORDS);
}

afterEach(() => {
  vi.restoreAllMocks();
});

/** Which grammar has masked the first token of a request under each of `uses`, in turn. */
async function maskedBy(core: CoreGrammars, uses: readonly GrammarUse[]): Promise<readonly TokenGrammar[]> {
  const masks = vi.spyOn(TokenGrammar.prototype, 'fillMask');
  for (const grammar of uses) {
    const history = { promptLength: 0, length: 0, tokens: () => new Int32Array(0) };
    const params = { grammar, stopTokenIds: [] };
    await core.mask({ sequenceId: 'a', sample: { params, history } } as unknown as ScheduledSequence);
  }
  return masks.mock.contexts as unknown as TokenGrammar[];
}

it('keeps what it has found of all grammars that come again, as long as there is room', async () => {
  const uses = Array.from({ length: 64 }, (_, i) => useOf(i));
  const core = new CoreGrammars(WORDS);
  const by = await maskedBy(core, [...uses, ...uses]);
  expect(new Set(by).size).toBe(64);
  expect(by.slice(64).every((grammar, i) => grammar === by[i])).toBe(true);
});

it('lets go of those that have been used longest ago where they take too many bytes', async () => {
  const [a, b, c] = [useOf(0), useOf(1), useOf(2)];
  const found = await maskedBy(new CoreGrammars(WORDS), [a, b, c]);
  const bytes = found.reduce((sum, grammar) => sum + grammar.bytes, 0);
  vi.restoreAllMocks();
  const by = await maskedBy(new CoreGrammars(WORDS, bytes - 1), [a, b, a, c, a, b]);
  expect([by[2] === by[0], by[4] === by[0], by[5] === by[1]]).toEqual([true, true, false]);
  // One alone may be larger than that.
  vi.restoreAllMocks();
  const alone = await maskedBy(new CoreGrammars(WORDS, 1), [a, a, b, a]);
  expect([alone[1] === alone[0], alone[3] === alone[0]]).toEqual([true, false]);
});

it('counts what a grammar finds', async () => {
  const { tables, vocabulary, ahead } = useOf(5_000);
  const core = new CoreGrammars(WORDS);
  const masks = vi.spyOn(TokenGrammar.prototype, 'fillMask');
  const tokens = [...Buffer.from('{"field5000":"')];
  const history = {
    promptLength: 0,
    get length() {
      return tokens.length;
    },
    tokens: (from: number, to: number) => Int32Array.from(tokens.slice(from, to)),
  };
  const params = { grammar: { key: 'a', tables, vocabulary, ahead }, stopTokenIds: [] };
  const sequence = { sequenceId: 'a', sample: { params, history } } as unknown as ScheduledSequence;
  const sizes: number[] = [];
  for (let i = 0; i < 100; i++) {
    await core.mask(sequence);
    sizes.push((masks.mock.contexts[0] as unknown as TokenGrammar).bytes);
    tokens.push('a'.charCodeAt(0));
  }
  // Each count of letters is a state with a mask of its own.
  expect(sizes.at(-1)! - sizes[0]!).toBeGreaterThan(99 * (WORDS / 8));
});

it('says what is wrong with a grammar, and no more of it than anybody reads', () => {
  const spec = { kind: 'ebnf', source: `root ::= ${'x'.repeat(20_000)}` } as const;
  expect(() => compiler.compile({ spec, param: 'form' }, WORDS)).toThrow(
    /^form: the grammar does not define rule "x.{1,1000}$/,
  );
});
