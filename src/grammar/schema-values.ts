/** Whether a value that is known satisfies a schema: for lists of values beside other conditions. */
import { PdError } from '../errors.ts';
import type { Budget } from './budget.ts';
import { regexExpression } from './regex.ts';
import { matches } from './regular.ts';
import {
  below,
  isObject,
  type Located,
  located,
  type SchemaDocument,
  unsupportedKeyword,
} from './schema-document.ts';
import { isOfFormat } from './schema-formats.ts';
import type { TypeName } from './schema-keywords.ts';
import { ALL, CLOSED, EXCLUDED, NOT_PATTERN } from './schema-negation.ts';

const MOST_NESTING = 500;

/** As JSON Schema compares: numbers by value, objects without order. */
export function equalValues(a: unknown, b: unknown): boolean {
  if (a === b) return true;
  if (Array.isArray(a)) {
    return Array.isArray(b) && a.length === b.length && a.every((one, i) => equalValues(one, b[i]));
  }
  if (!isObject(a) || !isObject(b)) return false;
  const keys = Object.keys(a);
  if (keys.length !== Object.keys(b).length) return false;
  return keys.every((key) => Object.hasOwn(b, key) && equalValues(a[key], b[key]));
}

/** Compared in a step. */
const VALUES_PER_STEP = 32;
const CHARACTERS_PER_STEP = 32;

function isAmong(value: unknown, values: readonly unknown[], budget: Budget): boolean {
  budget.work(Math.ceil(values.length / VALUES_PER_STEP));
  return values.some((one) => equalValues(one, value));
}

/** Whether a value satisfies a schema: `unlikely` where it is no text of a format of which not all are known; else why it cannot be told. */
export type Verdict = boolean | 'unlikely' | PdError;

function not(one: Verdict): Verdict {
  return typeof one === 'boolean' ? !one : one;
}

/** False decides; what cannot be told matters before what is unlikely. */
function all<T>(items: readonly T[], ask: (item: T) => Verdict): Verdict {
  let open: Verdict = true;
  for (const item of items) {
    const one = ask(item);
    if (one === false) return false;
    if (one !== true && !(open instanceof PdError)) open = one;
  }
  return open;
}

function some<T>(items: readonly T[], ask: (item: T) => Verdict): Verdict {
  return not(all(items, (item) => not(ask(item))));
}

/** True where all can be told. */
function opened(verdicts: readonly Verdict[]): Verdict {
  return all(verdicts, (one) => typeof one === 'boolean' || one);
}

function exactlyOne<T>(items: readonly T[], ask: (item: T) => Verdict): Verdict {
  const verdicts = items.map(ask);
  const holding = verdicts.filter((one) => one === true).length;
  if (holding > 1) return false;
  const open = opened(verdicts);
  return open === true ? holding === 1 : open;
}

