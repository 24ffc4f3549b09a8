import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { CALL_DIALECTS, type CallDialect, dialectOf } from '../../../src/parsing/calls.ts';
import { JsonScanner } from '../../../src/parsing/json-scanner.ts';
import { createParser, type Parsing } from '../../../src/parsing/parser.ts';
import type { Part } from '../../../src/parsing/parts.ts';

const NAMES = ['get_weather', 'add', 'f'];
const parsingOf = (dialect: CallDialect): Parsing => ({ calls: { dialect, names: NAMES } });

/** Neighbours of one type joined. */
function joined(parts: readonly Part[]): Part[] {
  const out: Part[] = [];
  for (const part of parts) {
    const last = out.at(-1);
    if (last && last.type === part.type && 'text' in last && 'text' in part && part.type !== 'broken') {
      out[out.length - 1] = { ...last, text: last.text + part.text } as Part;
    } else {
      out.push(part);
    }
  }
  return out;
}

function parse(parsing: Parsing, pieces: readonly string[]): Part[] {
  const parser = createParser(parsing);
  return joined([...pieces.flatMap((piece) => parser.push(piece)), ...parser.flush()]);
}

const content = (text: string): Part => ({ type: 'content', text });
const call = (name: string, text: string): Part[] => [
  { type: 'call', name },
  { type: 'arguments', text },
];
const broken = (text: string): Part => ({ type: 'broken', text });
const PARIS = '{"city": "Paris"}';

const CASES: readonly (readonly [string, CallDialect, string, readonly Part[]])[] = [
  ['plain text', 'hermes', ' Hello <b>, \n', [content(' Hello <b>, \n')]],
  [
    'a call',
    'hermes',
    `<tool_call>\n{"name": "get_weather", "arguments": ${PARIS}}\n</tool_call>`,
    call('get_weather', PARIS),
  ],
  [
    'two calls with text around them',
    'hermes',
    `Let me see. \n<tool_call>{"name": "f", "arguments": {}}</tool_call>\n<tool_call>\n{"arguments": {"a": [1, {"b": "}"}]}, "name": "add"}\n</tool_call>\n Done.`,
    [
      content('Let me see.'),
      ...call('f', '{}'),
      ...call('add', '{"a": [1, {"b": "}"}]}'),
      content('\n Done.'),
    ],
  ],
  [
    'a call without arguments, one with a string of them, one that is not closed',
    'hermes',
    `<tool_call>{"name": "f"}</tool_call><tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call> <tool_call>{"name":"f","arguments":{}}`,
    [...call('f', '{}'), ...call('f', '{"a":1}'), ...call('f', '{}')],
  ],
  [
    'a name that no tool has, and keys beside',
    'hermes',
    '<tool_call>{"id": {"x": 1}, "name": "gue\\u0073s", "arguments": {"q": "\\""}, "arguments": {"no": 1}}</tool_call>',
    call('guess', '{"q": "\\""}'),
  ],
  [
    'markers without a call',
    'hermes',
    'a <tool_call> b</tool_call> c',
    [content('a <tool_call> b</tool_call> c')],
  ],
  [
    'an object that is no call',
    'hermes',
    '<tool_call>{"a": 1}</tool_call>',
    [content('<tool_call>{"a": 1}</tool_call>')],
  ],
  [
    'arguments that are none',
    'hermes',
    '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
    [content('<tool_call>{"name": "f", "arguments": [1]}</tool_call>')],
  ],
  [
    'arguments that break',
    'hermes',
    '<tool_call>{"name": "f", "arguments": {"a": oops}}</tool_call>',
    [
      ...call('f', '{"a": oops'),
      broken('<tool_call>{"name": "f", "arguments": {"a": oops'),
      content('}}</tool_call>'),
    ],
  ],
  [
    'arguments that break off',
    'hermes',
    'So: <tool_call>\n{"name": "f", "arguments": {"a": "x',
    [content('So:'), ...call('f', '{"a": "x'), broken('<tool_call>\n{"name": "f", "arguments": {"a": "x')],
  ],
  ['a marker that breaks off', 'hermes', 'x <tool_ca', [content('x <tool_ca')]],
  [
    'a call that breaks off before it is one',
    'hermes',
    '<tool_call>{"name": "f',
    [content('<tool_call>{"name": "f')],
  ],
  [
    'an answer in JSON',
    'llama3_json',
    '{"name": "Alice", "parameters": {}}',
    [content('{"name": "Alice", "parameters": {}}')],
  ],
  [
    'a bare call and another',
    'llama3_json',
    `{"type": "function", "name": "get_weather", "parameters": ${PARIS}}; {"name": "f", "parameters": {}}`,
    [...call('get_weather', PARIS), ...call('f', '{}')],
  ],
  [
    'a call behind its marker',
    'llama3_json',
    `Sure. <|python_tag|>{"name": "get_weather", "parameters": ${PARIS}}`,
    [content('Sure.'), ...call('get_weather', PARIS)],
  ],
  [
    'an object later on',
    'llama3_json',
    'See {"name": "f", "parameters": {}}',
    [content('See {"name": "f", "parameters": {}}')],
  ],
  [
    'a list',
    'mistral',
    `[TOOL_CALLS] [{"name": "get_weather", "arguments": ${PARIS}}, {"name": "f", "arguments": {}}]`,
    [...call('get_weather', PARIS), ...call('f', '{}')],
  ],
  [
    'names before arguments',
    'mistral',
    `One moment.[TOOL_CALLS]get_weather[ARGS]${PARIS}[TOOL_CALLS]f[CALL_ID]abc123def[ARGS]{}`,
    [content('One moment.'), ...call('get_weather', PARIS), ...call('f', '{}')],
  ],
  ['a name that is none', 'mistral', '[TOOL_CALLS]get weather{}', [content('[TOOL_CALLS]get weather{}')]],
  [
    'a list that breaks',
    'mistral',
    '[TOOL_CALLS][{"name": "f", "arguments": {}}, oh',
    [...call('f', '{}'), content(', oh')],
  ],
];

