/** One of our programs as a child process: its JSON log is read line by line, so tests wait for lines, never for time. */
import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { createInterface } from 'node:readline';
import type { Readable } from 'node:stream';
import { fileURLToPath } from 'node:url';

const root = fileURLToPath(new URL('../../', import.meta.url));

export interface LogLine {
  readonly level: string;
  readonly name: string;
  readonly msg: string;
  readonly [key: string]: unknown;
}

/** The match in the first line that has one; undefined where the stream ends before. What comes after is read and dropped. */
export async function untilLine(stdout: Readable, pattern: RegExp): Promise<RegExpExecArray | undefined> {
  for await (const line of createInterface({ input: stdout })) {
    const match = pattern.exec(line);
    if (!match) continue;
    stdout.resume();
    return match;
  }
  return undefined;
}

/** A test run that is cut short, by whatever signal, leaves no programs behind: they end when their stdin does. */
const guard = `${root}dist/src/cli/launch-guard.js`;

export class Program {
  readonly child: ChildProcess;
  readonly lines: LogLine[] = [];
  readonly #name: string;
  readonly #listeners = new Set<() => void>();
  #stderr = '';
  exited = false;

  /** `prefix` goes before the command line: in which namespace it runs. */
  constructor(
    name: string,
    args: readonly string[],
    env: NodeJS.ProcessEnv = {},
    prefix: readonly string[] = [],
  ) {
    this.#name = name;
    const [command, ...rest] = [
      ...[...prefix, process.execPath, '--import', guard],
      ...[`${root}bin/${name}`, ...args],
    ];
    this.child = spawn(command!, rest, {
      stdio: ['pipe', 'pipe', 'pipe'],
      env: { ...process.env, ...env },
    });
    this.child.stdin!.on('error', () => {}); // never written to
    createInterface({ input: this.child.stdout! }).on('line', (line) => {
      try {
        this.lines.push(JSON.parse(line) as LogLine);
      } catch {
        this.lines.push({ level: 'info', name: 'raw', msg: line });
      }
      this.#wake();
    });
    this.child.stderr!.on('data', (chunk: Buffer) => {
      this.#stderr = (this.#stderr + chunk).slice(-4_000);
    });
    this.child.once('exit', () => {
      this.exited = true;
      this.#wake();
    });
  }

  #wake(): void {
    for (const listener of this.#listeners) listener();
  }

  /** The first line, from `from` on, whose message matches. Rejects when the program ends or after `timeoutMs`. */
  async line(pattern: RegExp, timeoutMs = 60_000, from = 0): Promise<RegExpExecArray> {
    let next = from;
    const find = (): RegExpExecArray | undefined => {
      for (; next < this.lines.length; next++) {
        const match = pattern.exec(this.lines[next]!.msg);
        if (match) return match;
      }
      return undefined;
    };
    return await new Promise((resolve, reject) => {
      const stop = () => {
        clearTimeout(timer);
        this.#listeners.delete(look);
      };
      const fail = (why: string) => {
        stop();
        reject(new Error(`${this.#name} ${why} before it said ${pattern}\n${this.tail()}`));
      };
      const look = () => {
        const match = find();
        if (match) {
          stop();
          resolve(match);
        } else if (this.exited) fail(`ended with ${this.child.exitCode ?? this.child.signalCode}`);
      };
      const timer = setTimeout(() => fail(`took ${timeoutMs} ms`), timeoutMs);
      this.#listeners.add(look);
      look();
    });
  }

  tail(): string {
    const lines = this.lines.slice(-40).map((line) => `${line.level} [${line.name}] ${line.msg}`);
    return [...lines, this.#stderr].join('\n');
  }

  /** Sends the signal and waits for the end; SIGKILL after `timeoutMs`. Returns the exit code, null where a signal ended it. */
  async stop(signal: NodeJS.Signals = 'SIGTERM', timeoutMs = 60_000): Promise<number | null> {
    if (this.exited) return this.child.exitCode;
    const ended = once(this.child, 'exit');
    this.child.kill(signal);
    const timer = setTimeout(() => this.child.kill('SIGKILL'), timeoutMs);
    await ended;
    clearTimeout(timer);
    return this.child.exitCode;
  }
}
