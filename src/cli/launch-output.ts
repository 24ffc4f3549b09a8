/** Where the lines of pd-launch's programs go: one stream, and with `--log-dir` a file for each. */
import { closeSync, mkdirSync, openSync, writeSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { PdError } from '../errors.ts';

const COLOURS = [36, 32, 33, 35, 34, 96, 92, 93, 95, 94];

export interface OutputOptions {
  /** `json` lines stay JSON, with the name as a field. */
  readonly format: 'pretty' | 'json';
  readonly colour: boolean;
  /** Widest name, for alignment. */
  readonly width: number;
  readonly write: (text: string) => void;
}

/** All programs in one stream, each line with the name of its program. */
export class LaunchOutput {
  readonly #options: OutputOptions;
  readonly #colours = new Map<string, number>();

  constructor(options: OutputOptions) {
    this.#options = options;
  }

  line(name: string, line: string): void {
    const { format, width, write } = this.#options;
    if (format === 'json') write(`${jsonLine(name, line)}\n`);
    else write(`${this.#paint(name, `${name.padEnd(width)} |`)} ${line}\n`);
  }

  #paint(name: string, text: string): string {
    if (!this.#options.colour) return text;
    const colour = this.#colours.get(name) ?? COLOURS[this.#colours.size % COLOURS.length]!;
    this.#colours.set(name, colour);
    return `\u001b[${colour}m${text}\u001b[0m`;
  }
}

/** Node's own warnings and crash reports are not JSON: they become the message. */
function jsonLine(name: string, line: string): string {
  const instance = JSON.stringify(name);
  return line.startsWith('{') && line.endsWith('}')
    ? `{"instance":${instance},${line.slice(1)}`
    : JSON.stringify({ instance: name, level: 'info', msg: line });
}

/** `--log-dir`: what each program prints in a file of its own, kept across restarts of the program and of the launcher. */
export class LogFiles {
  readonly #files = new Map<string, { readonly path: string; readonly fd: number }>();
  readonly #say: (text: string) => void;

  /**
   * Opens NAME.log in `dir` for each name, to append. `say` is called once for a file that can no longer be written; the programs go on
   * without it. Throws LOG_UNWRITABLE for a directory that cannot be created, or a file that cannot be opened.
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
      throw PdError.because('LOG_UNWRITABLE', `--log-dir ${dir}`, cause, { path: dir });
    }
  }

  /** As the program wrote it, and synchronously, so that the last lines before a crash are there. */
  line(name: string, line: string): void {
    const file = this.#files.get(name);
    if (!file) return;
    try {
      writeSync(file.fd, `${line}\n`);
    } catch (cause) {
      this.#files.delete(name);
      closeSync(file.fd);
      const { message } = PdError.from(cause);
      this.#say(`LOG_UNWRITABLE: ${file.path}: ${message}; the output of ${name} is no longer kept`);
    }
  }

  /** Idempotent. */
  close(): void {
    for (const { fd } of this.#files.values()) closeSync(fd);
    this.#files.clear();
  }
}

/** With its parents. `mkdirSync`'s own `recursive` never returns if a parent, such as /proc, takes no directories. */
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