describe('calls', () => {
  it.each(CASES)('%s (%s)', (_, dialect, text, expected) => {
    expect(parse(parsingOf(dialect), [text])).toEqual(expected);
    expect(parse(parsingOf(dialect), [...text])).toEqual(expected);
  });

  it('sends the name before the arguments, and these as they come', () => {
    const parser = createParser(parsingOf('hermes'));
    const pieces = [
      '<tool_call>\n{"name": "f',
      '", "arguments": {"a"',
      ': "long',
      ' text"}',
      '}\n</tool_call>',
    ];
    expect(pieces.map((piece) => parser.push(piece))).toEqual([
      [],
      call('f', '{"a"'),
      [{ type: 'arguments', text: ': "long' }],
      [{ type: 'arguments', text: ' text"}' }],
      [],
    ]);
    expect(parser.flush()).toEqual([]);
  });

  it('does not hold an answer in JSON back where it might have been a call', () => {
    const parser = createParser(parsingOf('llama3_json'));
    const pieces = ['{"', 'city', '": ', '"Oslo"'];
    expect(pieces.map((piece) => joined(parser.push(piece)))).toEqual([
      [],
      [],
      [content('{"city":')],
      [content(' "Oslo"')],
    ]);
    const other = createParser(parsingOf('llama3_json'));
    expect(joined(other.push('{"name": "Alice", "age"'))).toEqual([content('{"name": "Alice", "age"')]);
  });

  it('says the same of any output, however it is cut, and its arguments are JSON', () => {
    const piece = fc.constantFrom(
      ...[
        '<tool_call>',
        '</tool_call>',
        '<|python_tag|>',
        '[TOOL_CALLS]',
        '[ARGS]',
        '[CALL_ID]',
        '<think>',
        '</think>',
      ],
      ...[
        '{"name": "f", "arguments": {"a": 1}}',
        '{"name": "add", "parameters": {"x": {"y": []}}}',
        '{"name": "f"}',
        'f',
      ],
      ...[
        '{',
        '}',
        '[',
        ']',
        '"',
        ',',
        ':',
        ';',
        '\\',
        '\\u00',
        ' ',
        '\n',
        '-',
        '1.5e3',
        'true',
        'a',
        '🐉',
        '{"a": "b"}',
      ],
      ...['"name": "f", ', '"arguments": {', '<tool', '_call>', '</'],
    );
    const texts = fc.array(piece, { maxLength: 14 }).map((pieces) => pieces.join(''));
    const cuts = fc.array(fc.integer({ min: 1, max: 7 }), { minLength: 1, maxLength: 8 });
    const parsings = fc.record({
      dialect: fc.constantFrom(...CALL_DIALECTS),
      single: fc.boolean(),
      reasoning: fc.option(fc.record({ dialect: fc.constant('qwen3' as const), inside: fc.boolean() }), {
        nil: undefined,
      }),
    });
    fc.assert(
      fc.property(texts, cuts, parsings, (text, lengths, { dialect, single, reasoning }) => {
        const calls = { dialect, names: NAMES, single };
        const parsing = { calls, ...(reasoning && { reasoning }) };
        const pieces: string[] = [];
        for (let at = 0, i = 0; at < text.length; at += lengths[i++ % lengths.length]!) {
          pieces.push(text.slice(at, at + lengths[i % lengths.length]!));
        }
        const whole = parse(parsing, [text]);
        expect(parse(parsing, pieces)).toEqual(whole);
        if (single) expect(whole.filter(({ type }) => type === 'call').length).toBeLessThan(2);
        for (const [i, part] of whole.entries()) {
          if (part.type === 'arguments' && whole[i + 1]?.type !== 'broken')
            expect(JSON.parse(part.text)).toBeTypeOf('object');
        }
      }),
      { numRuns: 1_000 },
    );
  });

  it.each([
    [
      'hermes',
      `So. <tool_call>{"name": "f", "arguments": ${PARIS}}\n</tool_call>`,
      '\n<tool_call>{"name": "add"}',
    ],
    ['llama3_json', `{"name": "f", "parameters": ${PARIS}}`, '; {"name": "add", "parameters": {}}'],
    ['mistral', `So. [TOOL_CALLS][{"name": "f", "arguments": ${PARIS}}`, ', {"name": "add"}]'],
    ['mistral', `So. [TOOL_CALLS]f[ARGS]${PARIS}`, '[TOOL_CALLS]add[ARGS]{}'],
  ] as const)('is done behind the one that there may be (%s): %s', (dialect, first, more) => {
    const parsing = { calls: { dialect, names: NAMES, single: true } };
    for (const size of [1, 3, 1_000]) {
      const parser = createParser(parsing);
      const text = first + more;
      const parts: Part[] = [];
      let at = 0;
      for (; at < text.length && !parser.done; at += size)
        parts.push(...parser.push(text.slice(at, at + size)));
      expect([parser.done, Math.min(at, text.length)]).toEqual([
        true,
        Math.min(Math.ceil(first.length / size) * size, text.length),
      ]);
      parts.push(...parser.push(more), ...parser.flush());
      expect(joined(parts).filter(({ type }) => type !== 'content')).toEqual(call('f', PARIS));
    }
  });

  it.each(['\n<tool_call>', '</toolx'])(
    'leave nothing of what follows the one that there may be: %s',
    (more) => {
      const parsing: Parsing = { calls: { dialect: 'hermes', names: NAMES, single: true } };
      const text = `<tool_call>{"name": "f", "arguments": ${PARIS}}${more}`;
      for (const pieces of [[text], [...text]]) expect(parse(parsing, pieces)).toEqual(call('f', PARIS));
    },
  );

  it('are text behind one that broke, where there may be one', () => {
    const bad = '<tool_call>{"name": "f", "arguments": {"a": oops';
    const text = `${bad}}}</tool_call><tool_call>{"name": "f"}</tool_call>`;
    const parsing: Parsing = { calls: { dialect: 'hermes', names: NAMES, single: true } };
    for (const pieces of [[text], [...text]])
      expect(parse(parsing, pieces)).toEqual([
        ...call('f', '{"a": oops'),
        broken(bad),
        content(text.slice(bad.length)),
      ]);
    const { done } = createParser(parsing);
    expect(done).toBe(false);
  });

  it('are told by the template', () => {
    expect(dialectOf("{%- if tools %}<tool_call>{{ '...' }}")).toBe('hermes');
    expect(dialectOf('<tool_call><function={{ name }}>')).toBeUndefined();
    expect(dialectOf("{{- '<|start_header_id|>' }}{{ '\"parameters\": ' }}")).toBe('llama3_json');
    expect(dialectOf('[AVAILABLE_TOOLS][TOOL_CALLS]')).toBe('mistral');
    expect(dialectOf('{{ messages }}')).toBeUndefined();
  });
});

