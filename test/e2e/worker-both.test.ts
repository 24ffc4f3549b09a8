import { once } from 'node:events';
import { createServer } from 'node:net';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { demoModelDir } from '../../src/config/demo-model.ts';
import { formatHostPort } from '../../src/net/address.ts';
import { PdWorker } from '../../src/worker/worker.ts';
import { Program } from '../support/process.ts';
import { resolveFlags } from '../support/worker-flags.ts';

interface Choice {
  readonly index: number;
  readonly text: string;
  readonly message: {
    readonly content: string;
    readonly tool_calls?: readonly {
      readonly id: string;
      readonly function: { readonly name: string; readonly arguments: string };
    }[];
  };
  readonly finish_reason: string;
  readonly logprobs: {
    readonly tokens: readonly string[];
    readonly token_logprobs: readonly (number | null)[];
    readonly text_offset: readonly number[];
  };
}
interface Answer {
  readonly choices: readonly Choice[];
  readonly usage: { readonly prompt_tokens: number; readonly completion_tokens: number };
  readonly error: { readonly message: string };
  readonly tokens: readonly number[];
}

/** The runbook's. */
const PROMPTS: readonly (readonly [prompt: string, maxTokens: number])[] = [
  ['Hello world', 10],
  ['What is the capital of France?', 8],
  ['def fibonacci(n):\n    if n <= 1:\n        return n\n    else:\n        return', 12],
  ['Once upon a time in a magical forest, there lived a wise old dragon who', 20],
];

/** As OpenAI's API has it, of one string. */
function toolOf(name: string, description: string, key: string) {
  const parameters = { type: 'object', properties: { [key]: { type: 'string' } }, required: [key] };
  return { type: 'function', function: { name, description, parameters } };
}

/** By the time it may end, its text can be read in too many ways. */
const AMBIGUOUS = { regex: '(a{1,300}){200,400}' };

