/** Which schemas say the same: a number each, so that what has been written for one is not written again for another. */
import type { Budget } from './budget.ts';
import { below, isObject, type Located, located, type SchemaDocument } from './schema-document.ts';
import { ALL, EXCLUDED } from './schema-negation.ts';

/** Say nothing about what is valid; definitions do so only where something refers to them. */
const SILENT = new Set([
  '$comment',
  '$defs',
  '$id',
  '$schema',
  'default',
  'definitions',
  'deprecated',
  'description',
  'example',
  'examples',
  'id',
  'markdownDescription',
  'readOnly',
  'title',
  'writeOnly',
]);
/** Behind these stand names of which each has a schema. */
const MAPS = new Set(['properties', 'patternProperties', 'dependentSchemas', 'dependencies']);

/** Characters. */
const SPELT_PER_STEP = 32;

export class SchemaIdentities {
  readonly #document: SchemaDocument;
  readonly #budget: Budget;
  readonly #numbers = new Map<string, number>();
  readonly #known = new Map<unknown, number>();

  constructor(document: SchemaDocument, budget: Budget) {
    this.#document = document;
    this.#budget = budget;
  }

  /** Equal for two that differ in what they are called and described as. */
  of(schema: unknown): number {
    const known = this.#known.get(schema);
    if (known !== undefined) return known;
    const spelt = this.#spelt(schema);
    this.#budget.work(1 + Math.ceil(spelt.length / SPELT_PER_STEP));
    const number = this.#number(spelt);
    if (typeof schema === 'object') this.#known.set(schema, number);
    return number;
  }

  /** The same demands, each once: what only refers to others is what it refers to. */
  flat(schemas: readonly Located[]): readonly Located[] {
    const found = new Map<number, Located>();
    const seen = new Set<unknown>();
    const open = [...schemas].reverse();
    for (let one = open.pop(); one; one = open.pop()) {
      this.#budget.work(1);
      const { schema, pointer } = one;
      const isReference =
        typeof schema === 'object' &&
        !seen.has(schema) &&
        Object.keys(schema).every((key) => key === '$ref' || key === 'allOf' || SILENT.has(key));
      if (!isReference || !('$ref' in schema || 'allOf' in schema)) {
        const number = this.of(schema);
        if (!found.has(number)) found.set(number, one);
        continue;
      }
      seen.add(schema);
      if (Array.isArray(schema['allOf'])) {
        const parts = schema['allOf'].map((inner, i) => located(inner, below(pointer, 'allOf', i)));
        open.push(...parts.reverse());
      } else if ('allOf' in schema) found.set(this.of(schema), one);
      if ('$ref' in schema) open.push(this.#document.resolve(schema['$ref'], pointer));
    }
    return [...found.values()];
  }

  #spelt(schema: unknown): string {
    if (Array.isArray(schema)) return `[${schema.map((one) => this.of(one)).join(' ')}]`;
    if (!isObject(schema)) return String(JSON.stringify(schema));
    const parts = Object.entries(schema).flatMap(([keyword, value]) => {
      if (SILENT.has(keyword)) return [];
      if (keyword === 'enum' || keyword === 'const' || keyword === EXCLUDED)
        return [`${keyword}=${JSON.stringify(value)}`];
      if (keyword === ALL) return [`${keyword}:${this.of((value as Located[]).map((one) => one.schema))}`];
      if (!MAPS.has(keyword) || !isObject(value)) return [`${JSON.stringify(keyword)}:${this.of(value)}`];
      const members = Object.entries(value).map(([name, one]) => `${JSON.stringify(name)}:${this.of(one)}`);
      return [`${keyword}{${members.join(' ')}}`];
    });
    return `{${parts.join(' ')}}`;
  }

  #number(spelt: string): number {
    const known = this.#numbers.get(spelt);
    if (known !== undefined) return known;
    this.#numbers.set(spelt, this.#numbers.size);
    return this.#numbers.size - 1;
  }
}
