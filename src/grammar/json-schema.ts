/**
 * A JSON Schema as a grammar of texts that satisfy it: all of them valid, though not each valid one is written (properties come in the order
 * in which the schema names them; blanks, digits and escapes are limited). What cannot be kept is refused by keyword and place.
 */
import { PdError } from '../errors.ts';
import type { Budget } from './budget.ts';
import {
  characters,
  choice,
  EMPTY,
  type Expression,
  type Grammar,
  type GraphEdge,
  LAST_CODE_POINT,
  NOTHING,
  type Rule,
  repeat,
  rule,
  sequence,
  text,
} from './expression.ts';
import { jsonRules, keyBesides, literal, member, quoted, SINGLE_NUMBER, stringOf } from './json.ts';
import { insideString, regexExpression } from './regex.ts';
import { difference, intersection, isNothing } from './regular.ts';
import { SchemaAlternatives } from './schema-alternatives.ts';
import { isObject, type Located, SchemaDocument, unsupportedKeyword } from './schema-document.ts';
import { type Facts, factsOf, firstUnsupported, propertyOf, typesOf } from './schema-facts.ts';
import { formatExpression } from './schema-formats.ts';
import { SchemaIdentities } from './schema-identity.ts';
import type { TypeName } from './schema-keywords.ts';
import { numberExpression } from './schema-numbers.ts';
import { isDescribed, type Scope } from './schema-scopes.ts';
import { satisfying, typeOf } from './schema-values.ts';

const MOST_SCHEMAS_OPEN = 150;
const MOST_RULES = 5000;
/** Bytes of values written out in place rather than as a rule of their own. */
const FEW_BYTES = 200;
const TYPES: readonly TypeName[] = ['object', 'array', 'string', 'number', 'boolean', 'null'];
/** Of a string, in one way only. */
const ONE_CHARACTER = insideString(characters([0, LAST_CODE_POINT]));
/** Of a name that others are told from. */
const STEPS_PER_LETTER = 4;
const FREE: Located = { schema: true, pointer: '#' };

/** Throws REQUEST_INVALID with the keyword and its JSON pointer where the schema is not valid or not supported. */
export function jsonSchemaGrammar(schema: unknown, budget: Budget): Grammar {
  return new SchemaCompiler(new SchemaDocument(schema), budget).compile();
}

class SchemaCompiler {
  readonly #document: SchemaDocument;
  readonly #budget: Budget;
  readonly #rules: Rule[] = [];
  readonly #json;
  readonly #known = new Map<string, Expression>();
  readonly #identities: SchemaIdentities;
  readonly #alternatives: SchemaAlternatives;
  /** Each value is written in one way, so that its text tells it from others. */
  #singly = false;
  /** Keys in the order in which they have been met first, which is theirs then. */
  readonly #ranks = new Map<string, number>();
  #singleString: Expression | undefined;
  #open = 0;

  constructor(document: SchemaDocument, budget: Budget) {
    this.#document = document;
    this.#budget = budget;
    this.#identities = new SchemaIdentities(document, budget);
    this.#alternatives = new SchemaAlternatives(document, budget, this.#identities);
    this.#rules.push({ name: '#', body: NOTHING });
    this.#json = jsonRules(1);
    this.#rules.push(...this.#json.rules);
  }

