/** A JSON Schema as it was given, and the places in it. */
import { PdError } from '../errors.ts';

export type SchemaObject = Readonly<Record<string, unknown>>;

/** A schema and where it stands, as a JSON pointer from the root: `#/properties/name`. */
export interface Located {
  readonly schema: SchemaObject | boolean;
  readonly pointer: string;
}

const MOST_VALUES = 50_000;
const MOST_NESTING = 256;

export class SchemaDocument {
  readonly root: Located;
  readonly #anchors = new Map<string, Located>();

  /** Throws REQUEST_INVALID where it is no schema, too large or too deep. */
  constructor(schema: unknown) {
    // Before anything walks it by recursion.
    this.#look(schema);
    this.root = located(schema, '#');
  }

  /** What `$ref` names, for a schema at `pointer`. */
  resolve(reference: unknown, pointer: string): Located {
    if (typeof reference !== 'string') throw invalidSchema('$ref', pointer, 'is no text');
    const { schema } = this.root;
    const id = typeof schema === 'object' ? schema['$id'] : undefined;
    const isOwn = typeof id === 'string' && id !== '' && reference.startsWith(id);
    const local = isOwn ? reference.slice(id.length) || '#' : reference;
    const anchor = this.#anchors.get(local);
    if (anchor) return anchor;
    if (local === '#') return this.root;
    if (!local.startsWith('#/')) {
      throw unsupportedKeyword(
        '$ref',
        pointer,
        `names "${shortened(reference)}", which is not in this schema`,
      );
    }
    let at: unknown = this.root.schema;
    for (const part of decoded(local.slice(2)).split('/')) {
      const key = part.replaceAll('~1', '/').replaceAll('~0', '~');
      const isThere = typeof at === 'object' && at !== null && Object.hasOwn(at, key);
      if (!isThere)
        throw invalidSchema('$ref', pointer, `names "${shortened(reference)}", which does not exist`);
      at = (at as SchemaObject)[key];
    }
    return located(at, local);
  }

  #look(root: unknown): void {
    const open: { readonly value: unknown; readonly depth: number; readonly pointer: string }[] = [
      { value: root, depth: 0, pointer: '#' },
    ];
    let values = 0;
    for (let top = open.pop(); top; top = open.pop()) {
      const { value, depth, pointer } = top;
      if (++values > MOST_VALUES) {
        throw new PdError('REQUEST_INVALID', `the JSON schema has more than ${MOST_VALUES} values`);
      }
      if (typeof value !== 'object' || value === null) continue;
      if (depth > MOST_NESTING) {
        throw new PdError('REQUEST_INVALID', `the JSON schema nests deeper than ${MOST_NESTING} levels`);
      }
      const anchor = (value as SchemaObject)['$anchor'];
      if (typeof anchor === 'string') this.#anchors.set(`#${anchor}`, located(value, pointer));
      for (const [key, inner] of Object.entries(value)) {
        open.push({ value: inner, depth: depth + 1, pointer: below(pointer, key) });
      }
    }
  }
}

function decoded(fragment: string): string {
  try {
    return decodeURIComponent(fragment);
  } catch {
    return fragment;
  }
}

/** Throws REQUEST_INVALID where `schema` is neither an object nor a boolean. */
export function located(schema: unknown, pointer: string): Located {
  if (typeof schema === 'boolean') return { schema, pointer };
  if (isObject(schema)) return { schema, pointer };
  throw new PdError(
    'REQUEST_INVALID',
    `the JSON schema is not valid at ${shortened(pointer)}: neither an object nor a boolean`,
  );
}

export function below(pointer: string, ...keys: readonly (string | number)[]): string {
  const parts = keys.map((key) => `/${String(key).replaceAll('~', '~0').replaceAll('/', '~1')}`);
  return pointer + parts.join('');
}

export function isObject(value: unknown): value is SchemaObject {
  return typeof value === 'object' && value !== null && !Array.isArray(value);
}

export function invalidSchema(keyword: string, pointer: string, why: string): PdError {
  return new PdError(
    'REQUEST_INVALID',
    `the JSON schema is not valid: "${keyword}" at ${shortened(pointer)} ${why}`,
    { keyword },
  );
}

export function unsupportedKeyword(keyword: string, pointer: string, why: string): PdError {
  return new PdError(
    'REQUEST_INVALID',
    `the JSON schema is not supported: "${keyword}" at ${shortened(pointer)} ${why}`,
    { keyword },
  );
}

function shortened(text: string): string {
  return text.length > 200 ? `${text.slice(0, 200)}...` : text;
}