function satisfies(
  value: unknown,
  at: Located,
  document: SchemaDocument,
  budget: Budget,
  depth = 0,
): Verdict {
  budget.work(1);
  const { schema, pointer } = at;
  if (depth > MOST_NESTING) throw unsupportedKeyword('$ref', pointer, 'refers to itself without end');
  if (typeof schema === 'boolean') return schema;
  const holds = (of: unknown, inner: unknown, ...path: (string | number)[]) =>
    satisfies(of, located(inner, below(pointer, ...path)), document, budget, depth + 1);
  const list = (keyword: string) => {
    const inner = schema[keyword];
    return Array.isArray(inner) ? inner.map((_, i) => i) : [];
  };
  const matching = (pattern: string, text: string) =>
    matches(regexExpression(pattern, 'within'), text, budget);
  const ask = ([keyword, wanted]: readonly [string, unknown]): Verdict => {
    const isText = typeof value === 'string';
    const isNumber = typeof value === 'number';
    switch (keyword) {
      case '$ref': {
        const target = document.resolve(wanted, pointer);
        if (target.schema === schema) return true;
        return satisfies(value, target, document, budget, depth + 1);
      }
      case ALL:
        return all(wanted as readonly Located[], (one) => satisfies(value, one, document, budget, depth + 1));
      case 'allOf':
        return all(list(keyword), (i) => holds(value, (wanted as unknown[])[i], keyword, i));
      case 'anyOf':
        return some(list(keyword), (i) => holds(value, (wanted as unknown[])[i], keyword, i));
      case 'oneOf':
        return exactlyOne(list(keyword), (i) => holds(value, (wanted as unknown[])[i], keyword, i));
      case 'not':
        return not(holds(value, wanted, keyword));
      case 'if': {
        const condition = holds(value, wanted, keyword);
        const branch = (name: 'then' | 'else') =>
          schema[name] === undefined ? true : holds(value, schema[name], name);
        if (typeof condition === 'boolean') return branch(condition ? 'then' : 'else');
        const [then, otherwise] = [branch('then'), branch('else')];
        return then === otherwise && typeof then === 'boolean' ? then : opened([condition, then, otherwise]);
      }
      case 'type':
        return (Array.isArray(wanted) ? wanted : [wanted]).some((type) => isOfType(value, type));
      case 'const':
        return equalValues(value, wanted);
      case 'enum':
        return Array.isArray(wanted) && isAmong(value, wanted, budget);
      case EXCLUDED:
        return !isAmong(value, wanted as unknown[], budget);
      case NOT_PATTERN:
        return !isText || !matching(String(wanted), value);
      case 'minLength':
        return !isText || [...value].length >= Number(wanted);
      case 'maxLength':
        return !isText || [...value].length <= Number(wanted);
      case 'pattern':
        return !isText || matching(String(wanted), value);
      case 'format': {
        if (!isText || typeof wanted !== 'string') return true;
        budget.work(Math.ceil(value.length / CHARACTERS_PER_STEP));
        return isOfFormat(value, wanted) || 'unlikely';
      }
      case 'minimum':
        return (
          !isNumber ||
          (schema['exclusiveMinimum'] === true ? value > Number(wanted) : value >= Number(wanted))
        );
      case 'maximum':
        return (
          !isNumber ||
          (schema['exclusiveMaximum'] === true ? value < Number(wanted) : value <= Number(wanted))
        );
      case 'exclusiveMinimum':
        return !isNumber || typeof wanted === 'boolean' || value > Number(wanted);
      case 'exclusiveMaximum':
        return !isNumber || typeof wanted === 'boolean' || value < Number(wanted);
      case 'multipleOf':
        return !isNumber || Number.isInteger(value / Number(wanted));
      case 'minItems':
        return !Array.isArray(value) || value.length >= Number(wanted);
      case 'maxItems':
        return !Array.isArray(value) || value.length <= Number(wanted);
      case 'uniqueItems':
        return (
          wanted !== true ||
          !Array.isArray(value) ||
          value.every((one, i) => value.findIndex((other) => equalValues(one, other)) === i)
        );
      case 'items':
      case 'prefixItems': {
        if (!Array.isArray(value)) return true;
        if (Array.isArray(wanted)) {
          return all([...wanted.slice(0, value.length).entries()], ([i, inner]) =>
            holds(value[i], inner, keyword, i),
          );
        }
        const prefix = Array.isArray(schema['prefixItems']) ? schema['prefixItems'].length : 0;
        return all(value.slice(prefix), (one) => holds(one, wanted, keyword));
      }
      case 'required':
        return (
          !isObject(value) ||
          !Array.isArray(wanted) ||
          wanted.every((name) => Object.hasOwn(value, String(name)))
        );
      case 'minProperties':
        return !isObject(value) || Object.keys(value).length >= Number(wanted);
      case 'maxProperties':
        return !isObject(value) || Object.keys(value).length <= Number(wanted);
      case 'properties':
        if (!isObject(value) || !isObject(wanted)) return true;
        return all(
          Object.entries(wanted),
          ([name, inner]) => !Object.hasOwn(value, name) || holds(value[name], inner, keyword, name),
        );
      case 'patternProperties':
        if (!isObject(value) || !isObject(wanted)) return true;
        return all(Object.entries(wanted), ([pattern, inner]) =>
          all(
            Object.entries(value),
            ([name, one]) => !matching(pattern, name) || holds(one, inner, keyword, pattern),
          ),
        );
      case 'additionalProperties': {
        if (!isObject(value)) return true;
        const { properties = {}, patternProperties = {} } = schema;
        const known = (name: string) =>
          Object.hasOwn(properties as object, name) ||
          Object.keys(patternProperties as object).some((pattern) => matching(pattern, name));
        return all(Object.entries(value), ([name, one]) => known(name) || holds(one, wanted, keyword));
      }
      case 'propertyNames':
        return !isObject(value) || all(Object.keys(value), (name) => holds(name, wanted, keyword));
      case 'additionalItems':
      case 'contains':
      case 'dependencies':
      case 'dependentRequired':
      case 'dependentSchemas':
      case 'unevaluatedItems':
      case 'unevaluatedProperties':
      case '$dynamicRef':
      case '$recursiveRef':
      case CLOSED: {
        const isAbout =
          keyword.endsWith('ms') || keyword === 'contains' ? Array.isArray(value) : isObject(value);
        if (!isAbout && !keyword.startsWith('$')) return true;
        const named = keyword === CLOSED ? 'unevaluatedProperties' : keyword;
        return unsupportedKeyword(named, pointer, 'is not supported beside a list of values');
      }
      default:
        return true;
    }
  };
  return all(Object.entries(schema), ask);
}

function isOfType(value: unknown, type: unknown): boolean {
  switch (type) {
    case 'null':
      return value === null;
    case 'array':
      return Array.isArray(value);
    case 'object':
      return isObject(value);
    case 'integer':
      return Number.isInteger(value);
    default:
      return typeof value === type;
  }
}

export function satisfiesAll(
  value: unknown,
  schemas: readonly Located[],
  document: SchemaDocument,
  budget: Budget,
): Verdict {
  return all(schemas, (one) => satisfies(value, one, document, budget));
}

/** Those of `values` that surely satisfy all of `schemas`. Throws REQUEST_INVALID where of one of them that cannot be told. */
export function satisfying(
  values: readonly unknown[],
  schemas: readonly Located[],
  document: SchemaDocument,
  budget: Budget,
): unknown[] {
  return values.filter((value) => {
    const verdict = satisfiesAll(value, schemas, document, budget);
    if (verdict instanceof PdError) throw verdict;
    return verdict === true;
  });
}

export function typeOf(value: unknown): TypeName {
  if (value === null) return 'null';
  if (Array.isArray(value)) return 'array';
  if (Number.isInteger(value)) return 'integer';
  return typeof value as TypeName;
}