describe('JsonScanner', () => {
  const ends = (text: string) => {
    const scanner = new JsonScanner();
    for (const char of text) scanner.push(char);
    return scanner.state;
  };

  it('closes at the end of what JSON.parse takes, and nowhere else', () => {
    const value = fc.dictionary(fc.string(), fc.jsonValue());
    fc.assert(
      fc.property(value, fc.boolean(), (json, spaced) => {
        const text = JSON.stringify(json, null, spaced ? 2 : 0);
        expect(ends(text)).toBe('closed');
        expect(ends(text.slice(0, -1))).toBe('open');
      }),
    );
    const broken = [
      '[1]',
      '{1',
      '{"a" 1',
      '{"a": 01}',
      '{"a": nul}',
      '{"a": 1,}',
      '{,',
      '{"a": [1}',
      '{"a": "\n',
      '{"a": "\\x',
      '{"\\u00g',
    ];
    for (const text of broken) expect([text, ends(text)]).toEqual([text, 'broken']);
    expect(ends('{"a":'.repeat(300))).toBe('broken');
  });

  it('agrees with JSON.parse on any text', () => {
    const char = fc.constantFrom(...'{}[]":,\\u0a1-.eE+ \n'.split(''), 'true', 'null', '"a"', '"a":');
    fc.assert(
      fc.property(fc.array(char, { maxLength: 12 }), (chars) => {
        const text = `{${chars.join('')}`;
        const scanner = new JsonScanner();
        let closedAt: number | undefined;
        for (let i = 0; i < text.length && closedAt === undefined; i++) {
          scanner.push(text[i]!);
          if (scanner.state === 'closed') closedAt = i + 1;
        }
        const valid = (part: string) => {
          try {
            return JSON.parse(part) !== undefined;
          } catch {
            return false;
          }
        };
        if (closedAt !== undefined) expect(valid(text.slice(0, closedAt))).toBe(true);
        else for (let i = 1; i <= text.length; i++) expect(valid(text.slice(0, i))).toBe(false);
      }),
      { numRuns: 2_000 },
    );
  });
});
