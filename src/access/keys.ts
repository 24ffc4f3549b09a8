/**
 * Keys that callers show, in a file: a line each, read again when the file changes.
 *
 *   # name   key                        and what it may, until when
 *   team-a   sk-4f1c0ffee0ddba11ad5e
 *   ops      sk-77f00d5eedbabe15ca1e    admin until=2027-06-30
 *
 * Names appear in logs and metrics, keys never do. They are compared by digest, each with each, so that the time a comparison takes says
 * nothing about a key.
 */
import { hash, timingSafeEqual } from 'node:crypto';
import { readFileSync } from 'node:fs';
import { PdError } from '../errors.ts';
import type { Logger } from '../observability/log.ts';
import { watchFiles } from './watch-files.ts';

export interface KeyHolder {
  readonly name: string;
  /** May make admin calls. */
  readonly admin: boolean;
}

/** Why a caller has no key that counts. */
export type KeyRefusal = 'missing' | 'unknown' | 'expired';

interface Entry extends KeyHolder {
  readonly key: string;
  readonly digest: Buffer;
  /** Milliseconds since 1970. */
  readonly until: number;
}

const NAME = /^[\w.@-]{1,64}$/;
/** Visible ASCII: what a header can carry. */
const KEY = /^[\x21-\x7e]{16,512}$/;
const MOST_KEYS = 10_000;

export class KeyFile {
  readonly #path: string;
  readonly #log: Logger;
  readonly #option: string;
  #entries: readonly Entry[];
  /** Ends the watch. */
  readonly close: () => void;

  /** Throws CONFIG_INVALID that names `option`, the file and the line, never a key. */
  constructor(path: string, option: string, log: Logger) {
    this.#path = path;
    this.#option = option;
    this.#log = log;
    const unwatch = watchFiles([path], () => this.#reload());
    this.close = unwatch;
    try {
      this.#entries = readKeys(path, option);
    } catch (error) {
      unwatch();
      throw error;
    }
  }

  /** Whose key `authorization` (`Bearer KEY`) carries. */
  holder(authorization: string | undefined, now = Date.now()): KeyHolder | KeyRefusal {
    const key = /^Bearer +(\S+)$/i.exec(authorization ?? '')?.[1];
    if (key === undefined) return 'missing';
    const digest = digestOf(key);
    let found: Entry | undefined;
    for (const entry of this.#entries) {
      if (timingSafeEqual(entry.digest, digest)) found = entry;
    }
    if (!found) return 'unknown';
    return now < found.until ? { name: found.name, admin: found.admin } : 'expired';
  }

  /** The first that has not expired: for a program that shows one. Throws CONFIG_INVALID if all have. */
  current(now = Date.now()): string {
    const entry = this.#entries.find(({ until }) => now < until);
    if (entry) return entry.key;
    throw new PdError('CONFIG_INVALID', `${this.#option} ${this.#path}: every key in it has expired`);
  }

  #reload(): void {
    try {
      this.#entries = readKeys(this.#path, this.#option);
      this.#log.info({ keys: this.#entries.map(({ name }) => name) }, `${this.#option} has been read again`);
    } catch (error) {
      const { code, message } = PdError.from(error);
      this.#log.error({ code }, `${message}. The keys read before stay in force`);
    }
  }
}

function readKeys(path: string, option: string): Entry[] {
  const entries = new Map<string, Entry>();
  const fail = (what: string): never => {
    throw new PdError('CONFIG_INVALID', `${option} ${path}: ${what}`);
  };
  let lines: string[];
  try {
    lines = readFileSync(path, 'utf8').split(/\r?\n/);
  } catch (cause) {
    throw new PdError('CONFIG_INVALID', `${option}: ${(cause as Error).message}`, {}, { cause });
  }
  for (const [at, line] of lines.entries()) {
    const [name, key, ...more] = line.trim().split(/\s+/);
    if (!name || name.startsWith('#')) continue;
    const where = `line ${at + 1}`;
    if (!NAME.test(name)) fail(`${where} does not begin with a name of letters, digits and . _ @ -`);
    if (!key || !KEY.test(key)) fail(`${where}: ${name} has no key of 16 to 512 visible ASCII characters`);
    if (entries.has(name)) fail(`${where}: ${name} has a key already; give each key a name of its own`);
    if (entries.size >= MOST_KEYS) fail(`more than ${MOST_KEYS} keys`);
    let admin = false;
    let until = Number.POSITIVE_INFINITY;
    for (const word of more) {
      if (word === 'admin') admin = true;
      else if (word.startsWith('until=')) until = Date.parse(word.slice('until='.length));
      else fail(`${where}: ${name}: after the key come \`admin\` and \`until=DATE\`, nothing else`);
      if (Number.isNaN(until)) fail(`${where}: ${name}: ${word} is not a date such as until=2027-06-30`);
    }
    entries.set(name, { name, key: key!, digest: digestOf(key!), admin, until });
  }
  if (entries.size === 0) fail('it names no key');
  return [...entries.values()];
}

function digestOf(key: string): Buffer {
  return hash('sha256', key, 'buffer');
}
