/** What several schemas that must all hold ask for together, sorted by the type that it is about. */
import { PdError } from '../errors.ts';
import type { Budget } from './budget.ts';
import { regexExpression } from './regex.ts';
import { matches } from './regular.ts';
import {
  below,
  invalidSchema,
  isObject,
  type Located,
  located,
  type SchemaDocument,
  type SchemaObject,
  unsupportedKeyword,
} from './schema-document.ts';
import {
  readCount,
  readList,
  readMap,
  readNames,
  readNumber,
  readTypes,
  TYPE_NAMES,
  type TypeName,
} from './schema-keywords.ts';
import { ALL, CLOSED, EXCLUDED, type Negation, NOT_PATTERN, negation } from './schema-negation.ts';
import { holds, isClosed, isDescribed, type Scope } from './schema-scopes.ts';
import { equalValues, satisfiesAll } from './schema-values.ts';

/** Where a keyword stands, to be named in errors. */
export interface Sourced<T> {
  readonly value: T;
  readonly pointer: string;
}

/** `properties` and what goes with them, of one schema. */
export interface ObjectFacts {
  readonly properties: ReadonlyMap<string, Located>;
  readonly patterns: ReadonlyMap<string, Located>;
  readonly additional: Located | undefined;
  readonly scope: Scope | undefined;
}

export interface ArrayFacts {
  readonly prefix: readonly Located[];
  readonly rest: Located | undefined;
  readonly scope: Scope | undefined;
}

export interface Option {
  /** Must all hold, and describe keys and items, as `unevaluatedProperties` asks. */
  readonly describes: readonly Located[];
  /** Must all hold, too. */
  readonly demands: readonly Located[];
}

/** Alternatives of which one must hold, or, of `exactly` one, no other. */
export interface Alternatives {
  readonly keyword: string;
  /** Which the keyword stands in. */
  readonly schema: SchemaObject;
  readonly pointer: string;
  readonly exactlyOne: boolean;
  /** Of a keyword that stands for several of them, which one. */
  readonly name?: string;
  readonly options: readonly Option[];
  /** Nothing else than what satisfies one of the options is valid: else they are only what is written. */
  readonly complete: boolean;
}

export interface Facts {
  /** Nothing satisfies it. */
  impossible: boolean;
  /** A schema says nothing but `true`: nothing at all is asked for. */
  anything: boolean;
  types: ReadonlySet<TypeName> | undefined;
  /** Types whose keywords are there, though none names the type. */
  readonly implied: Set<TypeName>;
  values: readonly unknown[] | undefined;
  readonly objects: ObjectFacts[];
  readonly required: Set<string>;
  readonly propertyNames: Located[];
  /** Keys and items that nothing in one of these describes are not written. */
  readonly closedObjects: Scope[];
  readonly closedArrays: Scope[];
  /** Keys that are not named may be described nevertheless. */
  describesMore: boolean;
  minProperties: number;
  minPropertiesAt: string;
  maxProperties: number;
  readonly arrays: ArrayFacts[];
  minItems: number;
  maxItems: number;
  unique: boolean;
  minLength: number;
  maxLength: number;
  readonly patterns: Sourced<string>[];
  readonly notPatterns: Sourced<string>[];
  /** Values that are not to be. */
  readonly excluded: unknown[];
  readonly formats: Sourced<string>[];
  minimum: number;
  maximum: number;
  exclusiveMinimum: number;
  exclusiveMaximum: number;
  readonly multiples: Sourced<number>[];
  readonly alternatives: Alternatives[];
  /** Keywords that only values already known can be held against. */
  readonly unsupported: { readonly keyword: string; readonly pointer: string }[];
}

