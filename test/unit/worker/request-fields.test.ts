/** What bodies ask of the core, and what is said of fields that are wrong, by the demo model's tokenizer. */
import { beforeAll, describe, expect, it } from 'vitest';
import { demoModelDir } from '../../../src/config/demo-model.ts';
import { Tokenizer } from '../../../src/model/tokenizer.ts';
import { readRequestBody } from '../../../src/worker/request-body-reader.ts';

const SERVED = { modelNames: ['demo'], maxModelLen: 2_048, vocabSize: 2_048 };

let tokenizer: Tokenizer;
beforeAll(async () => {
  tokenizer = await Tokenizer.load(demoModelDir());
});

const read = (route: 'completions' | 'chat' | 'responses', body: object) =>
  readRequestBody(SERVED, tokenizer, route, new TextEncoder().encode(JSON.stringify(body)));
const ask = (body: object) => read('completions', { prompt: 'Hi', ...body }).asked;
const user = (content: unknown) => [{ role: 'user', content }];
const IMAGE = [
  { type: 'text', text: 'See' },
  { type: 'image_url', image_url: { url: 'data:,' } },
];

describe('a field that is wrong', () => {
  it.each([
    ['chat', { messages: user(IMAGE) }, 'messages.0.content: a part of type image_url is not supported'],
    ['chat', { messages: user([{ type: 'text' }]) }, 'messages.0.content: a part of type text has no text'],
    ['chat', { messages: user(5) }, 'messages.0.content: expected text, or a list'],
    ['responses', { input: user(IMAGE) }, 'input.0.content: a part of type image_url is not supported'],
    [
      'completions',
      { prompt: 'a', stop: Array.from('abcdefghijklmnopq') },
      'stop: more than 16 stop strings',
    ],
    ['completions', { prompt: 'a', stop: [1] }, 'stop: expected a string, or a list of strings'],
    ['completions', { prompt: 'a', seed: 2 ** 65 }, 'seed: Too big'],
    ['completions', { prompt: 'a', seed: 0.5 }, 'seed: expected an integer'],
    [
      'completions',
      { prompt: 'a', logit_bias: { 99999999999: 1 } },
      'token id 99999999999 is not in the vocab',
    ],
    ['completions', { prompt: 'a', logit_bias: { x: 1 } }, 'logit_bias.x: expected token ids as keys'],
    ['responses', { input: 'a', include: ['zz'] }, 'include.0: "zz" is not supported; supported are code_'],
    ['chat', { messages: user('a'), function_call: { name: 'f' } }, 'only "none" or "auto" is'],
  ] as const)('of %s is told as what it is: %j', (route, body, message) => {
    expect(() => read(route, body)).toThrow(message);
  });

  it('has a name that is cut where it is very long, as a model has', () => {
    const long = 'x'.repeat(100_000);
    const tools = [{ type: 'function', function: { name: 'f' } }];
    const named = { type: 'function', function: { name: long } };
    const served = { ...SERVED, calls: 'hermes' } as const;
    for (const change of [{ model: long }, { logit_bias: { [long]: 1 } }, { tools, tool_choice: named }]) {
      const body = new TextEncoder().encode(JSON.stringify({ messages: user('a'), ...change }));
      expect(() => readRequestBody(served, tokenizer, 'chat', body)).toThrow(/^(?=.*x{180}).{200,300}$/);
    }
  });

  it.each([
    ['structured_outputs', { [`${'x'.repeat(100_000)}`]: 1 }],
    ['structured_outputs', Object.fromEntries(Array.from({ length: 10_000 }, (_, i) => [`field_${i}`, 1]))],
  ])('has its own names told as far as anybody reads them: %s', (field, value) => {
    expect(() => read('chat', { messages: user('a'), [field]: value })).toThrow(
      /^structured_outputs: .{100,1000}$/,
    );
  });

  it('is no value of include that OpenAI names', () => {
    const include = ['reasoning.encrypted_content', 'message.output_text.logprobs'];
    expect(read('responses', { input: 'a', include }).asked.sampling.logprobs).toBe(0);
  });

  it('of a response has the name that it has there', () => {
    const tools = [{ type: 'function', function: { name: 'f' } }];
    expect(() => read('responses', { input: 'a', tools })).toThrow('tools.0.name: Invalid input');
    const schema = { type: 'json_schema', name: 'n', schema: { type: 'object' } };
    const { asked } = read('responses', { input: 'a', text: { format: schema } });
    expect(asked.grammarWish).toMatchObject({ param: 'text.format', spec: { schema: schema.schema } });
    const call = { type: 'function_call', name: 'f', arguments: '{' };
    const input = [{ role: 'user', content: 'a' }, { role: 'assistant', content: 'b' }, call];
    expect(() => read('responses', { instructions: 'i', input })).toThrow(
      'input.2.arguments: expected a JSON',
    );
    expect(() => read('responses', { instructions: 'i', input: user(IMAGE) })).toThrow(
      'input.0.content: a part',
    );
    expect(() => read('responses', { input: 'a', text: { format: { type: 'xml' } } })).toThrow(
      'text.format.type: "xml" is not supported',
    );
  });
});

