/** Grammars of requests, on the reader thread: built once each, in memory that all threads see. Its owner ends the thread where it takes too long. */
import { hash } from 'node:crypto';
import { readFileSync } from 'node:fs';
import { serialize } from 'node:v8';
import { PdError } from '../errors.ts';
import { compileSpec, type GrammarSpec } from '../grammar/grammar.ts';
import { commonParts, partsAhead } from '../grammar/parts-ahead.ts';
import { Vocabulary, type VocabularyData, vocabularyOf } from '../grammar/vocabulary.ts';
import { specialBytes, textBytes } from '../grammar/whole.ts';
import { remember } from '../memories.ts';
import type { Tokenizer } from '../model/tokenizer.ts';
import { monotonicMs } from '../observability/timelines.ts';
import type { GrammarUse } from '../scheduler/types.ts';
import { badField, type GrammarWish } from './server/fields.ts';

/** What many schemas have: strings of all kinds, numbers, blanks. */
const COMMON: readonly object[] = [
  {},
  { type: 'string', maxLength: 1_000 },
  { type: 'string', format: 'email' },
  { type: 'integer' },
  { type: 'array', items: { type: 'string' }, uniqueItems: true },
];
/** A large one takes some MB. */
const MOST_KNOWN = 64;

export class GrammarCompiler {
  readonly #model: Pick<Tokenizer, 'isSpecial' | 'tokenBytes' | 'tokenString'>;
  readonly #now: () => number;
  readonly #known = new Map<string, GrammarUse>();
  #vocabulary: Vocabulary | undefined;

  /** `now` in milliseconds: what building a grammar may take is counted by it. */
  constructor(model: Pick<Tokenizer, 'isSpecial' | 'tokenBytes' | 'tokenString'>, now = monotonicMs) {
    this.#model = model;
    this.#now = now;
  }

  /** `vocabSize`: of the model. Throws REQUEST_INVALID that names the wish's field. */
  compile({ spec, param, unused }: GrammarWish, vocabSize: number): GrammarUse {
    if (unused) this.compile(unused, vocabSize);
    const key = keyOf(spec, param);
    let use = this.#known.get(key);
    if (!use) {
      const tables = tablesOf(spec, param, this.#now);
      this.#vocabulary ??= new Vocabulary(shared(this.#readVocabulary(vocabSize)));
      const ahead = partsAhead(tables, this.#vocabulary, this.#now);
      use = { key, tables: shared(tables), ahead: shared(ahead), vocabulary: this.#vocabulary.data };
    }
    remember(this.#known, key, use, MOST_KNOWN);
    return use;
  }

  /** With the parts of masks that all JSON needs: the longest to find, and the core has no time for them. */
  #readVocabulary(size: number): VocabularyData {
    const model = this.#model;
    const data = vocabularyOf(
      Array.from({ length: size }, (_, id) =>
        model.isSpecial(id) ? specialBytes(model.tokenString(id)) : textBytes(model.tokenBytes(id)),
      ),
    );
    const grammars = COMMON.map((schema) => compileSpec({ kind: 'json-schema', schema }, () => 0));
    return { ...data, parts: serialize(commonParts(grammars, new Vocabulary(data))) };
  }
}

function tablesOf(spec: GrammarSpec, param: string, now: () => number) {
  try {
    return compileSpec(spec, now, threadCpuMs);
  } catch (error) {
    if (!(error instanceof PdError) || error.code !== 'REQUEST_INVALID') throw error;
    const { message } = badField(param, error.message);
    throw new PdError('REQUEST_INVALID', message, { ...error.context, param });
  }
}

function keyOf(spec: GrammarSpec, param: string): string {
  try {
    return hash('sha256', JSON.stringify(spec), 'hex').slice(0, 32);
  } catch (cause) {
    // The one thing that it cannot do with what was JSON.
    if (!(cause instanceof RangeError)) throw cause;
    throw new PdError('REQUEST_INVALID', `${param}: is nested too deep`, { param }, { cause });
  }
}

/** The same, its numbers in shared memory. */
function shared<T>(data: T): T {
  const share = (value: unknown): unknown => {
    if (value instanceof Int32Array) return new Int32Array(copied(value));
    if (value instanceof Uint32Array) return new Uint32Array(copied(value));
    if (value instanceof Uint16Array) return new Uint16Array(copied(value));
    if (value instanceof Uint8Array) return new Uint8Array(copied(value));
    if (Array.isArray(value)) return value.map(share);
    if (typeof value !== 'object' || value === null) return value;
    return Object.fromEntries(Object.entries(value).map(([name, inner]) => [name, share(inner)]));
  };
  return share(data) as T;
}

function copied({ buffer, byteOffset, byteLength }: ArrayBufferView): SharedArrayBuffer {
  const memory = new SharedArrayBuffer(byteLength);
  new Uint8Array(memory).set(new Uint8Array(buffer, byteOffset, byteLength));
  return memory;
}

const CPU_TIME = '/proc/thread-self/schedstat';

/** CPU time of the calling thread in milliseconds; undefined where the system does not count it. */
function threadCpuMs(): number | undefined {
  try {
    const ns = Number.parseInt(readFileSync(CPU_TIME, 'latin1'), 10);
    return ns > 0 ? ns / 1e6 : undefined;
  } catch {
    return undefined;
  }
}
