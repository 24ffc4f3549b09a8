/** Whatever is drawn under a schema satisfies it, by the judgement of another program (ajv). */
import { Ajv2020, type ValidateFunction } from 'ajv/dist/2020.js';
import addFormats from 'ajv-formats';
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { accepts, grammarOf, randomFrom, type Walk, walk } from '../../support/grammars.ts';
import { propertyRuns } from '../../support/property-runs.ts';

const ajv = new Ajv2020({ strict: false, logger: false, allowUnionTypes: true });
addFormats.default(ajv);
// No schema here asks for what is "unevaluated"; keeping track of it makes ajv write code that fails (`props0 is not defined`) for some.
ajv.opts.unevaluated = false;

const leaf = fc.oneof(
  fc.record({
    type: fc.constant('string'),
    minLength: fc.nat(3),
    maxLength: fc.integer({ min: 3, max: 90 }),
  }),
  fc.record({
    type: fc.constant('string'),
    pattern: fc.constantFrom('^[a-f]+$', 'de', '^(ba|co){2,4}', '"\\\\'),
  }),
  fc.record({
    type: fc.constant('string'),
    format: fc.constantFrom(
      'date',
      'time',
      'date-time',
      'uuid',
      'ipv4',
      'ipv6',
      'email',
      'uri',
      'hostname',
      'duration',
    ),
  }),
  fc.record({
    type: fc.constant('integer'),
    minimum: fc.integer({ min: -2000, max: 5 }),
    maximum: fc.integer({ min: 5, max: 3000 }),
  }),
  fc.record({
    type: fc.constant('integer'),
    multipleOf: fc.integer({ min: 1, max: 30 }),
    exclusiveMinimum: fc.integer({ min: -9, max: 99 }),
  }),
  fc.record({
    type: fc.constant('number'),
    minimum: fc.double({ min: -99, max: 0.5, noNaN: true }),
    exclusiveMaximum: fc.double({ min: 0.5001, max: 1e6, noNaN: true }),
  }),
  fc.constantFrom<object | boolean>(
    { type: 'boolean' },
    { not: { type: ['object', 'array', 'number'] } },
    { type: 'string', not: { pattern: '[^a-f]' } },
    { type: ['string', 'null'] },
    {},
    true,
    { enum: ['a', 1, null, { x: [1] }] },
    { const: 'fi"x' },
  ),
);
/** Types that they are about are not named. */
const untyped = fc.constantFrom<object>(
  { minLength: 2 },
  { maxLength: 1 },
  { pattern: '^[a-f]+$' },
  { format: 'email' },
  { minimum: 2 },
  { maximum: 2 },
  { multipleOf: 3 },
  { required: ['a'] },
  { type: ['integer', 'string'] },
  { enum: ['a', 'de', 1, 6, null, { a: 1 }] },
);
const schema = fc.letrec<{ schema: object | boolean; object: object; combined: object }>((tie) => ({
  object: fc.record(
    {
      type: fc.constant('object'),
      properties: fc.dictionary(fc.constantFrom('a', 'name', 'n"', 'é', 'de', 'defi'), tie('schema'), {
        maxKeys: 4,
      }),
      required: fc.uniqueArray(fc.constantFrom('a', 'name', 'é'), { maxLength: 2 }),
      additionalProperties: fc.oneof(fc.boolean(), leaf),
      patternProperties: fc.constantFrom(
        {},
        { '^d': { type: 'integer' } },
        { a: { type: 'boolean' }, e$: true },
      ),
      minProperties: fc.constantFrom(0, 1),
      maxProperties: fc.constantFrom(4, 9),
      dependentSchemas: fc.dictionary(fc.constantFrom('a', 'name'), tie('schema'), { maxKeys: 1 }),
    },
    { requiredKeys: ['type'] },
  ),
  schema: fc.oneof(
    { maxDepth: 2 },
    { weight: 3, arbitrary: leaf },
    { weight: 2, arbitrary: tie('object') },
    fc.record(
      {
        type: fc.constant('array'),
        items: tie('schema'),
        minItems: fc.nat(2),
        maxItems: fc.integer({ min: 2, max: 5 }),
        prefixItems: fc.array(leaf, { minLength: 1, maxLength: 2 }),
        uniqueItems: fc.constant(true),
      },
      { requiredKeys: ['type'] },
    ),
    { weight: 2, arbitrary: tie('combined') },
    fc
      .tuple(fc.oneof(tie('object'), untyped, leaf), tie('combined'))
      .map(([beside, one]) => (typeof beside === 'boolean' ? one : { ...beside, ...one })),
  ),
  combined: fc.oneof(
    fc.record({ oneOf: fc.array(tie('schema'), { minLength: 1, maxLength: 3 }) }),
    fc.record({ oneOf: fc.array(tie('object'), { minLength: 2, maxLength: 3 }) }),
    fc.record({ anyOf: fc.array(tie('schema'), { minLength: 1, maxLength: 3 }) }),
    fc.record({ allOf: fc.array(tie('object'), { minLength: 1, maxLength: 2 }) }),
    fc.record({ if: tie('object'), else: tie('object'), not: leaf }, { requiredKeys: ['if'] }),
    fc
      .array(tie('schema'), { minLength: 3, maxLength: 3 })
      .map((three) => Object.fromEntries(['if', 'then', 'else'].map((keyword, i) => [keyword, three[i]]))),
    fc.record({ not: tie('schema') }),
    fc.constant({ $ref: '#/$defs/other' }),
  ),
}));
const root = fc
  .tuple(fc.oneof(schema.object, schema.combined), schema.schema)
  .map(([one, other]) => ({ ...one, $defs: { other } }));

