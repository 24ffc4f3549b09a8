import { renameSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterEach, describe, expect, it } from 'vitest';
import { KeyFile } from '../../../src/access/keys.ts';
import { sharedTempDir } from '../../support/temp-dir.ts';

const ALICE = 'sk-alice-0123456789abcdef';
const BOB = 'sk-bob-0123456789abcdefgh';

const DIR = sharedTempDir();
let files = 0;
const open: KeyFile[] = [];
afterEach(() => {
  for (const keys of open.splice(0)) keys.close();
});

/** Resolves with the next line that is logged. */
class Lines {
  #next: ((line: string) => void) | undefined;
  readonly log = {
    info: (_: object, text: string) => this.#next?.(text),
    error: (_: object, text: string) => this.#next?.(text),
  } as unknown as ConstructorParameters<typeof KeyFile>[2];

  next(): Promise<string> {
    return new Promise((resolve) => {
      this.#next = resolve;
    });
  }
}

function keysOf(text: string, lines = new Lines()): { keys: KeyFile; path: string } {
  const path = join(DIR, `${files++}`);
  writeFileSync(path, text);
  const keys = new KeyFile(path, '--api-key-file', lines.log);
  open.push(keys);
  return { keys, path };
}

describe('a file of keys', () => {
  it('knows whose key a caller shows, and what it may', () => {
    const { keys } = keysOf(`# ours\n\nalice ${ALICE}\r\nbob\t${BOB} admin until=2027-01-01\n`);
    const now = Date.parse('2026-12-31T23:59:59Z');
    expect(keys.holder(`Bearer ${ALICE}`, now)).toEqual({ name: 'alice', admin: false });
    expect(keys.holder(`bearer  ${BOB}`, now)).toEqual({ name: 'bob', admin: true });
    expect(keys.holder(`Bearer ${BOB}`, now + 1_000)).toBe('expired');
    expect(keys.holder(`Bearer ${ALICE}x`, now)).toBe('unknown');
    for (const none of [undefined, '', 'Bearer', `Basic ${ALICE}`, ALICE])
      expect(keys.holder(none, now)).toBe('missing');
  });

  it('gives the first key that has not expired to a program that shows one', () => {
    const { keys } = keysOf(`old ${ALICE} until=2026-01-01\nnew ${BOB} until=2027-01-01\n`);
    expect(keys.current(Date.parse('2025-06-01'))).toBe(ALICE);
    expect(keys.current(Date.parse('2026-06-01'))).toBe(BOB);
    expect(() => keys.current(Date.parse('2027-06-01'))).toThrow('every key in it has expired');
  });

  it.each([
    ['', 'it names no key'],
    ['alice', 'line 1: alice has no key of 16 to 512 visible ASCII characters'],
    ['alice short', 'alice has no key of 16'],
    [`ali/ce ${ALICE}`, 'line 1 does not begin with a name'],
    [`\nalice ${ALICE}\nalice ${BOB}`, 'line 3: alice has a key already'],
    [`alice ${ALICE} root`, 'after the key come `admin` and `until=DATE`'],
    [`alice ${ALICE} until=soon`, 'until=soon is not a date'],
  ])('refuses %j, naming the line and no key', (text, message) => {
    let error: unknown;
    try {
      keysOf(text);
    } catch (thrown) {
      error = thrown;
    }
    expect(error).toMatchObject({ code: 'CONFIG_INVALID', message: expect.stringContaining(message) });
    expect(String(error)).not.toContain(ALICE);
    expect(String(error)).not.toContain(BOB);
  });

  it('is read again when it changes, and keeps what it had where that cannot be read', async () => {
    const lines = new Lines();
    const { keys, path } = keysOf(`alice ${ALICE}\n`, lines);
    const replace = (text: string) => {
      writeFileSync(`${path}.new`, text);
      renameSync(`${path}.new`, path);
    };
    const read = lines.next();
    replace(`bob ${BOB}\n`);
    expect(await read).toContain('has been read again');
    expect([keys.holder(`Bearer ${ALICE}`), keys.holder(`Bearer ${BOB}`)]).toEqual([
      'unknown',
      { name: 'bob', admin: false },
    ]);
    const refused = lines.next();
    replace('nonsense\n');
    expect(await refused).toContain('The keys read before stay in force');
    expect(keys.holder(`Bearer ${BOB}`)).toEqual({ name: 'bob', admin: false });
  });
});
