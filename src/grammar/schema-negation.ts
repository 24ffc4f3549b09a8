/** `not` and `if` as alternatives: what is not all of several conditions fails one of them. */
import type { Budget } from './budget.ts';
import {
  below,
  isObject,
  type Located,
  located,
  type SchemaDocument,
  type SchemaObject,
} from './schema-document.ts';

/** Keywords of our own, which no schema has: values, and patterns of a string, that are not to be. */
export const EXCLUDED = '\u0000excluded';
export const NOT_PATTERN = '\u0000notPattern';

const MOST_OPTIONS = 64;
const MOST_NESTING = 16;
const TYPES = ['null', 'boolean', 'string', 'number', 'array', 'object'];
/** A bound, and the other side of it. */
const OTHER_SIDE: Readonly<Record<string, readonly [keyword: string, type: string, step: number]>> = {
  minimum: ['exclusiveMaximum', 'number', 0],
  maximum: ['exclusiveMinimum', 'number', 0],
  exclusiveMinimum: ['maximum', 'number', 0],
  exclusiveMaximum: ['minimum', 'number', 0],
  minLength: ['maxLength', 'string', -1],
  maxLength: ['minLength', 'string', 1],
  minItems: ['maxItems', 'array', -1],
  maxItems: ['minItems', 'array', 1],
  minProperties: ['maxProperties', 'object', -1],
  maxProperties: ['minProperties', 'object', 1],
};

type Options = readonly (readonly Located[])[];

/**
 * Schemas of which each is satisfied only by what does not satisfy `at`; one of them suffices. Not all that does not is among them: what
 * cannot be turned round is left out. Undefined where that is everything.
 */
export function negation(
  at: Located,
  document: SchemaDocument,
  budget: Budget,
  depth = 0,
): Options | undefined {
  const { schema, pointer } = at;
  if (typeof schema === 'boolean') return schema ? [] : [[{ schema: true, pointer }]];
  if (depth > MOST_NESTING) return undefined;
  const options: (readonly Located[])[] = [];
  let left = 0;
  for (const [keyword, value] of Object.entries(schema)) {
    const found = turned(keyword, value, at, document, budget, depth);
    budget.work(1 + (found?.length ?? 0));
    if (found) options.push(...found);
    else left++;
    if (options.length > MOST_OPTIONS) return undefined;
  }
  return options.length === 0 && left > 0 ? undefined : options;
}

/** Undefined: cannot be turned round. No options: asks for nothing. */
function turned(
  keyword: string,
  value: unknown,
  { pointer }: Located,
  document: SchemaDocument,
  budget: Budget,
  depth: number,
): Options | undefined {
  const inner = (schema: unknown, ...path: (string | number)[]) =>
    negation(located(schema, below(pointer, keyword, ...path)), document, budget, depth + 1);
  const one = (schema: SchemaObject): Options => [[{ schema, pointer }]];
  const side = OTHER_SIDE[keyword];
  if (side) {
    const [other, type, step] = side;
    if (typeof value !== 'number') return undefined;
    return value + step < 0 && type !== 'number' ? [] : one({ type, [other]: value + step });
  }
  switch (keyword) {
    case '$ref':
      return negation(document.resolve(value, pointer), document, budget, depth + 1);
    case 'type': {
      const names: readonly unknown[] = Array.isArray(value) ? value : [value];
      // What is no integer may be a number, but that is more than a type.
      const others = TYPES.filter(
        (type) => !names.includes(type) && !(type === 'number' && names.includes('integer')),
      );
      return others.length > 0 ? one({ type: others }) : [];
    }
    case 'const':
      return one({ [EXCLUDED]: [value] });
    case 'enum':
      return Array.isArray(value) ? one({ [EXCLUDED]: value }) : undefined;
    case 'pattern':
      return one({ type: 'string', [NOT_PATTERN]: value });
    case 'required':
      if (!Array.isArray(value)) return undefined;
      return value.flatMap((name) => one({ type: 'object', properties: { [String(name)]: false } }));
    case 'properties':
      if (!isObject(value)) return undefined;
      return Object.entries(value).flatMap(([name, schema]) =>
        (inner(schema, name) ?? []).flatMap((all) => {
          const wrong = { allOf: all.map((part) => part.schema) };
          return one({ type: 'object', required: [name], properties: { [name]: wrong } });
        }),
      );
    case 'not':
      return [[located(value, below(pointer, keyword))]];
    case 'allOf':
      return Array.isArray(value) ? value.flatMap((schema, i) => inner(schema, i) ?? []) : undefined;
    case 'anyOf': {
      if (!Array.isArray(value)) return undefined;
      let all: Options = [[]];
      for (const [i, schema] of value.entries()) {
        const options = inner(schema, i);
        if (!options || all.length * options.length > MOST_OPTIONS) return undefined;
        all = all.flatMap((before) => options.map((option) => [...before, ...option]));
      }
      return all;
    }
    case 'additionalProperties':
    case 'patternProperties':
    case 'propertyNames':
    case 'items':
    case 'prefixItems':
    case 'contains':
    case 'uniqueItems':
    case 'multipleOf':
    case 'format':
    case 'oneOf':
    case 'if':
    case 'dependencies':
    case 'dependentRequired':
    case 'dependentSchemas':
    case 'unevaluatedItems':
    case 'unevaluatedProperties':
    case '$dynamicRef':
    case '$recursiveRef':
      return undefined;
    default:
      return [];
  }
}