/** Throws REQUEST_INVALID: not a schema, or one that refers to itself without end. */
export function factsOf(schemas: readonly Located[], document: SchemaDocument, budget: Budget): Facts {
  const facts: Facts = {
    impossible: false,
    anything: true,
    types: undefined,
    implied: new Set(),
    values: undefined,
    objects: [],
    required: new Set(),
    propertyNames: [],
    closedObjects: [],
    closedArrays: [],
    describesMore: false,
    minProperties: 0,
    minPropertiesAt: '#',
    maxProperties: Number.POSITIVE_INFINITY,
    arrays: [],
    minItems: 0,
    maxItems: Number.POSITIVE_INFINITY,
    unique: false,
    minLength: 0,
    maxLength: Number.POSITIVE_INFINITY,
    patterns: [],
    notPatterns: [],
    excluded: [],
    formats: [],
    minimum: Number.NEGATIVE_INFINITY,
    maximum: Number.POSITIVE_INFINITY,
    exclusiveMinimum: Number.NEGATIVE_INFINITY,
    exclusiveMaximum: Number.POSITIVE_INFINITY,
    multiples: [],
    alternatives: [],
    unsupported: [],
  };
  const seen = new Map<SchemaObject, Set<Scope | undefined>>();
  const open = schemas.map((at): { at: Located; outer: Scope | undefined } => ({ at, outer: undefined }));
  open.reverse();
  for (let one = open.pop(); one; one = open.pop()) {
    budget.work(1);
    const { outer } = one;
    const { schema, pointer } = one.at;
    if (typeof schema === 'boolean') {
      facts.impossible ||= !schema;
      continue;
    }
    // What is asked for twice is asked for once: a reference in a circle adds nothing.
    const seenIn = seen.get(schema) ?? new Set();
    if (seenIn.has(outer) || holds(outer, schema)) continue;
    seen.set(schema, seenIn.add(outer));
    const scope = scopeOf(facts, schema, outer);
    const more: Located[] = [];
    const keywords = Object.keys(schema);
    budget.work(keywords.length);
    for (const keyword of keywords) {
      readKeyword(facts, keyword, schema, pointer, document, budget, more);
    }
    readObject(facts, schema, pointer, scope, budget);
    readArray(facts, schema, pointer, scope);
    open.push(...more.reverse().map((at) => ({ at, outer: scope })));
  }
  return facts;
}

/** Forbidding altogether what nothing describes is less than a schema for it would allow, and enough. */
function scopeOf(facts: Facts, schema: SchemaObject, outer: Scope | undefined): Scope | undefined {
  const closesKeys = CLOSED in schema || isClosed(schema, 'unevaluatedProperties');
  const closesItems = isClosed(schema, 'unevaluatedItems');
  if (!closesKeys && !closesItems) return outer;
  const scope = { holder: schema, outer, exact: schema['unevaluatedProperties'] === false };
  if (closesKeys) facts.closedObjects.push(scope);
  if (closesItems) facts.closedArrays.push(scope);
  return scope;
}

