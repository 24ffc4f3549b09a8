/** What stands behind the keywords of a schema, as what it has to be. All throw REQUEST_INVALID, by keyword and place. */
import { below, invalidSchema, isObject, type Located, located } from './schema-document.ts';

export type TypeName = 'null' | 'boolean' | 'integer' | 'number' | 'string' | 'array' | 'object';

export const TYPE_NAMES: readonly TypeName[] = [
  'null',
  'boolean',
  'integer',
  'number',
  'string',
  'array',
  'object',
];

export function readMap(value: unknown, keyword: string, pointer: string): Map<string, Located> {
  if (value === undefined) return new Map();
  if (!isObject(value)) throw invalidSchema(keyword, pointer, 'is no object');
  return new Map(
    Object.entries(value).map(([name, schema]) => [name, located(schema, below(pointer, keyword, name))]),
  );
}

export function readList(value: unknown, keyword: string, pointer: string, mayBeEmpty = false): Located[] {
  if (!Array.isArray(value) || (value.length === 0 && !mayBeEmpty)) {
    throw invalidSchema(keyword, pointer, 'is no list of schemas');
  }
  return value.map((schema, i) => located(schema, below(pointer, keyword, i)));
}

export function readNames(value: unknown, keyword: string, pointer: string): readonly string[] {
  if (Array.isArray(value) && value.every((name) => typeof name === 'string')) return value;
  // Draft 3 and OpenAPI 2 put a boolean beside a property.
  if (typeof value === 'boolean') return [];
  throw invalidSchema(keyword, pointer, 'is no list of names');
}

export function readCount(value: unknown, keyword: string, pointer: string): number {
  if (typeof value === 'number' && Number.isInteger(value) && value >= 0) return value;
  throw invalidSchema(keyword, pointer, 'is no whole number from 0 on');
}

export function readNumber(value: unknown, keyword: string, pointer: string): number {
  if (typeof value === 'number' && Number.isFinite(value)) return value;
  throw invalidSchema(keyword, pointer, 'is no number');
}

export function readTypes(value: unknown, pointer: string): ReadonlySet<TypeName> {
  const names: readonly unknown[] = Array.isArray(value) ? value : [value];
  for (const name of names) {
    if (!TYPE_NAMES.includes(name as TypeName)) {
      throw invalidSchema('type', pointer, `names ${JSON.stringify(name)?.slice(0, 50)}, which is no type`);
    }
  }
  return new Set(names as readonly TypeName[]);
}
