/** Two processes of a GPU check: the parent holds GPU 0, and tells the child on GPU 1 what to do. */
import { type ChildProcess, fork } from 'node:child_process';
import { fileURLToPath } from 'node:url';

/** What the parent asks for; the child answers each with `{ ok }` or `{ error }`. */
export type Command =
  | { readonly do: 'open'; readonly pair: number; readonly uniqueId: Uint8Array; readonly timeoutMs: number }
  | {
      readonly do: 'receive' | 'send';
      readonly pair: number;
      /** Bytes of each region of one operation. */
      readonly regions: readonly number[];
      readonly count: number;
      readonly timeoutMs: number;
    }
  /** The bytes of the first region received last, hashed. */
  | { readonly do: 'hash'; readonly bytes: number }
  | { readonly do: 'close'; readonly pair: number }
  | { readonly do: 'quit' };

export interface Answer {
  readonly id: number;
  readonly error?: string;
  readonly milliseconds: number;
  readonly hash?: string;
}

export class Peer {
  readonly process: ChildProcess;
  readonly ready: Promise<void>;
  #next = 0;
  readonly #waiting = new Map<number, (answer: Answer) => void>();

  /** Starts the child with GPU `index` and `channels` per communicator; `env` on top of this process's. */
  constructor(index: number, channels: number, env: Readonly<Record<string, string>> = {}) {
    // from the build, or from the sources where this runs from them
    const source = import.meta.url.endsWith('.ts');
    const entry = fileURLToPath(new URL(source ? './peer.ts' : './peer.js', import.meta.url));
    this.process = fork(entry, [String(index), String(channels)], {
      serialization: 'advanced',
      execArgv: source ? ['--import', 'tsx'] : [],
      env: { ...process.env, ...env },
    });
    this.ready = new Promise((resolve) => this.process.once('message', () => resolve()));
    this.process.on('message', (answer: Answer) => this.#waiting.get(answer.id)?.(answer));
  }

  ask(command: Command): Promise<Answer> {
    const id = ++this.#next;
    return new Promise((resolve) => {
      this.#waiting.set(id, resolve);
      this.process.send({ id, command });
    });
  }

  /** kill -9; resolves when it is gone. */
  kill(): Promise<void> {
    const gone = this.exit;
    this.process.kill('SIGKILL');
    return gone;
  }

  get exit(): Promise<void> {
    if (this.process.exitCode !== null || this.process.signalCode !== null) return Promise.resolve();
    return new Promise((resolve) => this.process.once('exit', () => resolve()));
  }
}
