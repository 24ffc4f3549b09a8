/** A second process with a GPU and an NCCL transport of its own, which a test tells what to do. Its program is nccl-peer-main.ts. */
import { type ChildProcess, fork } from 'node:child_process';
import { fileURLToPath } from 'node:url';

export type Command =
  /** Joins a pair as rank 1. */
  | { readonly do: 'open'; readonly pair: number; readonly uniqueId: Uint8Array; readonly timeoutMs: number }
  | {
      readonly do: 'receive';
      readonly pair: number;
      /** Bytes of each region of one operation. */
      readonly regions: readonly number[];
      /** Operations, all queued at once. */
      readonly count: number;
      readonly timeoutMs: number;
    }
  | { readonly do: 'quit' };

/** To every command; with `error` where it failed. */
export interface Answer {
  readonly id: number;
  readonly error?: string;
}

const PROGRAM = fileURLToPath(new URL('./nccl-peer-main.ts', import.meta.url));

export class NcclPeer {
  readonly process: ChildProcess;
  readonly ready: Promise<void>;
  #next = 0;
  readonly #waiting = new Map<number, (answer: Answer) => void>();

  /** Starts it with GPU `index` and `channels` per communicator; `env` is added to this process's environment. */
  constructor(index: number, channels: number, env: Readonly<Record<string, string>> = {}) {
    this.process = fork(PROGRAM, [String(index), String(channels)], {
      serialization: 'advanced',
      execArgv: ['--import', 'tsx'],
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
    if (this.process.exitCode !== null || this.process.signalCode !== null) return Promise.resolve();
    const gone = new Promise<void>((resolve) => this.process.once('exit', () => resolve()));
    this.process.kill('SIGKILL');
    return gone;
  }
}