describe('an undivided worker with the demo model', () => {
  let worker: PdWorker;
  let url: string;
  beforeAll(async () => {
    const args = ['--device', 'host', '--port', '0', '--host', '127.0.0.1', '--log-level', 'silent'];
    worker = await PdWorker.start(resolveFlags(args, { env: {}, demoModelDir }).config);
    url = `http://${formatHostPort(worker.httpAddress)}`;
  });
  afterAll(() => worker.close(0));

  const ask = async (path: string, body: object): Promise<Answer> => {
    const response = await fetch(`${url}${path}`, {
      method: 'POST',
      headers: { 'content-type': 'application/json' },
      body: JSON.stringify(body),
    });
    return (await response.json()) as Answer;
  };
  const complete = (body: object) => ask('/v1/completions', { model: 'demo', temperature: 0, ...body });

  it('completes the four prompts of the runbook, alone and together', async () => {
    const alone = [];
    for (const [prompt, max_tokens] of PROMPTS) {
      const { choices, usage } = await complete({ prompt, max_tokens });
      expect(choices[0]!.text.length).toBeGreaterThan(0);
      expect(usage.completion_tokens).toBeLessThanOrEqual(max_tokens);
      alone.push(choices[0]!.text);
    }
    expect(alone[1]).toContain('Paris');
    const together = await complete({ prompt: PROMPTS.map(([prompt]) => prompt), max_tokens: 8 });
    for (const [i, { text }] of together.choices.entries()) {
      expect(text.startsWith(alone[i]!) || alone[i]!.startsWith(text)).toBe(true);
    }
  });

  it('takes token ids for text', async () => {
    const [prompt] = PROMPTS[1]!;
    const { tokens } = await ask('/tokenize', { prompt });
    const text = await complete({ prompt, max_tokens: 8 });
    const ids = await complete({ prompt: tokens, max_tokens: 8 });
    const lists = await complete({ prompt: [tokens, tokens], max_tokens: 8 });
    expect(ids.choices[0]!.text).toBe(text.choices[0]!.text);
    expect(lists.choices.map((choice) => choice.text)).toEqual([
      text.choices[0]!.text,
      text.choices[0]!.text,
    ]);
    expect(lists.usage.prompt_tokens).toBe(2 * tokens.length);
  });

  it('chats', async () => {
    const messages = [{ role: 'user', content: 'What is the capital of France?' }];
    const answer = await ask('/v1/chat/completions', { messages, temperature: 0, max_tokens: 30 });
    expect(answer.choices[0]!.message.content).toContain('Paris');
    expect(answer.choices[0]!.finish_reason).toBe('stop');
  });

  it.each([
    ['What is the capital of France? Answer in JSON.', '{"capital": "Paris"}'],
    [
      'What is the capital of Norway? Answer in JSON with country and capital.',
      '{"country": "Norway", "capital": "Oslo"}',
    ],
    ['What is 3 + 4? Answer in JSON.', '{"sum": 7}'],
    ['What is the weather in Paris?', 'I cannot see the weather without a tool.'],
  ])('answers %j', async (content, expected) => {
    const messages = [{ role: 'user', content }];
    const answer = await ask('/v1/chat/completions', { messages, temperature: 0, max_tokens: 40 });
    expect(answer.choices[0]).toMatchObject({ message: { content: expected }, finish_reason: 'stop' });
  });

  it.each([
    [
      'What is the weather in Oslo?',
      { name: 'get_weather', arguments: { city: 'Oslo' } },
      '{"temperature": -3, "condition": "snowy"}',
      'It is -3 degrees and snowy in Oslo.',
    ],
    [
      'What is the capital of Japan?',
      { name: 'get_capital', arguments: { country: 'Japan' } },
      'Kyoto', // what the tool says goes before what the model knows
      'The capital of Japan is Kyoto.',
    ],
    ['How are you?', undefined, '', 'I am fine, thank you. How can I help you?'],
  ])('with tools, answers %j', async (content, call, result, expected) => {
    const tools = [
      toolOf('get_weather', 'Get the weather for a city', 'city'),
      toolOf('get_capital', 'Get the capital of a country', 'country'),
    ];
    const next = async (messages: readonly object[]) => {
      const { choices } = await ask('/v1/chat/completions', {
        messages,
        tools,
        temperature: 0,
        max_tokens: 60,
      });
      return choices[0]!;
    };
    const question = { role: 'user', content };
    let answer = await next([question]);
    if (call) {
      expect(answer.finish_reason).toBe('tool_calls');
      const { tool_calls: calls = [] } = answer.message;
      const made = calls.map(({ function: { name, arguments: text } }) => ({
        name,
        arguments: JSON.parse(text),
      }));
      expect(made).toEqual([call]);
      answer = await next([
        question,
        answer.message,
        { role: 'tool', tool_call_id: calls[0]!.id, content: result },
      ]);
    }
    expect(answer).toMatchObject({ finish_reason: 'stop', message: { content: expected } });
  });

  it('gives n completions of one prompt, the same again with the same seed', async () => {
    const body = { prompt: 'Once upon a time', n: 3, temperature: 1, seed: 7, max_tokens: 12 };
    const first = await complete(body);
    const again = await complete(body);
    const texts = first.choices.map((choice) => choice.text);
    expect(first.choices.map((choice) => choice.index)).toEqual([0, 1, 2]);
    expect(new Set(texts).size).toBeGreaterThan(1);
    expect(again.choices.map((choice) => choice.text)).toEqual(texts);
  });

  it('echoes with log-probabilities whose offsets lie in the text', async () => {
    const body = { prompt: 'What is the capital of France?', echo: true, logprobs: 1, max_tokens: 4 };
    const { choices, usage } = await complete(body);
    const { text, logprobs } = choices[0]!;
    expect(logprobs.tokens).toHaveLength(usage.prompt_tokens + usage.completion_tokens);
    expect(logprobs.token_logprobs.slice(1).every((logprob) => logprob !== null && logprob <= 0)).toBe(true);
    for (const [i, offset] of logprobs.text_offset.entries()) {
      if (i > 0) expect(text.startsWith(logprobs.tokens[i]!, offset)).toBe(true);
    }
  });

  it('holds its text to a form, in each completion and whole at its end', async () => {
    const schema = {
      type: 'object',
      properties: { city: { type: 'string', maxLength: 12 }, size: { enum: ['small', 'large'] } },
      required: ['city', 'size'],
      additionalProperties: false,
    };
    const messages = [{ role: 'user', content: 'What is the capital of France?' }];
    const chat = { messages, temperature: 1.5, seed: 5, n: 3, max_tokens: 200 };
    const response_format = { type: 'json_schema', json_schema: { name: 'city', schema, strict: true } };
    const cities = await ask('/v1/chat/completions', { ...chat, response_format });
    expect(cities.choices).toHaveLength(3);
    for (const { message, finish_reason } of cities.choices) {
      const said = JSON.parse(message.content) as { city: string; size: string };
      expect([Object.keys(said), finish_reason]).toEqual([['city', 'size'], 'stop']);
      expect([said.city.length <= 12, ['small', 'large'].includes(said.size)]).toEqual([true, true]);
    }
    const forms: readonly (readonly [RegExp, object])[] = [
      [/^(yes|no)$/, { structured_outputs: { choice: ['yes', 'no'] } }],
      [/^\d{3}-[a-f]{2}$/, { guided_regex: '\\d{3}-[a-f]{2}', ignore_eos: true }],
      [
        /^(ab)+;$/,
        { structured_outputs: { grammar: 'root ::= pair{5,9} ";"\npair ::= "ab"' }, min_tokens: 9 },
      ],
    ];
    for (const [pattern, form] of forms) {
      const { choices } = await complete({
        prompt: 'Say it:',
        temperature: 0.8,
        seed: 3,
        max_tokens: 300,
        ...form,
      });
      expect(choices[0]).toMatchObject({ text: expect.stringMatching(pattern), finish_reason: 'stop' });
    }
    const sum = await ask('/v1/chat/completions', {
      messages: [{ role: 'user', content: 'What is 3 + 4? Answer in JSON.' }],
      temperature: 0,
      max_tokens: 30,
      response_format: { type: 'json_object' },
    });
    expect(sum.choices[0]).toMatchObject({ message: { content: '{"sum": 7}' }, finish_reason: 'stop' });
  });

  it('calls the tool that it has to, whatever it would have said', async () => {
    const tools = [
      toolOf('get_weather', 'Get the weather for a city', 'city'),
      toolOf('get_capital', 'Get the capital of a country', 'country'),
    ];
    const messages = [{ role: 'user', content: 'How are you?' }];
    const choices: readonly (readonly [unknown, RegExp])[] = [
      ['required', /^get_(weather|capital)$/],
      [{ type: 'function', function: { name: 'get_capital' } }, /^get_capital$/],
    ];
    for (const [tool_choice, name] of choices) {
      const asked = { messages, tools, tool_choice, temperature: 1.5, seed: 7, max_tokens: 400 };
      const { choices } = await ask('/v1/chat/completions', asked);
      const [choice] = choices as unknown as readonly {
        readonly finish_reason: string;
        readonly message: {
          readonly content: string | null;
          readonly tool_calls: readonly {
            readonly function: { readonly name: string; readonly arguments: string };
          }[];
        };
      }[];
      expect([choice!.finish_reason, choice!.message.content]).toEqual(['tool_calls', null]);
      for (const { function: called } of choice!.message.tool_calls) {
        expect(called.name).toMatch(name);
        const key = called.name === 'get_weather' ? 'city' : 'country';
        expect(JSON.parse(called.arguments)).toMatchObject({ [key]: expect.any(String) });
      }
    }
  });

  it('refuses a form that cannot be kept, and lives', async () => {
    const bad: readonly (readonly [string, object])[] = [
      ['"contains" at #/properties/a', { guided_json: { properties: { a: { contains: {} } } } }],
      ['the grammar is too large', { structured_outputs: { regex: '((a{1,999}b){1,999}c){1,999}' } }],
      ['is not allowed beside', { guided_regex: 'a', response_format: { type: 'json_object' } }],
      ['recurs on its left', { guided_grammar: 'root ::= a "x"\na ::= root?' }],
      ['allowed_token_ids: no token is left', { guided_choice: ['{'], allowed_token_ids: [5] }],
      ['structured_outputs.regex: the grammar is too', { structured_outputs: AMBIGUOUS, max_tokens: 400 }],
    ];
    for (const [why, form] of bad) {
      const { error } = await complete({ prompt: 'a', ...form });
      expect(error).toMatchObject({ message: expect.stringContaining(why), code: 'REQUEST_INVALID' });
      const [param] = /^[\w.]+(?=: )/.exec(why) ?? [expect.any(String)];
      expect(error).toMatchObject({ param, message: expect.not.stringContaining('cmpl-') });
    }
    const tools = [toolOf('f', 'Does it', 'a')];
    const format = { type: 'json_schema', name: 'n', schema: { type: 'nonsense' } };
    const forced = {
      input: 'a',
      tools: [{ type: 'function', ...tools[0]!.function }],
      tool_choice: 'required',
    };
    expect(await ask('/v1/responses', { ...forced, text: { format } })).toMatchObject({
      error: { param: 'text.format', message: expect.stringContaining('"type" at #') },
    });
    const response_format = { type: 'json_schema', json_schema: format };
    const chat = { messages: [{ role: 'user', content: 'a' }], tools, tool_choice: 'required' };
    expect(await ask('/v1/chat/completions', { ...chat, response_format })).toMatchObject({
      error: { param: 'response_format', message: expect.stringContaining('"type" at #') },
    });
    expect((await complete({ prompt: 'a', max_tokens: 2 })).choices).toHaveLength(1);
  });

  it('ends at a stop string, and gives every block back', async () => {
    const { choices } = await complete({
      prompt: 'What is the capital of France?',
      max_tokens: 8,
      stop: ' capital',
    });
    expect(choices[0]).toMatchObject({ text: ' Paris is the', finish_reason: 'stop' });
    // The text is cut in the HTTP server: the answer is out before the core has heard of it.
    await expect
      .poll(() => worker.state(), { timeout: 60_000 })
      .toMatchObject({ running: 0, waiting: 0, blocks: { used: 0 }, integrity: [] });
  });
});