/** What is wrong with a value; nothing under a schema that refers to itself without end, in which ajv goes round. */
function faultsUnder(one: object): (value: unknown) => unknown {
  let validate: ValidateFunction | undefined;
  return (value) => {
    try {
      validate ??= ajv.compile(one);
      return validate(value) ? null : validate.errors;
    } catch (error) {
      if (error instanceof RangeError) return null;
      throw error;
    }
  };
}

describe('JSON Schema', () => {
  it('is satisfied by every text that comes to an end, and refused only by name', () => {
    let ended = 0;
    const property = fc.property(root, fc.nat(), (one, seed) => {
      let grammar: ReturnType<typeof grammarOf>;
      try {
        grammar = grammarOf({ kind: 'json-schema', schema: one });
      } catch (error) {
        expect(error).toMatchObject({ code: 'REQUEST_INVALID' });
        return;
      }
      const faults = faultsUnder(one);
      const random = randomFrom(seed);
      for (let i = 0; i < 3; i++) {
        let drawn: Walk;
        try {
          drawn = walk(grammar, random);
        } catch (error) {
          // An item drawn before may leave a later one nothing to be, and many conditions in a row let a text be read in many ways.
          expect(error).toMatchObject({
            code: 'REQUEST_INVALID',
            message: expect.stringMatching('"uniqueItems"|too ambiguous'),
          });
          return;
        }
        // A number of more digits is another one to JSON.parse, and so to ajv.
        if (!drawn.ended || /\d{16}/.test(drawn.text)) continue;
        ended++;
        expect([drawn.text, faults(JSON.parse(drawn.text))]).toEqual([drawn.text, null]);
      }
    });
    fc.assert(property, { numRuns: propertyRuns(60) });
    expect(ended).toBeGreaterThan(30);
  });

  it.each([
    [
      {
        type: 'object',
        properties: { a: { type: 'integer' } },
        required: ['a'],
        additionalProperties: false,
      },
      '{"a": 12}',
      '{"a":12,"b":1}',
    ],
    [{ properties: { a: true, b: { type: 'string' } } }, '{ "b" : "x" , "c": null}', '{"b":"x","b":3}'],
    [
      {
        $defs: {
          tree: {
            type: 'object',
            properties: { left: { $ref: '#/$defs/tree' } },
            additionalProperties: false,
          },
        },
        $ref: '#/$defs/tree',
      },
      '{"left":{"left":{}}}',
      '{"left":{"left":[]}}',
    ],
    [{ type: 'array', items: { enum: ['a', 'b'] }, uniqueItems: true }, '["b","a"]', '["b","b"]'],
    [{ type: 'array', items: { enum: ['a', 'b'] }, uniqueItems: true }, '["b"]', '["b","a",'],
    [{ type: 'array', uniqueItems: true }, '[1, 12,"1",[1],[ 1,2 ],{"a":1}]', '[[1],{"a":1}, [ 1 ]]'],
    [
      {
        type: 'array',
        uniqueItems: true,
        items: { properties: { a: { type: 'string' }, b: {} }, required: ['a'], type: 'object' },
      },
      '[{"a":"x"},{"a":"x","b":null},{"a":"xy"}]',
      '[{"a":"x"},{"a":"x" }]',
    ],
    [
      {
        oneOf: [
          { properties: { t: { const: 'x' } }, required: ['t'] },
          { properties: { t: { const: 'y' }, n: { type: 'null' } }, required: ['t', 'n'] },
        ],
      },
      '{"t":"y","n":null}',
      '{"t":"y"}',
    ],
    [{ type: 'number', minimum: -1.5, maximum: 2 }, '-1.49', '2.01'],
    [{ type: 'integer', minimum: 10, maximum: 30 }, '30', '300'],
    [
      {
        dependentRequired: { a: ['b'], c: ['d'] },
        properties: { a: true, b: true, c: true, d: true },
        additionalProperties: false,
      },
      '{"a":1,"b":2}',
      '{"b":2,"c":1}',
    ],
    [
      {
        allOf: [
          { properties: { a: { minimum: 3 } } },
          { properties: { a: { type: 'integer', maximum: 5 } }, required: ['a'] },
        ],
        additionalProperties: true,
      },
      '{"a":4}',
      '{"a":6}',
    ],
    [{ type: 'string', not: { enum: ['a', 'b"'] } }, '"c"', '"b\\""'],
    [{ enum: ['a', 'b', 1], not: { anyOf: [{ const: 'a' }, { type: 'number' }] } }, '"b"', '"a"'],
    // Values that are known are texts of a format, or may be.
    [{ enum: ['a', '2020-02-29', 1], format: 'date' }, '"2020-02-29"', '"a"'],
    [{ enum: ['mailto:a@b.example', 'a b'], format: 'uri' }, '"mailto:a@b.example"', '"a b"'],
    [{ enum: ['a+', 1], format: 'regex' }, '"a+"', '"b"'],
    [{ enum: ['a+', 1], not: { type: 'string', format: 'regex' } }, '1', '"a+"'],
    [
      { enum: ['\u00e4@b.example', null], not: { type: 'string', format: 'email' } },
      'null',
      '"\u00e4@b.example"',
    ],
    [{ type: 'object', not: { required: ['a'] } }, '{"b":1}', '{"a":1}'],
    [{ type: 'integer', not: { anyOf: [{ minimum: 9 }, { const: 3 }] } }, '4', '3'],
    [
      {
        if: { properties: { a: { not: { const: 1 } } } },
        else: { required: ['b'] },
        properties: { a: { type: 'integer' }, b: {} },
      },
      '{"a":1,"b":2}',
      '{"a":1}',
    ],
    [{ oneOf: [{ type: 'integer' }, { minimum: 2 }, { const: 'x' }] }, '1', '3'],
    // What of a negation can be written is less than what is valid, and excludes less.
    [
      {
        oneOf: [
          { type: 'string', pattern: '^[a-f]+$' },
          { if: { type: 'object' }, not: { type: 'string', format: 'email' } },
        ],
      },
      '12',
      '"de"',
    ],
    [{ oneOf: [{ type: 'integer', maximum: 20 }, { not: { type: 'number', multipleOf: 5 } }] }, '10', '7'],
    [{ oneOf: [{ type: 'number' }, { not: { type: 'integer' } }] }, '3', '1.5'],
    // So are keys that nothing describes.
    [
      {
        oneOf: [
          { properties: { a: {} }, required: ['a'] },
          { properties: { t: {} }, required: ['t'], unevaluatedProperties: { type: 'integer' } },
        ],
      },
      '{"a":2}',
      '{"a":2,"t":1}',
    ],
    [
      {
        unevaluatedProperties: false,
        oneOf: [{ properties: { a: {} }, required: ['a'] }, { properties: { b: {} } }],
      },
      '{"b":1}',
      '{"a":1}',
    ],
    [
      {
        oneOf: [
          {
            unevaluatedProperties: false,
            properties: { t: {} },
            required: ['t'],
            anyOf: [{ properties: { x: {} } }, { properties: { y: {} } }],
          },
          { type: 'object', required: ['x'] },
        ],
      },
      '{"t":1,"y":1}',
      '{"t":1,"x":1}',
    ],
    [
      {
        oneOf: [{ enum: ['a', 1], uniqueItems: true }, { exclusiveMinimum: 0, maximum: 1 }, { type: 'null' }],
      },
      '0.5',
      '"a"',
    ],
    [
      {
        oneOf: [
          { properties: { a: {} }, required: ['a'] },
          {
            required: ['t'],
            properties: { t: {} },
            unevaluatedProperties: false,
            allOf: [{ unevaluatedProperties: true }],
          },
        ],
      },
      '{"a":1}',
      '{"a":1,"t":1}',
    ],
    // What stands beside a schema, and what is not to be, describes nothing to it.
    [
      { properties: { a: {} }, allOf: [{ properties: { b: {} }, unevaluatedProperties: false }] },
      '{"b":1}',
      '{"a":1}',
    ],
    [
      {
        properties: { c: {} },
        allOf: [
          { unevaluatedProperties: false, anyOf: [{ properties: { a: {} } }, { properties: { b: {} } }] },
        ],
      },
      '{"b":1}',
      '{"c":1}',
    ],
    [
      {
        unevaluatedProperties: false,
        properties: { b: {} },
        not: { properties: { a: { type: 'string' }, b: { type: 'integer' } } },
      },
      '{"b":null}',
      '{"a":1}',
    ],
    [{ prefixItems: [{}, {}], allOf: [{ prefixItems: [{}], unevaluatedItems: false }] }, '[1]', '[1,2]'],
    [
      { type: 'array', prefixItems: [{}], unevaluatedItems: false, dependentSchemas: { a: { items: {} } } },
      '[1]',
      '[1,2]',
    ],
    // One of its alternatives, or what it is told not to be, brings another type along.
    [{ multipleOf: 2, oneOf: [{}, { type: 'string' }, { type: 'number', maximum: 9 }] }, '10', '"t"'],
    [
      {
        oneOf: [
          { properties: { a: {} }, anyOf: [{ type: 'string', minLength: 2 }, { type: 'object' }] },
          { type: 'string' },
        ],
      },
      '"a"',
      '"ab"',
    ],
    [{ type: 'number', multipleOf: 1.5 }, '4.5', '4.4'],
    [{ type: 'number', multipleOf: 0.01, minimum: 0 }, '9.99', '9.999'],
    [{ type: 'string', minLength: 2, maxLength: 2 }, '"é😀"', '"abc"'],
    [{ type: 'string', maxLength: 200 }, JSON.stringify('x'.repeat(200)), JSON.stringify('x'.repeat(201))],
  ])('%j takes %s and not %s', (one, valid, invalid) => {
    const grammar = grammarOf({ kind: 'json-schema', schema: one });
    expect([accepts(grammar, valid), accepts(grammar, invalid)]).toEqual([true, false]);
  });

  it.each([
    [{ type: 'object', properties: { a: { contains: {} } } }, '"contains" at #/properties/a'],
    [{ oneOf: [{ type: 'array' }, { items: { multipleOf: 2 } }] }, '"oneOf" at #'],
    [{ not: { const: [1] } }, '"not" at #'],
    [{ type: 'integer', not: {} }, 'matches nothing'],
    [{ type: 'array', items: { type: 'boolean' }, minItems: 3, uniqueItems: true }, 'matches nothing'],
    [{ properties: { 'a/b': { $ref: 'http://elsewhere/x' } } }, '"$ref" at #/properties/a~1b'],
    [{ properties: { a: { type: 'text' } } }, '"type" at #/properties/a'],
    [{ pattern: '(?=a)b' }, 'look-around'],
    [{ type: 'string', format: 'regex' }, '"format" at #'],
    [{ properties: { a: 12 } }, '#/properties/a: neither an object nor a boolean'],
    [{ type: 'string', enum: [1, 2] }, 'matches nothing'],
    [{ $ref: '#/nowhere' }, '"$ref" at #'],
    [{ anyOf: [{ $ref: '#' }, { $ref: '#' }] }, 'matches nothing'],
    ['string', 'neither an object nor a boolean'],
  ])('%j is refused: %s', (one, why) => {
    expect(() => grammarOf({ kind: 'json-schema', schema: one })).toThrow(why);
  });
});
