/** Grammars on schemas that others have published. */
import { readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { Ajv } from 'ajv';
import addFormats from 'ajv-formats';
import { beforeAll, expect, it } from 'vitest';
import type { PdError } from '../../src/errors.ts';
import type { TokenGrammar } from '../../src/grammar/masks.ts';
import { grammarOf, randomFrom, walk } from '../support/grammars.ts';
import { packagesOf } from '../support/packages.ts';

let modules: string;
beforeAll(() => {
  modules = packagesOf('schemas');
});

interface Group {
  readonly description: string;
  readonly schema: Readonly<Record<string, unknown>> | boolean;
}

/** What only schemas of objects have. */
const OF_OBJECTS = [
  'properties',
  'required',
  'additionalProperties',
  'patternProperties',
  'minProperties',
  'maxProperties',
  'dependencies',
];

it('supports at least 80% of the schemas of the suite, and each text that ends satisfies its own', () => {
  const suite = join(modules, 'json-schema-test-suite/tests/draft4');
  const groups = readdirSync(suite)
    .filter((file) => file.endsWith('.json'))
    .flatMap((file) => JSON.parse(readFileSync(join(suite, file), 'utf8')) as Group[]);
  const refused = new Map<string, number>();
  const counts = { schemas: 0, ofObjects: 0, supportedOfObjects: 0, texts: 0, cut: 0 };
  for (const { description, schema } of groups) {
    const ofObjects = typeof schema === 'object' && OF_OBJECTS.some((keyword) => keyword in schema);
    counts.schemas++;
    if (ofObjects) counts.ofObjects++;
    let grammar: TokenGrammar;
    try {
      grammar = grammarOf({ kind: 'json-schema', schema });
    } catch (error) {
      expect(error).toMatchObject({ code: 'REQUEST_INVALID' });
      const keyword = String((error as PdError).context['keyword'] ?? (error as Error).message);
      refused.set(keyword, (refused.get(keyword) ?? 0) + 1);
      continue;
    }
    if (ofObjects) counts.supportedOfObjects++;
    const ajv = new Ajv({ strict: false, logger: false, multipleOfPrecision: 9 });
    addFormats.default(ajv);
    const validate = ajv.compile(modern(schema));
    const random = randomFrom(counts.schemas);
    for (let i = 0; i < 8; i++) {
      const { text, ended } = walk(grammar, random);
      counts.texts++;
      if (!ended) counts.cut++;
      else expect([description, text, validate(JSON.parse(text))]).toEqual([description, text, true]);
    }
  }
  console.log(counts, Object.fromEntries(refused));
  expect(counts.supportedOfObjects / counts.ofObjects).toBeGreaterThanOrEqual(0.8);
  expect(counts.cut).toBeLessThan(counts.texts / 10);
});

/** Draft 4 as draft 7 writes it. */
function modern(schema: unknown): boolean | object {
  if (typeof schema !== 'object' || schema === null) return schema as boolean;
  if (Array.isArray(schema)) return schema.map(modern);
  const { exclusiveMinimum, exclusiveMaximum, minimum, maximum, $schema, ...rest } = schema as Readonly<
    Record<string, unknown>
  >;
  const entries = Object.entries(rest).map(([key, value]) => [key, key === 'enum' ? value : modern(value)]);
  return {
    ...Object.fromEntries(entries),
    ...(minimum !== undefined && { [exclusiveMinimum === true ? 'exclusiveMinimum' : 'minimum']: minimum }),
    ...(maximum !== undefined && { [exclusiveMaximum === true ? 'exclusiveMaximum' : 'maximum']: maximum }),
  };
}
