/** Grammars on schemas that others have published. */
import { readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { Ajv, type Options } from 'ajv';
import { Ajv2020 } from 'ajv/dist/2020.js';
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

type SchemaObject = Readonly<Record<string, unknown>>;

interface Published {
  readonly name: string;
  readonly schema: SchemaObject | boolean;
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
/** Those that JSON Schema defines: others say nothing. */
const FORMATS: addFormats.FormatName[] = [
  'date-time',
  'date',
  'time',
  'duration',
  'email',
  'hostname',
  'ipv4',
  'ipv6',
  'uri',
  'uri-reference',
  'uuid',
  'json-pointer',
];
const AJV: Options = { strict: false, logger: false, multipleOfPrecision: 9, validateSchema: false };

it('supports at least 80% of the suite of draft 4, and each text that ends satisfies its schema', () => {
  const suite = join(modules, 'json-schema-test-suite/tests/draft4');
  const schemas = filesOf(suite).flatMap((file) =>
    (jsonOf(join(suite, file)) as { description: string; schema: Published['schema'] }[]).map(
      ({ description, schema }) => ({ name: `${file}: ${description}`, schema }),
    ),
  );
  const all = tried(schemas, 8, 60);
  const ofObjects = schemas.filter(
    ({ schema }) => typeof schema === 'object' && OF_OBJECTS.some((keyword) => keyword in schema),
  );
  const supported = ofObjects.filter(({ name }) => all.supported.has(name)).length;
  console.log(all.counts, { ofObjects: ofObjects.length, supported }, all.refused);
  expect(supported / ofObjects.length).toBeGreaterThanOrEqual(0.8);
  expect(all.counts.cut).toBeLessThan(all.counts.texts / 10);
});

it('supports at least 80% of the schemas of objects that schemastore.org publishes and that stand alone', () => {
  const folder = join(modules, 'schemastore/schemas/json');
  const schemas = filesOf(folder)
    .map((name) => ({ name, schema: jsonOf(join(folder, name)) as SchemaObject }))
    .filter(({ schema }) => schema['type'] === 'object');
  const alone = schemas.filter(({ schema }) => !namesOthers(schema));
  const { counts, refused } = tried(alone, 1, 240);
  console.log(counts, { ofOtherDocuments: schemas.length - alone.length }, refused);
  expect(counts.supported / alone.length).toBeGreaterThanOrEqual(0.8);
  expect(counts.cut).toBeLessThan(counts.texts / 4);
});

/** Some texts of each schema that is supported, held against ajv. */
function tried(schemas: readonly Published[], textsEach: number, mostTokens: number) {
  const refused: Record<string, number> = {};
  const supported = new Set<string>();
  const wrong: unknown[] = [];
  const counts = { schemas: schemas.length, supported: 0, texts: 0, cut: 0, unknownToAjv: 0 };
  schemas.forEach(({ name, schema }, seed) => {
    let grammar: TokenGrammar;
    try {
      grammar = grammarOf({ kind: 'json-schema', schema });
    } catch (error) {
      expect(error).toMatchObject({ code: 'REQUEST_INVALID' });
      const keyword = String((error as PdError).context['keyword'] ?? (error as Error).message);
      refused[keyword] = (refused[keyword] ?? 0) + 1;
      return;
    }
    supported.add(name);
    counts.supported++;
    const validate = validatorOf(schema);
    if (!validate) counts.unknownToAjv++;
    const random = randomFrom(seed);
    for (let i = 0; i < textsEach; i++) {
      const { text, ended } = walk(grammar, random, mostTokens);
      counts.texts++;
      if (!ended) counts.cut++;
      // A number of more digits is another one to JSON.parse, and so to ajv.
      else if (validate && !/\d{16}/.test(text)) {
        if (!validate(JSON.parse(text))) wrong.push([name, text, validate.errors]);
      }
    }
  });
  expect(wrong).toEqual([]);
  return { counts, refused, supported };
}

/** Undefined where ajv cannot take the schema. */
function validatorOf(schema: Published['schema']) {
  const { $schema } = typeof schema === 'object' ? schema : {};
  const isLate = typeof $schema === 'string' && /20(19|20)/.test($schema);
  // Half of what is published has patterns that are none with the flag that ajv sets.
  for (const unicodeRegExp of [true, false]) {
    const ajv = isLate ? new Ajv2020({ ...AJV, unicodeRegExp }) : new Ajv({ ...AJV, unicodeRegExp });
    addFormats.default(ajv, FORMATS);
    try {
      return ajv.compile(modern(schema, true) as SchemaObject);
    } catch {}
  }
  return undefined;
}

function filesOf(folder: string): string[] {
  return readdirSync(folder).filter((file) => file.endsWith('.json'));
}

function jsonOf(file: string): unknown {
  return JSON.parse(readFileSync(file, 'utf8').replace(/^\uFEFF/, ''));
}

function namesOthers(value: unknown): boolean {
  if (typeof value !== 'object' || value === null) return false;
  const { $ref } = value as SchemaObject;
  return (typeof $ref === 'string' && !$ref.startsWith('#')) || Object.values(value).some(namesOthers);
}

/** Draft 4 as draft 7 writes it. */
function modern(schema: unknown, isRoot = false): unknown {
  if (typeof schema !== 'object' || schema === null) return schema;
  if (Array.isArray(schema)) return schema.map((one) => modern(one));
  const { exclusiveMinimum, exclusiveMaximum, minimum, maximum, ...rest } = schema as SchemaObject;
  const entries = Object.entries(rest).flatMap(([key, value]) => {
    // Of all but the root they would change what `#` means.
    if (key === '$schema' && typeof value === 'string') return [];
    if ((key === 'id' || key === '$id') && typeof value === 'string') return isRoot ? [['$id', value]] : [];
    return [[key, ['enum', 'const', 'default'].includes(key) ? value : modern(value)]];
  });
  const bound = (name: 'minimum' | 'maximum', value: unknown, exclusive: unknown) => {
    const other = name === 'minimum' ? 'exclusiveMinimum' : 'exclusiveMaximum';
    if (value !== undefined) return { [exclusive === true ? other : name]: value };
    return {};
  };
  return {
    ...Object.fromEntries(entries),
    ...(typeof exclusiveMinimum !== 'boolean' && exclusiveMinimum !== undefined && { exclusiveMinimum }),
    ...(typeof exclusiveMaximum !== 'boolean' && exclusiveMaximum !== undefined && { exclusiveMaximum }),
    ...bound('minimum', minimum, exclusiveMinimum),
    ...bound('maximum', maximum, exclusiveMaximum),
  };
}