it('a choice of a tool goes on as its name alone: what stands beside it may be nested deeper than threads can tell each other', () => {
  const tools = [{ type: 'function', function: { name: 'f' } }];
  const named = { type: 'function', function: { name: 'f' } };
  const tool_choice = { ...named, x: [[]] };
  const served = { ...SERVED, calls: 'hermes' } as const;
  const body = new TextEncoder().encode(JSON.stringify({ messages: user('a'), tools, tool_choice }));
  expect(readRequestBody(served, tokenizer, 'chat', body).body.tool_choice).toEqual(named);
});

it('a body that is no UTF-8 is refused, and a byte order mark is passed over', () => {
  const body = new TextEncoder().encode('\ufeff{"prompt":"a"}');
  expect(readRequestBody(SERVED, tokenizer, 'completions', body).asked.prompts).toHaveLength(1);
  const broken = body.map((byte) => (byte === 0x61 ? 0xff : byte));
  expect(() => readRequestBody(SERVED, tokenizer, 'completions', broken)).toThrow('not valid JSON: ');
});

it('a bad word is banned at the beginning of a text and behind a space, however many tokens it is there', () => {
  const encode = (text: string) => tokenizer.encode(text, { addSpecialTokens: false });
  expect(encode('Paris').length).not.toBe(encode(' Paris').length);
  expect(ask({ bad_words: ['Paris'] }).sampling.badWords).toEqual([encode('Paris'), encode(' Paris')]);
});

it('long lists are refused where there are many prompts, each of which has them', () => {
  const served = { ...SERVED, vocabSize: 200_000 };
  const allowed_token_ids = Array.from({ length: 200_000 }, (_, id) => id);
  const ask = (prompts: number) => {
    const body = { prompt: Array(prompts).fill([1]), allowed_token_ids };
    return readRequestBody(served, tokenizer, 'completions', new TextEncoder().encode(JSON.stringify(body)));
  };
  expect(ask(20).asked.prompts).toHaveLength(20);
  expect(() => ask(21)).toThrow('prompt: allowed_token_ids, logit_bias,');
});

it('a seed of 64 bits is taken, and two of them are two', () => {
  const seeds = ['9223372036854775807', '-9223372036854775808', '9007199254740994'].map((seed) => {
    const body = new TextEncoder().encode(`{"prompt":"Hi","seed":${seed}}`);
    return readRequestBody(SERVED, tokenizer, 'completions', body).asked.sampling.seed!;
  });
  expect(seeds.every(Number.isSafeInteger)).toBe(true);
  expect(new Set(seeds).size).toBe(3);
  expect(ask({ seed: -5 }).sampling.seed).toBe(-5);
});