  compile(): Grammar {
    const { root } = this.#document;
    this.#rules[0] = { name: root.pointer, body: sequence(this.#json.blanks, this.#schema([root])) };
    return { rules: this.#rules };
  }

  /** Texts that satisfy all of `schemas`: a rule, so that a schema may refer to itself, or what is short, written out. */
  #schema(all: readonly Located[]): Expression {
    const schemas = this.#identities.flat(all);
    const key = schemas
      .map(({ schema }) => this.#identities.of(schema))
      .sort((a, b) => a - b)
      .join(' ')
      .concat(this.#singly ? ' singly' : '');
    const known = this.#known.get(key);
    if (known) return known;
    if (this.#rules.length >= MOST_RULES) {
      throw new PdError('REQUEST_INVALID', `the JSON schema has more than ${MOST_RULES} different parts`);
    }
    const { pointer } = schemas[0] ?? FREE;
    if (++this.#open > MOST_SCHEMAS_OPEN) {
      throw new PdError(
        'REQUEST_INVALID',
        `the JSON schema nests deeper than ${MOST_SCHEMAS_OPEN} schemas at ${pointer.slice(0, 200)}`,
      );
    }
    const number = this.#rules.push({ name: pointer, body: NOTHING }) - 1;
    this.#known.set(key, rule(number));
    const body = this.#written(schemas);
    this.#open--;
    this.#rules[number] = { name: pointer, body };
    if (isShort(body)) this.#known.set(key, body);
    return this.#known.get(key)!;
  }

  #written(schemas: readonly Located[]): Expression {
    const facts = factsOf(schemas, this.#document, this.#budget);
    if (facts.impossible) return NOTHING;
    if (facts.values) {
      const values = this.#values(facts.values, schemas);
      return choice(...values.map((value) => this.#literal(value)));
    }
    const [first] = facts.alternatives;
    if (first) return choice(...this.#alternatives.each(first, schemas).map((one) => this.#schema(one)));
    const unsupported = firstUnsupported(facts);
    if (unsupported) throw unsupported;
    const types = typesOf(facts);
    for (const type of ['array', 'object'] as const) {
      if (types && !types.has(type)) continue;
      if (facts.excluded.some((value) => typeOf(value) === type)) {
        const { pointer } = schemas[0] ?? FREE;
        throw unsupportedKeyword('not', pointer, `excludes an ${type}, which no grammar here can express`);
      }
    }
    if (facts.anything && facts.formats.length === 0 && !this.#singly) return this.#json.value;
    return choice(
      ...TYPES.flatMap((type) => {
        const isInteger = type === 'number' && types?.has('integer') && !types.has('number');
        return types && !types.has(type) && !isInteger
          ? []
          : [this.#ofType(isInteger ? 'integer' : type, facts)];
      }),
    );
  }

  #valueOf(schemas: readonly Located[]): Expression {
    if (schemas.length > 0) return this.#schema(schemas);
    return this.#singly ? this.#schema([FREE]) : this.#json.value;
  }

  #literal(value: unknown): Expression {
    return literal(this.#singly ? this.#ordered(value) : value);
  }

  #ordered(value: unknown): unknown {
    if (Array.isArray(value)) return value.map((one) => this.#ordered(one));
    if (!isObject(value)) return value;
    return Object.fromEntries(
      this.#ranked(Object.keys(value)).map((key) => [key, this.#ordered(value[key])]),
    );
  }

  #ranked(names: readonly string[]): readonly string[] {
    for (const name of names) if (!this.#ranks.has(name)) this.#ranks.set(name, this.#ranks.size);
    return [...names].sort((a, b) => this.#ranks.get(a)! - this.#ranks.get(b)!);
  }

  #values(values: readonly unknown[], schemas: readonly Located[]): unknown[] {
    return satisfying(values, schemas, this.#document, this.#budget);
  }

  #ofType(type: TypeName, facts: Facts): Expression {
    const { excluded } = facts;
    switch (type) {
      case 'null':
        return excluded.includes(null) ? NOTHING : text('null');
      case 'boolean':
        return choice(...[true, false].filter((value) => !excluded.includes(value)).map(literal));
      case 'integer':
      case 'number':
        return this.#number(facts, type === 'integer');
      case 'string':
        return this.#string(facts);
      case 'array':
        return this.#array(facts);
      case 'object':
        return this.#object(facts);
    }
  }

  #number(facts: Facts, integer: boolean): Expression {
    const written = numberExpression(facts, integer, this.#budget);
    return this.#singly ? intersection(written, SINGLE_NUMBER, this.#budget) : written;
  }

  #string({ minLength, maxLength, patterns, notPatterns, formats, excluded }: Facts): Expression {
    if (minLength > maxLength) return NOTHING;
    const insides = patterns.map(({ value, pointer }) =>
      insideString(named('pattern', pointer, () => regexExpression(value, 'within'))),
    );
    for (const { value, pointer } of formats) {
      const format = formatExpression(value);
      if (format === 'ignored') continue;
      if (format === 'unsupported')
        throw unsupportedKeyword('format', pointer, `is "${value}", which is not supported`);
      insides.push(insideString(format));
    }
    const isLimited = minLength > 0 || Number.isFinite(maxLength);
    const without = [
      ...notPatterns.map(({ value, pointer }) =>
        insideString(named('pattern', pointer, () => regexExpression(value, 'within'))),
      ),
      ...excluded.flatMap((value) =>
        typeof value === 'string' ? [text(JSON.stringify(value).slice(1, -1))] : [],
      ),
    ];
    if (insides.length === 0 && without.length === 0 && !isLimited) {
      return this.#singly ? this.#anySingleString() : this.#json.string;
    }
    if (insides.length === 0 && without.length === 0 && !this.#singly) return stringOf(minLength, maxLength);
    // A pattern writes each character in one way only.
    if (isLimited || insides.length === 0) {
      insides.push(repeat(ONE_CHARACTER, minLength, maxLength));
    }
    const all = insides.reduce((some, one) => intersection(some, one, this.#budget));
    return quoted(without.reduce((some, one) => difference(some, one, this.#budget), all));
  }

  #anySingleString(): Expression {
    if (!this.#singleString) {
      const body = quoted(repeat(ONE_CHARACTER, 0, Number.POSITIVE_INFINITY));
      this.#singleString = rule(this.#rules.push({ name: 'string', body }) - 1);
    }
    return this.#singleString;
  }

  #array(facts: Facts): Expression {
    return facts.unique && facts.maxItems > 1 ? this.#uniqueArray(facts) : this.#items(facts);
  }

  #items(facts: Facts): Expression {
    const { arrays, minItems, maxItems, closedArrays } = facts;
    const { blanks } = this.#json;
    const prefix = Math.max(0, ...arrays.map((one) => one.prefix.length));
    const at = (i: number): readonly Located[] => {
      const describing = arrays.flatMap((one) => {
        const item = one.prefix[i] ?? one.rest;
        return item ? [{ item, scope: one.scope }] : [];
      });
      const scopes = describing.map(({ scope }) => scope);
      const items = describing.map(({ item }) => item);
      return isDescribed(closedArrays, scopes) ? items : [...items, { schema: false, pointer: '#' }];
    };
    if (minItems > maxItems) return NOTHING;
    // State i: so many items have been read, and the blanks behind them; the last one stands for all from there on.
    const isEndless = maxItems === Number.POSITIVE_INFINITY;
    const last = isEndless ? Math.max(1, prefix, minItems) : maxItems;
    const edges: GraphEdge[] = [];
    const add = (from: number, to: number, schemas: readonly Located[]) => {
      this.#budget.states(1);
      const item = this.#valueOf(schemas);
      edges.push({ from, to, item: sequence(...(from > 0 ? [text(','), blanks] : []), item, blanks) });
    };
    for (let i = 0; i < last; i++) add(i, i + 1, at(i));
    if (isEndless) add(last, last, at(last));
    const ends = Array.from({ length: last + 1 }, (_, i) => i).filter((i) => i >= minItems);
    return sequence(text('['), blanks, { kind: 'graph', size: last + 1, edges, ends }, text(']'));
  }

  /** Each item other than all before it: what the rule marks is kept while texts are written. */
  #uniqueArray(facts: Facts): Expression {
    if (this.#tooFew(facts)) return NOTHING;
    const before = this.#singly;
    this.#singly = true;
    const body = this.#items(facts);
    this.#singly = before;
    return rule(this.#rules.push({ name: 'array of unique items', body, unique: true }) - 1);
  }

  /** Whether items of a few known values cannot be as many as there must be without one of them twice. */
  #tooFew({ arrays, minItems }: Facts): boolean {
    if (minItems < 2 || arrays.some(({ prefix }) => prefix.length > 0)) return false;
    const items = arrays.flatMap(({ rest }) => (rest ? [rest] : []));
    const { values, types } = factsOf(items, this.#document, this.#budget);
    const sizes: Partial<Record<TypeName, number>> = { null: 1, boolean: 2 };
    if (!values)
      return types ? [...types].reduce((sum, type) => sum + (sizes[type] ?? minItems), 0) < minItems : false;
    return new Set(this.#values(values, items).map((value) => JSON.stringify(value))).size < minItems;
  }

  /** Properties in order, each once or, where it may, not at all; then others. */
  #object(facts: Facts): Expression {
    const { objects, required, minProperties, maxProperties } = facts;
    const { blanks, object } = this.#json;
    const isLimited = minProperties > 0 || Number.isFinite(maxProperties);
    if (objects.length === 0 && required.size === 0 && facts.propertyNames.length === 0 && !isLimited) {
      if (facts.closedObjects.length === 0 && !this.#singly) return object;
    }
    if (minProperties > maxProperties || required.size > maxProperties) return NOTHING;
    const named = [...new Set([...objects.flatMap(({ properties }) => [...properties.keys()]), ...required])];
    const names = this.#singly ? this.#ranked(named) : named;
    // Keys without an order of their own come in many; one alone is always in order.
    const others = this.#singly && names.length > 0 ? [] : this.#otherMembers(names, facts);
    const mostOthers = this.#singly ? 1 : Number.POSITIVE_INFINITY;
    // State (i, c): of the names, i have been decided, and c are there; from `cap` on, it no longer matters how many.
    const least = Math.min(minProperties, names.length + 1);
    const cap = Math.max(1, least, Number.isFinite(maxProperties) ? maxProperties : 0);
    if (minProperties > least && others.length > 0) {
      throw unsupportedKeyword(
        'minProperties',
        facts.minPropertiesAt,
        'asks for several properties that the schema does not name',
      );
    }
    const stateOf = (i: number, count: number) => i * (cap + 1) + count;
    const edges: GraphEdge[] = [];
    let size = stateOf(names.length + 2, 0);
    const comma = sequence(text(','), blanks);
    const add = (from: number, to: number, count: number, item: Expression) =>
      edges.push({ from, to, item: sequence(...(count > 0 ? [comma] : []), item, blanks) });
    names.forEach((name, i) => {
      const schemas = propertyOf(name, facts, this.#document, this.#budget);
      const value = this.#valueOf(schemas);
      const item = sequence(member(blanks, literal(name), value), blanks);
      // Written once for all counts that it leads to the same one from, behind a comma or not.
      const begun = new Map<number, number>();
      for (let count = 0; count <= Math.min(cap, i); count++) {
        this.#budget.states(1);
        if (!required.has(name))
          edges.push({ from: stateOf(i, count), to: stateOf(i + 1, count), item: EMPTY });
        if (count >= maxProperties) continue;
        const after = Math.min(cap, count + 1);
        const start = begun.get(after) ?? size++;
        if (!begun.has(after)) edges.push({ from: start, to: stateOf(i + 1, after), item });
        begun.set(after, start);
        edges.push({ from: stateOf(i, count), to: start, item: count > 0 ? comma : EMPTY });
      }
    });
    const ends: number[] = [];
    const lastRow = names.length;
    for (let count = 0; count <= cap; count++) {
      if (count >= least && count <= maxProperties) ends.push(stateOf(lastRow, count));
      // Two others may have the same key, so that all of them count as one for the least.
      if (others.length === 0 || count + 1 < least) continue;
      for (const item of others) {
        if (count < maxProperties) {
          add(stateOf(lastRow, count), stateOf(lastRow + 1, Math.min(cap, count + 1)), count, item);
          if (mostOthers > 1)
            add(stateOf(lastRow + 1, count), stateOf(lastRow + 1, Math.min(cap, count + 1)), 1, item);
        }
      }
    }
    for (let count = least; count <= Math.min(cap, maxProperties); count++)
      ends.push(stateOf(lastRow + 1, count));
    const members: Expression = { kind: 'graph', size, edges, ends };
    return sequence(text('{'), blanks, members, text('}'));
  }

  /** Keys that satisfy a schema, in quotes. */
  #keys(one: Located): Expression {
    const facts = factsOf([one], this.#document, this.#budget);
    if (facts.impossible || (facts.types && !facts.types.has('string'))) return NOTHING;
    if (facts.values) {
      const values = this.#values(facts.values, [one]).filter((value) => typeof value === 'string');
      return choice(...values.map(literal));
    }
    if (facts.alternatives.length > 0 || facts.unsupported.length > 0) {
      throw unsupportedKeyword(
        'propertyNames',
        one.pointer,
        'is only supported with an enum or keywords of strings',
      );
    }
    const keys = this.#string(facts);
    return keys.kind === 'rule' ? stringOf(0, Number.POSITIVE_INFINITY) : keys;
  }

  /** Members whose keys are none of `names`, by what their keys match. */
  #otherMembers(names: readonly string[], facts: Facts): Expression[] {
    const { objects, closedObjects, propertyNames } = facts;
    const patterns = [...new Set(objects.flatMap((one) => [...one.patterns.keys()]))];
    const keys = new Map(
      patterns.map((pattern) => {
        const written = named('patternProperties', '#', () => regexExpression(pattern, 'within'));
        return [pattern, quoted(insideString(written))];
      }),
    );
    const members: Expression[] = [];
    for (const chosen of [...patterns, undefined]) {
      const scopes: (Scope | undefined)[] = [];
      const schemas = objects.flatMap((one): Located[] => {
        const own = chosen === undefined ? undefined : one.patterns.get(chosen);
        const value = own ?? one.additional;
        if (value) scopes.push(one.scope);
        return value ? [value] : [];
      });
      if (!isDescribed(closedObjects, scopes)) continue;
      if (factsOf(schemas, this.#document, this.#budget).impossible) continue;
      this.#budget.work(STEPS_PER_LETTER * names.reduce((sum, name) => sum + name.length, 0));
      let key = keyBesides(names);
      for (const [pattern, matching] of keys) {
        key = (pattern === chosen ? intersection : difference)(key, matching, this.#budget);
      }
      for (const one of propertyNames) {
        key = intersection(key, this.#keys(one), this.#budget);
      }
      const isNarrowed = keys.size > 0 || propertyNames.length > 0;
      if (isNarrowed && isNothing(key, this.#budget)) continue;
      const value = this.#valueOf(schemas);
      // A rule of its own, without calls: masks inside of it are found the quick way.
      const number = this.#rules.push({ name: 'other key', body: key }) - 1;
      members.push(member(this.#json.blanks, rule(number), value));
    }
    return members;
  }
}

/** Written in place: a rule's call, or a few bytes. */
function isShort(expression: Expression): boolean {
  switch (expression.kind) {
    case 'rule':
      return true;
    case 'text':
      return expression.bytes.length <= FEW_BYTES;
    case 'choice': {
      let bytes = 0;
      for (const item of expression.items) {
        if (item.kind === 'text') bytes += item.bytes.length;
        else if (item.kind !== 'rule') return false;
      }
      return bytes <= FEW_BYTES;
    }
    default:
      return false;
  }
}

/** What `read` refuses, with the place that it stands at. */
function named<T>(keyword: string, pointer: string, read: () => T): T {
  try {
    return read();
  } catch (cause) {
    if (!(cause instanceof PdError)) throw cause;
    throw unsupportedKeyword(keyword, pointer, `cannot be used: ${cause.message}`);
  }
}
