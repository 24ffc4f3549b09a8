/** `--log-dir`: what each program has said, in a file of its own, kept over restarts of the program and of the launcher. */
import { closeSync, mkdirSync, openSync, writeSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { PdError } from '../errors.ts';

export class LogFiles {
  readonly #files = new Map<string, { readonly path: string; readonly fd: number }>();
  readonly #say: (text: string) => void;

  /**
   * Opens NAME.log in `dir` for each name, and appends. `say` is told, once per file, of one that can be written no more: the programs
   * go on without it. Throws LOG_UNWRITABLE for a directory that cannot be made, or a file that cannot be opened.
   */
  constructor(dir: string, names: readonly string[], say: (text: string) => void) {
    this.#say = say;
    try {
      makeDirectory(dir);
      for (const name of names) {
        const path = join(dir, `${name}.log`);
        this.#files.set(name, { path, fd: openSync(path, 'a') });
      }
    } catch (cause) {
      this.close();
      throw new PdError(
        'LOG_UNWRITABLE',
        `--log-dir ${dir}: ${PdError.from(cause).message}`,
        { path: dir },
        { cause },
      );
    }
  }

  /** As the program wrote it. At once, so that the last lines before a crash are there. */
  line(name: string, line: string): void {
    const file = this.#files.get(name);
    if (!file) return;
    try {
      writeSync(file.fd, `${line}\n`);
    } catch (cause) {
      this.#files.delete(name);
      closeSync(file.fd);
      const { message } = PdError.from(cause);
      this.#say(`LOG_UNWRITABLE: ${file.path}: ${message}; what ${name} says is kept no more`);
    }
  }

  /** Idempotent. */
  close(): void {
    for (const { fd } of this.#files.values()) closeSync(fd);
    this.#files.clear();
  }
}

/** With its parents. `mkdirSync`'s own `recursive` never ends where a parent exists and takes no directories, such as /proc. */
function makeDirectory(dir: string): void {
  try {
    mkdirSync(dir);
  } catch (cause) {
    const { code } = cause as NodeJS.ErrnoException;
    if (code === 'EEXIST') return;
    if (code !== 'ENOENT') throw cause;
    const parent = dirname(dir);
    if (parent === dir) throw cause;
    makeDirectory(parent);
    mkdirSync(dir);
  }
}
