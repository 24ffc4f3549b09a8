/** The fields that hold a text to a form: OpenAI's `response_format`, vLLM's `structured_outputs` and its older `guided_*`. */
import type { GrammarSpec } from '../../grammar/grammar.ts';
import { z } from '../../zod.ts';
import { badField, type GrammarWish, optional } from './fields.ts';

const MOST_CHOICES = 10_000;

const schema = z.union(
  [z.string(), z.boolean(), z.record(z.string(), z.unknown())],
  'expected a JSON schema',
);
const choices = z.array(z.string()).min(1).max(MOST_CHOICES);

export const grammarFields = {
  response_format: optional(
    z.looseObject({
      type: z.string(),
      json_schema: optional(z.looseObject({ schema: optional(schema) })),
    }),
  ),
  structured_outputs: optional(
    z.strictObject({
      json: optional(schema),
      regex: optional(z.string()),
      choice: optional(choices),
      grammar: optional(z.string()),
      json_object: optional(z.boolean()),
      disable_any_whitespace: optional(z.boolean()),
      disable_fallback: optional(z.unknown()),
      disable_additional_properties: optional(z.literal(false, 'only false is supported here')),
      whitespace_pattern: optional(z.never('is not supported here')),
      structural_tag: optional(z.never('is not supported here')),
    }),
  ),
  guided_json: optional(schema),
  guided_regex: optional(z.string()),
  guided_choice: optional(choices),
  guided_grammar: optional(z.string()),
};

type GrammarBody = z.output<z.ZodObject<typeof grammarFields>>;

/** A body without these fields, which may be long, and what they want, if anything. Throws REQUEST_INVALID where two want different things. */
export function takeGrammar<Body extends GrammarBody>(
  body: Body,
): readonly [Omit<Body, keyof GrammarBody>, GrammarWish | undefined] {
  const rest: Partial<Body> = { ...body };
  for (const field of Object.keys(grammarFields) as (keyof GrammarBody)[]) delete rest[field];
  return [rest as Omit<Body, keyof GrammarBody>, grammarWish(body)];
}

function grammarWish(body: GrammarBody): GrammarWish | undefined {
  const wishes = [...formatWish(body), ...structuredWishes(body)];
  const [first, second] = wishes;
  if (second) throw badField(second.param, `is not allowed beside ${first!.param}`);
  return first;
}

function formatWish({ response_format: format }: GrammarBody): GrammarWish[] {
  const param = 'response_format';
  if (!format) return [];
  switch (format.type) {
    case 'text':
      return [];
    case 'json_object':
      return [{ spec: { kind: 'json-object' }, param }];
    case 'json_schema': {
      const own = format.json_schema?.schema;
      if (own === undefined) throw badField(`${param}.json_schema.schema`, 'is missing');
      return [{ spec: jsonSchema(own, `${param}.json_schema.schema`), param }];
    }
    default:
      throw badField(
        `${param}.type`,
        `${JSON.stringify(format.type.slice(0, 100))} is not supported here; only "text", "json_object" and "json_schema" are`,
      );
  }
}

function structuredWishes(body: GrammarBody): GrammarWish[] {
  const own = body.structured_outputs;
  const wishes: GrammarWish[] = [];
  const add = (param: string, spec: GrammarSpec | undefined | false) => {
    if (spec) wishes.push({ spec, param });
  };
  for (const [prefix, { json, regex, choice, grammar }] of [
    ['structured_outputs.', own ?? {}],
    [
      'guided_',
      {
        json: body.guided_json,
        regex: body.guided_regex,
        choice: body.guided_choice,
        grammar: body.guided_grammar,
      },
    ],
  ] as const) {
    add(`${prefix}json`, json !== undefined && jsonSchema(json, `${prefix}json`));
    add(`${prefix}regex`, regex !== undefined && { kind: 'regex', source: regex });
    add(`${prefix}choice`, choice && { kind: 'choice', texts: choice });
    add(`${prefix}grammar`, grammar !== undefined && { kind: 'ebnf', source: grammar });
  }
  add('structured_outputs.json_object', own?.json_object === true && { kind: 'json-object' });
  return wishes;
}

/** Clients of vLLM may write the schema as JSON in a text. */
function jsonSchema(schema: unknown, param: string): GrammarSpec {
  if (typeof schema !== 'string') return { kind: 'json-schema', schema };
  try {
    return { kind: 'json-schema', schema: JSON.parse(schema) };
  } catch (cause) {
    throw badField(param, `is no JSON: ${(cause as Error).message}`);
  }
}
