import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { readPrompts } from '../../../../bench/serve/plan.ts';
import { assumeWords, composeText, composeWords, measureWords } from '../../../../bench/serve/words.ts';
import { uniform } from '../../../../src/model/random.ts';
import { tempDir } from '../../../support/temp-dir.ts';

/** As byte-pair encodings do: short words are one token, longer ones several, and the text has a beginning. */
const count = async (text: string) =>
  1 + text.split(' ').reduce((sum, word) => sum + Math.ceil(word.length / 4), 0);
const random = (seed: number) => (position: number) => uniform(seed, 0, position);

describe('texts of so many tokens', () => {
  it('have exactly so many by the tokenizer, and are unlike each other', async () => {
    const costs = await measureWords(count);
    expect(costs.fixed).toBe(1);
    const texts = new Set<string>();
    for (let tokens = 2; tokens < 120; tokens += 3) {
      const made = await composeText(costs, tokens, random(tokens), [], count);
      expect(made.tokens).toBe(tokens);
      expect(await count(made.text)).toBe(tokens);
      texts.add(made.text.split(' ').slice(0, 6).join(' '));
    }
    expect(texts.size).toBeGreaterThan(35);
  });

  it('have so many too where words cost something else in their company', async () => {
    // every fifth word joins the one before
    const joining = async (text: string) => (await count(text)) - Math.floor(text.split(' ').length / 5);
    const costs = await measureWords(joining);
    for (const tokens of [10, 57, 300]) {
      const made = await composeText(costs, tokens, random(tokens), [], joining);
      expect(await joining(made.text)).toBe(made.tokens);
      expect(Math.abs(made.tokens - tokens)).toBeLessThanOrEqual(1);
    }
  });

  it('begin alike where they are to', async () => {
    const costs = await measureWords(count);
    const prefix = composeWords(costs, 40, random(1));
    expect(await count(prefix.join(' '))).toBe(41);
    const made = await Promise.all(
      [2, 3].map((seed) => composeText(costs, 100, random(seed), prefix, count)),
    );
    for (const { text, tokens } of made) {
      expect(tokens).toBe(100);
      expect(text.startsWith(`${prefix.join(' ')} `)).toBe(true);
    }
    expect(made[0]!.text).not.toBe(made[1]!.text);
  });

  it('come near without a tokenizer, and have a word at least', async () => {
    const { text } = await composeText(assumeWords(2), 100, random(5));
    expect(text.split(' ')).toHaveLength(50);
    expect((await composeText(assumeWords(2), 1, random(5))).text).toMatch(/^\w+$/);
  });
});

describe('a file of prompts', () => {
  it('is read as lines, or as objects with lengths; what is neither is named by its line', async () => {
    const dir = await tempDir();
    const file = (name: string, text: string) => {
      writeFileSync(join(dir, name), text);
      return join(dir, name);
    };
    expect(readPrompts(file('a.txt', 'one\r\n\ntwo words\n'))).toEqual([
      { text: 'one' },
      { text: 'two words' },
    ]);
    expect(readPrompts(file('a.jsonl', '{"prompt":"x\\ny","output_tokens":3}\n{"prompt":"z"}'))).toEqual([
      { text: 'x\ny', outputTokens: 3 },
      { text: 'z' },
    ]);
    expect(() => readPrompts(file('b.jsonl', '{"prompt":"x"}\n{"text":"y"}'))).toThrow('line 2');
    expect(() => readPrompts(file('c.jsonl', 'x'))).toThrow('line 1 is not JSON');
    expect(() => readPrompts(file('d.txt', '\n'))).toThrow('contains no prompt');
    expect(() => readPrompts(join(dir, 'none'))).toThrow('cannot read');
  });
});
