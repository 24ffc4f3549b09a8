/**
 * Where the fields of a JSON object lie in its bytes, so that a body need not be written anew where a field of it changes; and how deep one may
 * be nested, at a proxy and at a worker. Pure. What comes here has been parsed: this finds its way through JSON, and does not judge whether it
 * is any.
 */
import { PdError } from '../errors.ts';

/** In bytes from the beginning. */
export interface JsonField {
  readonly name: string;
  /** The first of its name. */
  readonly from: number;
  /** The first of its value. */
  readonly valueFrom: number;
  /** Behind its value. */
  readonly to: number;
}

/** Levels of one field. What is nested deeper may be more than the stack of whoever reads it next. */
const DEEPEST = 4_096;
/** Characters of the name of a field, in errors. */
const NAMED = 200;

const QUOTE = 0x22;
const COLON = 0x3a;
const COMMA = 0x2c;
const BACKSLASH = 0x5c;
const [OPEN_ARRAY, CLOSE_ARRAY] = [0x5b, 0x5d];
const [OPEN_OBJECT, CLOSE_OBJECT] = [0x7b, 0x7d];
/** All white space of JSON is below. */
const SPACE = 0x20;

/** Throws REQUEST_INVALID where a field is nested too deep, and names it. */
export function checkLevels(json: Buffer): void {
  // Each takes two bytes.
  if (json.length > 2 * DEEPEST) fieldsOf(json);
}

/** All of them in order, also those that come twice. Throws as `checkLevels` does. */
export function fieldsOf(json: Buffer): readonly JsonField[] {
  const fields: JsonField[] = [];
  const { length } = json;
  let at = json.indexOf(OPEN_OBJECT) + 1;
  for (;;) {
    while (at < length && json[at] !== QUOTE && json[at] !== CLOSE_OBJECT) at++;
    if (json[at] !== QUOTE) return fields;
    const from = at;
    at = endOfString(json, at);
    const name = nameOf(json, from, at);
    while (at < length && (json[at] === COLON || json[at]! <= SPACE)) at++;
    const valueFrom = at;
    at = endOfValue(json, at, name);
    fields.push({ name, from, valueFrom, to: at });
  }
}

/**
 * The object with fields replaced or, where `changes` has undefined for them, left out. What it does not name stays as it is, byte for byte;
 * what it does comes last. It sets one field at least.
 */
export function withFields(
  json: Buffer,
  fields: readonly JsonField[],
  changes: ReadonlyMap<string, unknown>,
): Uint8Array<ArrayBuffer> {
  const kept: { readonly from: number; to: number }[] = [];
  let bytes = 0;
  let adjacent = false;
  for (const { name, from, to } of fields) {
    const before = adjacent ? kept.at(-1) : undefined;
    adjacent = !changes.has(name);
    if (!adjacent) continue;
    if (before) {
      bytes += to - before.to;
      before.to = to;
    } else {
      bytes += to - from + 1; // and a comma
      kept.push({ from, to });
    }
  }
  const set = [...changes].filter(([, value]) => value !== undefined);
  const rest = `${set.map(([name, value]) => `"${name}":${JSON.stringify(value)}`).join()}}`;
  const out = Buffer.allocUnsafeSlow(1 + bytes + Buffer.byteLength(rest));
  let at = 1;
  out[0] = OPEN_OBJECT;
  for (const { from, to } of kept) {
    at += json.copy(out, at, from, to);
    out[at++] = COMMA;
  }
  out.write(rest, at);
  return new Uint8Array(out.buffer);
}

function nameOf(json: Buffer, from: number, to: number): string {
  const name = json.toString('utf8', from + 1, to - 1);
  return name.includes('\\') ? (JSON.parse(`"${name}"`) as string) : name;
}

/** `at`: where it begins. Returns what is behind it. */
function endOfValue(json: Buffer, at: number, name: string): number {
  const first = json[at];
  if (first === QUOTE) return endOfString(json, at);
  if (first === OPEN_OBJECT || first === OPEN_ARRAY) return endOfNested(json, at, name);
  let end = at;
  for (; end < json.length; end++) {
    const byte = json[end]!;
    if (byte <= SPACE || byte === COMMA || byte === CLOSE_OBJECT) break;
  }
  return end;
}

function endOfNested(json: Buffer, from: number, name: string): number {
  let depth = 0;
  for (let at = from; at < json.length; at++) {
    const byte = json[at];
    if (byte === QUOTE) {
      at = endOfString(json, at) - 1;
    } else if (byte === OPEN_OBJECT || byte === OPEN_ARRAY) {
      if (++depth > DEEPEST) {
        const param = name.slice(0, NAMED);
        throw new PdError('REQUEST_INVALID', `${param}: is nested deeper than ${DEEPEST} levels`, { param });
      }
    } else if ((byte === CLOSE_OBJECT || byte === CLOSE_ARRAY) && --depth === 0) {
      return at + 1;
    }
  }
  return json.length;
}

/** Natively from quote to quote: most of a body is text. */
function endOfString(json: Buffer, from: number): number {
  for (let at = json.indexOf(QUOTE, from + 1); at >= 0; at = json.indexOf(QUOTE, at + 1)) {
    let before = at - 1;
    while (json[before] === BACKSLASH) before--;
    // Escaped by an odd number of them.
    if ((at - before) % 2 === 1) return at + 1;
  }
  return json.length;
}