function readKeyword(
  facts: Facts,
  keyword: string,
  schema: SchemaObject,
  pointer: string,
  document: SchemaDocument,
  budget: Budget,
  more: Located[],
): void {
  const value = schema[keyword];
  const count = () => readCount(value, keyword, pointer);
  const number = () => readNumber(value, keyword, pointer);
  const list = () => readList(value, keyword, pointer);
  const implies = (type: TypeName) => {
    facts.implied.add(type);
    facts.anything = false;
  };
  switch (keyword) {
    case '$ref':
      more.push(document.resolve(value, pointer));
      return;
    case 'allOf':
      more.push(...list());
      return;
    case ALL:
      more.push(...(value as readonly Located[]));
      return;
    case 'anyOf':
    case 'oneOf': {
      const options = list().map((one) => ({ describes: [one], demands: [] }));
      const exactlyOne = keyword === 'oneOf';
      facts.alternatives.push({ keyword, schema, pointer, exactlyOne, options, complete: true });
      facts.anything = false;
      return;
    }
    case 'type':
      facts.types = intersectTypes(facts.types, readTypes(value, pointer));
      facts.anything = false;
      return;
    case 'const':
    case 'enum': {
      if (keyword === 'enum' && !Array.isArray(value)) throw invalidSchema(keyword, pointer, 'is no list');
      const values: readonly unknown[] = keyword === 'enum' ? (value as unknown[]) : [value];
      facts.values = facts.values ? common(facts.values, values, budget) : values;
      facts.anything = false;
      return;
    }
    case 'nullable':
      return;
    case 'properties':
    case 'patternProperties':
    case 'additionalProperties':
      implies('object');
      return;
    case 'unevaluatedProperties':
      implies('object');
      facts.describesMore ||= value !== false;
      return;
    case 'unevaluatedItems':
      implies('array');
      return;
    case CLOSED:
      implies('object');
      return;
    case 'required':
      implies('object');
      for (const name of readNames(value, keyword, pointer)) facts.required.add(name);
      return;
    case 'propertyNames':
      implies('object');
      facts.propertyNames.push(located(value, below(pointer, keyword)));
      return;
    case 'minProperties':
      implies('object');
      if (count() > facts.minProperties) facts.minPropertiesAt = pointer;
      facts.minProperties = Math.max(facts.minProperties, count());
      return;
    case 'maxProperties':
      implies('object');
      facts.maxProperties = Math.min(facts.maxProperties, count());
      return;
    case 'dependentRequired':
    case 'dependentSchemas':
    case 'dependencies':
      implies('object');
      facts.alternatives.push(...readDependencies(schema, keyword, pointer));
      return;
    case 'items':
    case 'prefixItems':
    case 'additionalItems':
      implies('array');
      return;
    case 'minItems':
      implies('array');
      facts.minItems = Math.max(facts.minItems, count());
      return;
    case 'maxItems':
      implies('array');
      facts.maxItems = Math.min(facts.maxItems, count());
      return;
    case 'uniqueItems':
      implies('array');
      facts.unique ||= value === true;
      return;
    case 'minLength':
      implies('string');
      facts.minLength = Math.max(facts.minLength, count());
      return;
    case 'maxLength':
      implies('string');
      facts.maxLength = Math.min(facts.maxLength, count());
      return;
    case 'pattern':
      implies('string');
      if (typeof value !== 'string') throw invalidSchema(keyword, pointer, 'is no text');
      facts.patterns.push({ value, pointer });
      return;
    case 'format':
      if (typeof value !== 'string') throw invalidSchema(keyword, pointer, 'is no text');
      facts.formats.push({ value, pointer });
      return;
    case 'minimum':
      implies('number');
      // Draft 4 has a boolean beside it.
      if (schema['exclusiveMinimum'] === true) {
        facts.exclusiveMinimum = Math.max(facts.exclusiveMinimum, number());
      } else facts.minimum = Math.max(facts.minimum, number());
      return;
    case 'maximum':
      implies('number');
      if (schema['exclusiveMaximum'] === true) {
        facts.exclusiveMaximum = Math.min(facts.exclusiveMaximum, number());
      } else facts.maximum = Math.min(facts.maximum, number());
      return;
    case 'exclusiveMinimum':
      if (typeof value === 'boolean') return;
      implies('number');
      facts.exclusiveMinimum = Math.max(facts.exclusiveMinimum, number());
      return;
    case 'exclusiveMaximum':
      if (typeof value === 'boolean') return;
      implies('number');
      facts.exclusiveMaximum = Math.min(facts.exclusiveMaximum, number());
      return;
    case 'multipleOf':
      implies('number');
      if (!(number() > 0)) throw invalidSchema(keyword, pointer, 'is not above 0');
      facts.multiples.push({ value: number(), pointer });
      return;
    case 'not':
    case 'if': {
      facts.anything = false;
      const at = located(value, below(pointer, keyword));
      const otherwise = negation(at, document, budget);
      if (!otherwise) facts.unsupported.push({ keyword, pointer });
      else facts.alternatives.push(conditionOf(keyword, at, otherwise, schema, pointer));
      return;
    }
    case EXCLUDED:
      facts.excluded.push(...(value as readonly unknown[]));
      facts.anything = false;
      return;
    case NOT_PATTERN:
      if (typeof value !== 'string') throw invalidSchema('pattern', pointer, 'is no text');
      facts.notPatterns.push({ value, pointer });
      facts.anything = false;
      return;
    case '$dynamicRef':
    case '$recursiveRef':
    case 'contains':
      facts.unsupported.push({ keyword, pointer });
      facts.anything = false;
      return;
    default:
      // Titles, examples, extensions and the like say nothing about what is valid.
      return;
  }
}

/** Of `values` those that are among `others`, too. */
function common(values: readonly unknown[], others: readonly unknown[], budget: Budget): readonly unknown[] {
  const known = new Set(others);
  const objects = others.filter((one) => typeof one === 'object' && one !== null);
  budget.work(values.length + others.length);
  return values.filter((one) => {
    if (known.has(one)) return true;
    if (typeof one !== 'object' || one === null) return false;
    budget.work(objects.length);
    return objects.some((other) => equalValues(one, other));
  });
}

/** `if` with what follows from it, or else without. */
function conditionOf(
  keyword: string,
  at: Located,
  { options, complete }: Negation,
  schema: SchemaObject,
  pointer: string,
): Alternatives {
  const base = { keyword, schema, pointer, exactlyOne: false, complete };
  const failing = (describes: readonly Located[]) => options.map((demands) => ({ describes, demands }));
  if (keyword === 'not') return { ...base, options: failing([]) };
  const branch = (name: 'then' | 'else') =>
    schema[name] === undefined ? [] : [located(schema[name], below(pointer, name))];
  return {
    ...base,
    options: [{ describes: [at, ...branch('then')], demands: [] }, ...failing(branch('else'))],
  };
}

