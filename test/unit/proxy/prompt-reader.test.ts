/** The proxy makes of a prompt what a worker with the same tokenizer makes of it. */
import { beforeAll, expect, test } from 'vitest';
import { demoModelDir } from '../../../src/config/demo-model.ts';
import { type BlockHash, extendHashes, keyOf } from '../../../src/kv/block-hash.ts';
import { Tokenizer } from '../../../src/model/tokenizer.ts';
import { readBody as readAtProxy } from '../../../src/proxy/body.ts';
import { PromptReader } from '../../../src/proxy/prompt-reader.ts';
import { type Route, readRequestBody } from '../../../src/worker/request-body-reader.ts';

const DIR = demoModelDir();
const PATHS = { completions: '/v1/completions', chat: '/v1/chat/completions', responses: '/v1/responses' };

let reader: PromptReader;
let tokenizer: Tokenizer;
beforeAll(async () => {
  [reader, tokenizer] = await Promise.all([PromptReader.load(DIR), Tokenizer.load(DIR)]);
});

const bytes = (body: object) => new TextEncoder().encode(JSON.stringify(body));
const say = (content: string, role = 'user') => ({ role, content });

function atWorker(route: Exclude<Route, 'tokenize' | 'detokenize'>, body: object, more: object = {}) {
  const served = { modelNames: ['demo'], maxModelLen: 4_096, vocabSize: 1_000_000, ...more };
  const { asked } = readRequestBody(served, tokenizer, route, bytes(body));
  return asked.prompts.map(({ tokens }) => [...tokens]);
}

function atProxy(route: keyof typeof PATHS, body: object) {
  const wanted = { text: true, blockSizes: [16], ids: true };
  const path = PATHS[route];
  return readAtProxy(bytes(body), wanted, (model) => reader.idsOf(path, bytes(body), model));
}

const STORY = 'Once upon a time there was a river that ran uphill, and nobody knew why. '.repeat(8);

test.each([
  ['completions', { prompt: STORY }],
  ['completions', { prompt: [STORY], model: 'demo', max_tokens: 8, bad_words: ['river'] }],
  ['completions', { prompt: STORY, add_special_tokens: false }],
  ['chat', { messages: [say('Be brief.', 'system'), say(STORY), say('Why?', 'assistant'), say('Go on')] }],
  [
    'chat',
    { messages: [say(STORY)], chat_template_kwargs: { x: 1 }, max_completion_tokens: 9, model: 'demo' },
  ],
  ['chat', { messages: [say(STORY), say('It was', 'assistant')], continue_final_message: true }],
  ['responses', { input: STORY, instructions: 'Be brief.' }],
] as const)('%s %j', (route, body) => {
  const [tokens] = atWorker(route, body);
  const read = atProxy(route, body);
  expect([...read.ids!]).toEqual(tokens);
  expect(read.tokens).toBe(tokens!.length);
  const hashes: BlockHash[] = [];
  extendHashes(hashes, Int32Array.from(tokens!), 16);
  expect(hashes.length).toBeGreaterThan(2);
  expect(read.blockKeys.get(16)).toEqual(hashes.map(keyOf));
});

test('a worker that is given the ids reads them, and all else of the body', () => {
  const body = { prompt: STORY, max_tokens: 5, echo: true };
  const promptIds = Uint32Array.of(5, 6, 7);
  const served = { modelNames: ['demo'], maxModelLen: 4_096, vocabSize: 1_000, promptIds };
  const { asked } = readRequestBody(served, tokenizer, 'completions', bytes(body));
  expect([[...asked.prompts[0]!.tokens], asked.prompts[0]!.text, asked.maxTokens]).toEqual([
    [5, 6, 7],
    STORY,
    5,
  ]);
  expect(() =>
    readRequestBody({ ...served, promptIds: Uint32Array.of(1_000) }, tokenizer, 'completions', bytes(body)),
  ).toThrow('not in the vocabulary');
});

test.each([
  ['several prompts', 'completions', { prompt: [STORY, STORY] }],
  [
    'one that is cut off at the front, by as much as a worker decides',
    'completions',
    { prompt: STORY, truncate_prompt_tokens: -1 },
  ],
  ['one that a worker refuses', 'chat', { messages: [{ role: 'user', content: 7 }] }],
  ['ids, which need no tokenizer', 'completions', { prompt: [1, 2, 3] }],
] as const)('%s: not tokenized', (_, route, body) => {
  expect(atProxy(route, body).ids).toBeUndefined();
});
