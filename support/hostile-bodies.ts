/** Bodies whose fields explode, nest, repeat or name what is not there: each is refused at once, and nobody else's stream is held up. */

export interface HostileBody {
  readonly name: string;
  readonly path: '/v1/completions' | '/v1/chat/completions' | '/v1/responses';
  readonly body: () => string;
  /** The field that the error names; null where the body is no JSON. */
  readonly param: string | null;
  /** Time is spent on it before it is refused. */
  readonly costly?: true;
}

const MB = 2 ** 20;
const list = <T>(count: number, of: (i: number) => T): T[] => Array.from({ length: count }, (_, i) => of(i));

/** `inner` wrapped so many times, as JSON: too deep for a serializer. */
function deep(levels: number, [open, close]: readonly [string, string], inner: string): string {
  return open.repeat(levels) + inner + close.repeat(levels);
}

function completion(name: string, param: string, fields: () => string): HostileBody {
  return { name, path: '/v1/completions', param, body: () => `{"prompt":"a","max_tokens":4,${fields()}}` };
}

function held(
  name: string,
  kind: 'regex' | 'grammar' | 'json' | 'choice',
  value: () => unknown,
): HostileBody {
  const param = `structured_outputs.${kind}`;
  return completion(name, param, () => `"structured_outputs":{"${kind}":${JSON.stringify(value())}}`);
}

function schema(name: string, text: () => string, param = 'response_format'): HostileBody {
  const field = () =>
    `"response_format":{"type":"json_schema","json_schema":{"name":"x","schema":${text()}}}`;
  return completion(name, param, field);
}

function chat(name: string, param: string, fields: () => string): HostileBody {
  return {
    name,
    path: '/v1/chat/completions',
    param,
    body: () => `{"messages":[{"role":"user","content":"?"}],"max_tokens":4,${fields()}}`,
  };
}

const tools = (count: number, parameters: (i: number) => string) =>
  `[${list(count, (i) => `{"type":"function","function":{"name":"f${i}","parameters":${parameters(i)}}}`).join(',')}]`;

/** Definitions of which each holds the next one several times over, in `keyword`. */
function doubling(keyword: string, levels: number): string {
  const $defs = Object.fromEntries(
    list(levels, (i) => [
      `d${i}`,
      i === levels - 1
        ? { type: 'integer' }
        : { [keyword]: list(3, (k) => ({ $ref: `#/$defs/d${i + 1}`, title: `${i}.${k}`, minimum: i + k })) },
    ]),
  );
  return JSON.stringify({ $ref: '#/$defs/d0', $defs });
}

/** Up to a second is spent on each before it is refused. */
const COSTLY = [
  'a regex of a megabyte of groups',
  'a regex of counts of counts',
  'a regex with a count of options',
  'choices of a megabyte',
  'a schema nested 100,000 deep',
  'a schema of a megabyte of properties',
  'an enum of a megabyte',
  'a schema with a thousand million items',
  'a schema of oneOf that triples',
  'a schema of 2,000 alternatives that may all hold',
  'a pattern with a length',
  'patterns that all must match',
  'a tool whose parameters explode',
  '100,000 biases',
  'a million bad words',
  'a million stop tokens',
];