function readObject(
  facts: Facts,
  schema: SchemaObject,
  pointer: string,
  scope: Scope | undefined,
  budget: Budget,
): void {
  const { properties, patternProperties, additionalProperties: additional } = schema;
  if (properties === undefined && patternProperties === undefined && additional === undefined) return;
  const read: ObjectFacts = {
    properties: readMap(properties, 'properties', pointer),
    patterns: readMap(patternProperties, 'patternProperties', pointer),
    additional:
      additional === undefined ? undefined : located(additional, below(pointer, 'additionalProperties')),
    scope,
  };
  budget.work(read.properties.size + read.patterns.size);
  facts.objects.push(read);
}

/** `items` was a list once, with `additionalItems` for the rest. */
function readArray(facts: Facts, schema: SchemaObject, pointer: string, scope: Scope | undefined): void {
  const { items, prefixItems, additionalItems } = schema;
  if (items === undefined && prefixItems === undefined) return;
  const listed = Array.isArray(items) ? 'items' : 'prefixItems';
  const prefix = schema[listed] === undefined ? [] : readList(schema[listed], listed, pointer, true);
  const after = Array.isArray(items) ? 'additionalItems' : 'items';
  const rest = Array.isArray(items) ? additionalItems : items;
  const behind = rest === undefined ? undefined : located(rest, below(pointer, after));
  facts.arrays.push({ prefix, rest: behind, scope });
}

/** Each as two alternatives: the property is not there, or it is, of an object, and so is what it takes. */
function readDependencies(schema: SchemaObject, keyword: string, pointer: string): Alternatives[] {
  const value = schema[keyword];
  if (!isObject(value)) throw invalidSchema(keyword, pointer, 'is no object');
  return Object.entries(value).map(([name, needs]): Alternatives => {
    const at = below(pointer, keyword, name);
    const present = Array.isArray(needs)
      ? [located({ type: 'object', required: [name, ...readNames(needs, keyword, pointer)] }, at)]
      : [located({ type: 'object', required: [name] }, at), located(needs, at)];
    const absent = [located({ properties: { [name]: false } }, at)];
    const options = [absent, present].map((describes) => ({ describes, demands: [] }));
    return { keyword, schema, pointer, name, exactlyOne: false, options, complete: true };
  });
}

function intersectTypes(
  a: ReadonlySet<TypeName> | undefined,
  b: ReadonlySet<TypeName>,
): ReadonlySet<TypeName> {
  if (!a) return b;
  const both = TYPE_NAMES.filter((type) => has(a, type) && has(b, type));
  return new Set(both);
}

function has(types: ReadonlySet<TypeName>, type: TypeName): boolean {
  return types.has(type) || (type === 'integer' && types.has('number'));
}

/** Whether a value could be of a type of both. */
export function typesOverlap(a: ReadonlySet<TypeName>, b: ReadonlySet<TypeName>): boolean {
  return TYPE_NAMES.some((type) => has(a, type) && has(b, type));
}

/** The first of `facts.unsupported`, as an error. */
export function firstUnsupported({ unsupported }: Facts): Error | undefined {
  const [first] = unsupported;
  return (
    first &&
    unsupportedKeyword(first.keyword, first.pointer, 'is a condition that no grammar here can express')
  );
}

/** What `facts` allow by type: what they name, or what their keywords are about, or undefined for all. */
export function typesOf(facts: Facts): ReadonlySet<TypeName> | undefined {
  return facts.types ?? (facts.implied.size > 0 ? facts.implied : undefined);
}

/**
 * What holds for the value of property `name`, as far as it is `written`, or else for each that is valid. Throws REQUEST_INVALID where it
 * cannot be told whether it may be written at all.
 */
export function propertyOf(
  name: string,
  { objects, closedObjects, propertyNames }: Facts,
  document: SchemaDocument,
  budget: Budget,
  written = true,
): Located[] {
  const schemas: Located[] = [];
  const describing = new Set<Scope | undefined>();
  budget.work(objects.length);
  for (const { properties, patterns, additional, scope } of objects) {
    const own = properties.get(name);
    const matching = [...patterns].filter(([pattern]) =>
      matches(regexExpression(pattern, 'within'), name, budget),
    );
    if (own) schemas.push(own);
    schemas.push(...matching.map(([, one]) => one));
    const isOwn = own !== undefined || matching.length > 0;
    if (isOwn || additional) describing.add(scope);
    if (!isOwn && additional) schemas.push(additional);
  }
  const mayBe = satisfiesAll(name, propertyNames, document, budget);
  if (written && mayBe instanceof PdError) throw mayBe;
  const isNamed = written ? mayBe === true : mayBe !== false;
  if (!isNamed || !isDescribed(closedObjects, [...describing])) schemas.push({ schema: false, pointer: '#' });
  return schemas;
}
