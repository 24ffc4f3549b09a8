import { describe, expect, it } from 'vitest';
import { specialBytes } from '../../../src/grammar/whole.ts';
import { CALL_DIALECTS, writtenForm } from '../../../src/parsing/calls.ts';
import { createParser } from '../../../src/parsing/parser.ts';
import { accepts, grammarOf, randomFrom, walk } from '../../support/grammars.ts';

const CITY = {
  type: 'object',
  properties: { city: { type: 'string', maxLength: 9 } },
  required: ['city'],
  additionalProperties: false,
};
const TREE = {
  $defs: {
    node: { type: 'object', properties: { next: { $ref: '#/$defs/node' } }, additionalProperties: false },
  },
  $ref: '#/$defs/node',
};
const FUNCTIONS = [
  { name: 'weather', parameters: CITY },
  { name: 'tree', parameters: TREE },
  { name: 'now' },
];

const specOf = (dialect: (typeof CALL_DIALECTS)[number], many: boolean) =>
  ({ kind: 'calls', form: writtenForm(dialect), many, functions: FUNCTIONS }) as const;

describe('a grammar of calls', () => {
  it('takes what models write, and nothing else', () => {
    const one = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>';
    const many = grammarOf(specOf('hermes', true));
    expect(accepts(many, one)).toBe(true);
    expect(accepts(many, `${one}\n${one}`)).toBe(true);
    expect(accepts(many, '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>')).toBe(true);
    expect(accepts(many, one.replace('Paris"', 'Paris", "x": 1'))).toBe(false);
    expect(accepts(many, one.replace('weather', 'whether'))).toBe(false);
    expect(accepts(many, '')).toBe(false);
    expect(accepts(grammarOf(specOf('hermes', false)), `${one}\n${one}`)).toBe(false);
  });

  it('has an object as arguments, whatever else its schema allows', () => {
    const of = (type: unknown) =>
      grammarOf({ ...specOf('hermes', false), functions: [{ name: 'f', parameters: { type } }] });
    const call = (text: string) => `<tool_call>\n{"name": "f", "arguments": ${text}}\n</tool_call>`;
    const either = of(['null', 'object']);
    expect([accepts(either, call('{}')), accepts(either, call('null'))]).toEqual([true, false]);
    for (const type of ['string', [], ['null'], 'strnig']) {
      expect(() => of(type)).toThrow('parameters of function f are no object');
    }
  });

  it('stands behind thoughts, beside another form, and has the special tokens of its model', () => {
    const answer = {
      kind: 'either',
      options: [{ kind: 'choice', texts: ['yes'] }, specOf('mistral', false)],
    } as const;
    const markers = { kind: 'thoughtful', begin: '[THINK]', end: '[/THINK]', answer } as const;
    const open = grammarOf({ ...markers, inside: false });
    const call = '[TOOL_CALLS][{"name": "now", "arguments": {}}]';
    for (const text of ['yes', call, '[THINK]so [/THIN [[/THINK]\n\nyes', ` [THINK][/THINK]${call}`]) {
      expect([text, accepts(open, text)]).toEqual([text, true]);
    }
    for (const text of ['[THINK]yes', '[/THINK]yes', 'yes[THINK][/THINK]']) {
      expect([text, accepts(open, text)]).toEqual([text, false]);
    }
    const inside = grammarOf({ ...markers, inside: true });
    expect([accepts(inside, 'so[/THINK]yes'), accepts(inside, 'yes')]).toEqual([true, false]);
    const end = inside.acceptBytes(inside.start, specialBytes('[/THINK]'));
    expect(end && inside.acceptBytes(end, specialBytes('[TOOL_CALLS]'))).toBeUndefined();
    const marked = grammarOf({ ...specOf('mistral', false), tokens: ['[TOOL_CALLS]'] });
    const begun = marked.acceptBytes(marked.start, specialBytes('[TOOL_CALLS]'))!;
    expect(marked.acceptBytes(begun, new TextEncoder().encode(call.slice(12)))?.isOver).toBe(true);
  });

  it.each(CALL_DIALECTS)('writes what the parser of %s reads as calls alone', (dialect) => {
    const grammar = grammarOf(specOf(dialect, true));
    const names = new Set<string>();
    for (let seed = 1; seed <= 60; seed++) {
      const drawn = walk(grammar, randomFrom(seed), 400);
      if (!drawn.ended) continue;
      const parser = createParser({ calls: { dialect, names: FUNCTIONS.map(({ name }) => name) } });
      const parts = [...parser.push(drawn.text), ...parser.flush()];
      for (const part of parts) {
        expect(['call', 'arguments']).toContain(part.type);
        if (part.type === 'call') names.add(part.name);
      }
    }
    expect([...names].sort()).toEqual(['now', 'tree', 'weather']);
  });
});
