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

/**
 * Keywords of our own, which no schema has: values, and patterns of a string, that are not to be; keys that nothing describes are not to be
 * written, whether or not they are valid; schemas, with their places, of which all are to hold.
 */
export const EXCLUDED = '\u0000excluded';
export const NOT_PATTERN = '\u0000notPattern';
export const CLOSED = '\u0000closed';
export const ALL = '\u0000all';

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

export interface Negation {
  /** Each satisfied only by what does not satisfy the schema; one of them suffices. */
  readonly options: readonly (readonly Located[])[];
  /** All that does not satisfy the schema satisfies one of them: nothing that cannot be turned round has been left out. */
  readonly complete: boolean;
}

const NOTHING_ASKED: Negation = { options: [], complete: true };

/** Undefined where nothing of `at` can be turned round. */
export function negation(
  at: Located,
  document: SchemaDocument,
  budget: Budget,
  depth = 0,
): Negation | undefined {
  const { schema, pointer } = at;
  if (typeof schema === 'boolean') return schema ? NOTHING_ASKED : whole([[{ schema: true, pointer }]]);
  if (depth > MOST_NESTING) return undefined;
  const found: (Negation | undefined)[] = [];
  let options = 0;
  for (const [keyword, value] of Object.entries(schema)) {
    const one = turned(keyword, value, at, document, budget, depth);
    budget.work(1 + (one?.options.length ?? 0));
    options += one?.options.length ?? 0;
    if (options > MOST_OPTIONS) return undefined;
    found.push(one);
  }
  return either(found);
}

function whole(options: Negation['options']): Negation {
  return { options, complete: true };
}

/** What fails one of several demands. */
function either(found: readonly (Negation | undefined)[]): Negation | undefined {
  const options = found.flatMap((one) => one?.options ?? []);
  const complete = found.every((one) => one?.complete);
  return options.length === 0 && !complete ? undefined : { options, complete };
}

/** Undefined: cannot be turned round. No options: asks for nothing, and is complete. */
function turned(
  keyword: string,
  value: unknown,
  { pointer }: Located,
  document: SchemaDocument,
  budget: Budget,
  depth: number,
): Negation | undefined {
  const inner = (schema: unknown, ...path: (string | number)[]) =>
    negation(located(schema, below(pointer, keyword, ...path)), document, budget, depth + 1);
  const one = (schema: SchemaObject) => whole([[{ schema, pointer }]]);
  const side = OTHER_SIDE[keyword];
  if (side) {
    const [other, type, step] = side;
    if (typeof value !== 'number') return undefined;
    return value + step < 0 && type !== 'number' ? NOTHING_ASKED : one({ type, [other]: value + step });
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
      const options = others.length > 0 ? one({ type: others }).options : [];
      return either([{ options, complete: !names.includes('integer') || names.includes('number') }]);
    }
    case 'const':
      return one({ [EXCLUDED]: [value] });
    case 'enum':
      return Array.isArray(value) ? one({ [EXCLUDED]: value }) : undefined;
    case 'pattern':
      return one({ type: 'string', [NOT_PATTERN]: value });
    case 'required':
      if (!Array.isArray(value)) return undefined;
      return either(value.map((name) => one({ type: 'object', properties: { [String(name)]: false } })));
    case 'properties':
      if (!isObject(value)) return undefined;
      return either(
        Object.entries(value).map(([name, schema]) => {
          const wrong = inner(schema, name);
          const options = wrong?.options.map((all): readonly Located[] => {
            const properties = { [name]: { allOf: all.map((part) => part.schema) } };
            return [{ schema: { type: 'object', required: [name], properties }, pointer }];
          });
          return wrong && options && { ...wrong, options };
        }),
      );
    case 'not':
      return whole([[located(value, below(pointer, keyword))]]);
    case 'allOf':
      return Array.isArray(value) ? either(value.map((schema, i) => inner(schema, i))) : undefined;
    case 'anyOf': {
      if (!Array.isArray(value)) return undefined;
      let all = whole([[]]);
      for (const [i, schema] of value.entries()) {
        const found = inner(schema, i);
        if (!found || all.options.length * found.options.length > MOST_OPTIONS) return undefined;
        if (found.options.length === 0) return found;
        all = {
          options: all.options.flatMap((before) => found.options.map((option) => [...before, ...option])),
          complete: all.complete && found.complete,
        };
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
      return NOTHING_ASKED;
  }
}