const BODIES: readonly HostileBody[] = [
  held('a regex of a megabyte of groups', 'regex', () => '('.repeat(MB)),
  held('a regex of nested groups', 'regex', () => `${'('.repeat(50_000)}a${')'.repeat(50_000)}`),
  held('a regex of counts of counts', 'regex', () => '((a{1,999}b){1,999}c){1,999}'),
  held('a regex with a count beyond all', 'regex', () => '(ab?){999999999}'),
  held('a regex of a megabyte of alternatives', 'regex', () => list(150_000, (i) => `a${i}`).join('|')),
  held('a regex of a megabyte of options', 'regex', () => '[ab]?'.repeat(MB / 5)),
  held('a regex with a count of options', 'regex', () => '(a?b?c?){40000}'),
  held('a grammar that goes left through others', 'grammar', () => 'root ::= a\na ::= b "x"\nb ::= a? "y"'),
  held('a grammar of a megabyte of rules', 'grammar', () =>
    list(40_000, (i) => `r${i} ::= "a" r${i + 1}`).join('\n'),
  ),
  held('a grammar that never ends', 'grammar', () => 'root ::= "a" root'),
  held('10,001 choices', 'choice', () => list(10_001, (i) => `choice ${i}`)),
  held('choices of a megabyte', 'choice', () => list(10_000, (i) => `${i}`.repeat(25))),
  schema('a schema of 500 nested objects', () =>
    deep(500, ['{"type":"object","properties":{"a":', '}}'], '{}'),
  ),
  schema('a schema nested 100,000 deep', () => deep(100_000, ['{"items":', '}'], '{}'), 'response_format'),
  schema('a schema that must hold itself', () =>
    JSON.stringify({ type: 'object', properties: { a: { $ref: '#' } }, required: ['a'] }),
  ),
  schema('a schema of a megabyte of properties', () =>
    JSON.stringify({
      type: 'object',
      properties: Object.fromEntries(list(30_000, (i) => [`name${i}`, { type: 'string', maxLength: i + 1 }])),
    }),
  ),
  schema('an enum of a megabyte', () => JSON.stringify({ enum: list(60_000, (i) => `value number ${i}`) })),
  schema('a schema with a thousand million items', () => JSON.stringify({ type: 'array', minItems: 1e9 })),
  schema('a schema of oneOf that triples', () => doubling('oneOf', 40)),
  schema('a schema of 2,000 alternatives that may all hold', () =>
    JSON.stringify({ oneOf: list(2_000, (i) => ({ type: 'object', properties: { [`a${i}`]: {} } })) }),
  ),
  schema('a pattern with a length', () =>
    JSON.stringify({ type: 'string', pattern: '(a|b)*a(a|b){30}$', maxLength: 400 }),
  ),
  schema('patterns that all must match', () =>
    JSON.stringify({ allOf: list(40, (i) => ({ type: 'string', pattern: `(a|b)*a(a|b){${i}}c` })) }),
  ),
  chat('a tool without a name', 'tools.0.function.name', () => '"tools":[{"type":"function","function":{}}]'),
  chat('10,000 tools', 'tools', () => `"tools":${tools(10_000, () => '{"type":"object"}')}`),
  chat('a tool whose parameters explode', 'tools', () => {
    const parameters = (i: number) =>
      JSON.stringify({
        properties: { a: { type: 'string', pattern: `(a|b)*a(a|b){${20 + i}}$`, maxLength: 400 } },
      });
    return `"tool_choice":"required","tools":${tools(1, parameters)}`;
  }),
  chat(
    'a tool that is not there',
    'tool_choice',
    () => `"tools":${tools(1, () => '{}')},"tool_choice":{"type":"function","function":{"name":"g"}}`,
  ),
  {
    ...completion('a bias that is NaN', '', () => '"logit_bias":{"5":NaN}'),
    param: null,
  },
  completion('a stop string of a megabyte', 'stop.0', () => `"stop":["${'a'.repeat(MB)}"]`),
  completion('a bias beyond all numbers', 'logit_bias.5', () => '"logit_bias":{"5":1e999}'),
  completion('a bias in words', 'logit_bias.5', () => '"logit_bias":{"5":"NaN"}'),
  completion('a bias of a token that is not there', 'logit_bias', () => '"logit_bias":{"99999999":1}'),
  completion(
    '100,000 biases',
    'logit_bias',
    () => `"logit_bias":${JSON.stringify(Object.fromEntries(list(100_000, (i) => [i, 1])))}`,
  ),
  completion(
    'an allowed token that is not there',
    'allowed_token_ids',
    () => '"allowed_token_ids":[99999999]',
  ),
  completion(
    'a million stop tokens',
    'stop_token_ids',
    () => `"stop_token_ids":${JSON.stringify(list(MB, (i) => i))}`,
  ),
  completion(
    'a million bad words',
    'bad_words',
    () => `"bad_words":${JSON.stringify(list(MB / 8, (i) => `w${i}`))}`,
  ),
  {
    name: 'prompt tokens that are not there',
    path: '/v1/completions',
    param: 'prompt',
    body: () => '{"prompt":[1,99999999],"max_tokens":4}',
  },
  {
    name: '100,000 messages',
    path: '/v1/chat/completions',
    param: 'messages',
    body: () => JSON.stringify({ messages: list(100_000, () => ({ role: 'user', content: 'a' })) }),
  },
  {
    name: '100,000 items of input',
    path: '/v1/responses',
    param: 'input',
    body: () => JSON.stringify({ input: list(100_000, () => ({ role: 'user', content: 'a' })) }),
  },
  completion('a field nested 10,000 levels deep', 'x', () => `"x":${deep(10_000, ['[', ']'], '')}`),
  {
    name: 'a response with metadata of 5,000 levels',
    path: '/v1/responses',
    param: 'metadata',
    body: () => `{"input":"?","metadata":${deep(5_000, ['[', ']'], '')}}`,
  },
  {
    name: 'a response with 10,000 tools',
    path: '/v1/responses',
    param: 'tools',
    body: () =>
      `{"input":"?","tools":[${list(10_000, (i) => `{"type":"function","name":"f${i}","parameters":{}}`).join(',')}]}`,
  },
];

export const HOSTILE_BODIES: readonly HostileBody[] = BODIES.map((one) =>
  COSTLY.includes(one.name) ? { ...one, costly: true } : one,
);

/**
 * Taken, as nothing in them says what they are: some are harmless, of some what may follow can be read in ever more ways. They may end early,
 * and hold nobody up.
 */
export const TAKEN_BODIES: readonly Omit<HostileBody, 'param'>[] = [
  schema('a schema that refers to itself', () => '{"$ref":"#"}'),
  schema('a schema that refers in a circle', () =>
    JSON.stringify({
      $ref: '#/$defs/a',
      $defs: { a: { $ref: '#/$defs/b' }, b: { allOf: [{ $ref: '#/$defs/a' }] } },
    }),
  ),
  schema('a schema of allOf that triples', () => doubling('allOf', 40)),
  held('a regex of ever more readings', 'regex', () => '(a|b)*a(a|b){400}'),
  held(
    'a grammar of ever more readings',
    'grammar',
    () => 'root ::= s\ns ::= s s | s s s | "a" | "b" | [a-z]',
  ),
  held('a schema of strings of ever more readings', 'json', () => ({
    type: 'array',
    items: {
      anyOf: list(30, (i) => ({
        type: 'array',
        items: { type: 'string', maxLength: 1_000 - i },
        minItems: i,
      })),
    },
  })),
].map(({ body, ...one }) => ({
  ...one,
  body: () => body().replace('"max_tokens":4', '"max_tokens":120,"temperature":1.9,"seed":7'),
}));
