/**
 * Where `unevaluatedProperties` and `unevaluatedItems` look for what describes keys and items: in the schema that they stand in and what
 * that refers to, but not in what stands beside it.
 */
import type { SchemaObject } from './schema-document.ts';

export interface Scope {
  readonly holder: SchemaObject;
  readonly outer: Scope | undefined;
  /** What nothing describes is not valid, rather than merely not written. */
  readonly exact: boolean;
}

/** Whether there is something in each of `closed`, of what describes a key or an item. */
export function isDescribed(closed: readonly Scope[], describing: readonly (Scope | undefined)[]): boolean {
  return closed.every((scope) => describing.some((inner) => isWithin(inner, scope)));
}

function isWithin(inner: Scope | undefined, scope: Scope): boolean {
  for (let one = inner; one; one = one.outer) if (one === scope) return true;
  return false;
}

/** Whether `schema` is met again below itself. */
export function holds(scope: Scope | undefined, schema: SchemaObject): boolean {
  for (let one = scope; one; one = one.outer) if (one.holder === schema) return true;
  return false;
}

/** Of keys or of items: others than those that are described are not written. */
export function isClosed(
  schema: SchemaObject,
  keyword: 'unevaluatedProperties' | 'unevaluatedItems',
): boolean {
  const value = schema[keyword];
  return value !== undefined && value !== true;
}
