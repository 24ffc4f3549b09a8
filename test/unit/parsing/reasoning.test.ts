import fc from 'fast-check';
import { expect, it } from 'vitest';
import { createParser } from '../../../src/parsing/parser.ts';
import { opensThoughts, reasoningOf } from '../../../src/parsing/reasoning.ts';

/** Thoughts, answer, and the calls in it. */
function read(pieces: readonly string[], inside = false) {
  const parser = createParser({
    calls: { dialect: 'hermes', names: [] },
    reasoning: { dialect: 'qwen3', inside },
  });
  const parts = [...pieces.flatMap((piece) => parser.push(piece)), ...parser.flush()];
  const of = (type: string) =>
    parts.map((part) => (part.type === type && 'text' in part ? part.text : '')).join('');
  return [of('reasoning'), of('content'), parts.flatMap((part) => (part.type === 'call' ? [part.name] : []))];
}

const CASES: readonly (readonly [text: string, inside: boolean, expected: readonly unknown[]])[] = [
  ['<think>\nwell <b>\n\n</think>\n\nParis. ', false, ['well <b>', 'Paris. ', []]],
  ['well\n</think>Paris', true, ['well', 'Paris', []]],
  [' <think>again</think> x', true, ['again', 'x', []]],
  [' no thoughts', false, ['', ' no thoughts', []]],
  ['<think>never ends </thi', false, ['never ends </thi', '', []]],
  ['<thi', false, ['', '<thi', []]],
  ['<thi', true, ['<thi', '', []]],
  ['<think></think>', false, ['', '', []]],
  [
    '<think>call <tool_call>{"name": "no", "arguments": {}}</tool_call>?</think>\n<tool_call>{"name": "f", "arguments": {}}</tool_call>',
    false,
    ['call <tool_call>{"name": "no", "arguments": {}}</tool_call>?', '', ['f']],
  ],
];

it.each(CASES)('tells thoughts from the answer: %j, inside: %s', (text, inside, expected) => {
  expect(read([text], inside)).toEqual(expected);
  expect(read([...text], inside)).toEqual(expected);
});

it('does not hang on how the text is cut', () => {
  const piece = fc.constantFrom(
    '<think>',
    '</think>',
    ' ',
    '\n',
    'a',
    '<',
    '<th',
    'ink>',
    '</',
    'think>',
    'b c',
  );
  fc.assert(
    fc.property(fc.array(piece, { maxLength: 12 }), fc.boolean(), (pieces, inside) => {
      expect(read(pieces, inside)).toEqual(read([pieces.join('')], inside));
    }),
  );
});

it('looks at template and prompt', () => {
  expect(reasoningOf("content.split('</think>')")).toBe('qwen3');
  expect(reasoningOf('[THINK]a[/THINK]')).toBe('mistral');
  expect(reasoningOf('<tool_call>')).toBeUndefined();
  expect(opensThoughts('qwen3', '<|assistant|><think>\n')).toBe(true);
  expect(opensThoughts('qwen3', '<|assistant|><think>\n\n</think>\n\n')).toBe(false);
  expect(opensThoughts('qwen3', 'What is <think>?<|assistant|>')).toBe(false);
});