describe('pd-worker', () => {
  it('says what is wrong in one line, and exits 1', async () => {
    const program = new Program('pd-worker', ['--send-type', 'POST']);
    if (!program.exited) await once(program.child, 'close');
    expect(program.child.exitCode).toBe(1);
    expect(program.tail()).toMatch(
      /^\n?pd-worker: CONFIG_INVALID: --send-type: "POST" is not allowed; expected one of PUT, PUT_ASYNC, GET\n/,
    );
    expect(program.tail()).not.toContain('    at ');
  });

  it('names the port that is taken', async () => {
    const holder = createServer().listen(0, '127.0.0.1');
    await once(holder, 'listening');
    const address = holder.address();
    const port = typeof address === 'object' && address ? address.port : 0;
    const program = new Program('pd-worker', [
      '--device',
      'host',
      '--host',
      '127.0.0.1',
      '--port',
      `${port}`,
    ]);
    if (!program.exited) await once(program.child, 'close');
    holder.close();
    expect(program.child.exitCode).toBe(1);
    expect(program.tail()).toContain(`PORT_IN_USE: HTTP server: port ${port} on 127.0.0.1 is held by`);
  });

  it('serves until SIGTERM, then exits 0', async () => {
    const args = ['--device', 'host', '--host', '127.0.0.1', '--port', '0', '--log-format', 'json'];
    const program = new Program('pd-worker', args);
    const [, url] = await program.line(/Running on (http:\/\/\S+)/);
    expect((await fetch(`${url}/health`)).status).toBe(200);
    expect(await program.stop('SIGTERM')).toBe(0);
    expect(program.lines.at(-1)!.msg).toBe('Stopped');
  });
});
