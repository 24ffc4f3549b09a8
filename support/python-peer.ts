/** support/peers/peer.py as a child process: commands in, answers out. A message that vLLM would not understand ends it, and so the test. */
import { type ChildProcess, execFileSync, spawn } from 'node:child_process';
import { createHash } from 'node:crypto';
import { once } from 'node:events';
import { createInterface } from 'node:readline';
import { setTimeout as sleep } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import { type Deferred, deferred } from '../src/deferred.ts';
import { type HostPort, parseHostPort } from '../src/net/address.ts';
import { type Dtype, tensorBytes } from '../src/wire/dtype.ts';

const SCRIPT = fileURLToPath(new URL('./peers/peer.py', import.meta.url));
/** Debian's, which has the packages python3-msgpack and python3-zmq; otherwise the one in PATH. */
const PYTHONS = [process.env['PD_TEST_PYTHON'], '/usr/bin/python3', 'python3'];

/** A Python that has the module, or undefined. */
export function pythonWith(module: string): string | undefined {
  for (const python of PYTHONS) {
    if (!python) continue;
    try {
      execFileSync(python, ['-c', `import ${module}`], { stdio: 'ignore' });
      return python;
    } catch {
      // the next one
    }
  }
  return undefined;
}

/** The data that both ends generate from a seed. */
export function seededBytes(shape: readonly number[], dtype: Dtype, seed: number): Uint8Array {
  return createHash('shake128', { outputLength: tensorBytes(shape, dtype) })
    .update(String(seed))
    .digest();
}

export function sha256(bytes: Uint8Array): string {
  return createHash('sha256').update(bytes).digest('hex');
}

export interface PeerAnswer {
  readonly id: number;
  readonly error?: string;
  readonly [key: string]: unknown;
}

export interface PythonPeerOptions {
  readonly python: string;
  readonly host?: string;
  readonly port?: number;
  readonly sockets?: 'zmtp' | 'pyzmq';
  readonly transport?: 'host' | 'nccl';
  /** With `nccl`. */
  readonly device?: string;
  /** Path of peer.py, for callers that were built into another directory. */
  readonly script?: string;
  readonly env?: NodeJS.ProcessEnv;
  /** For each of its own waits, seconds. */
  readonly timeoutS?: number;
}

/** For one command, and for the start. The peer has shorter deadlines itself: beyond this one it hangs. */
const ANSWER_MS = 60_000;
/** For the peer to write the stacks of its threads. */
const STACKS_MS = 500;
const STDERR_CHARS = 6_000;

export class PythonPeer {
  readonly address: HostPort;
  /** Versions of what it uses: `transport`, and with `nccl` also `nccl`, `library`, `torch`, `gpu`. */
  readonly about: Readonly<Record<string, string>>;
  readonly #process: PeerProcess;
  #seq = 0;

  private constructor(started: PeerProcess, ready: ReadyLine) {
    this.#process = started;
    this.address = parseHostPort(ready.ready);
    this.about = ready.about;
  }

  static async start(options: PythonPeerOptions): Promise<PythonPeer> {
    const { python, host = '127.0.0.1', port = 0, sockets = 'zmtp', transport = 'host', env = {} } = options;
    const { device = 'cuda:0', timeoutS = 50 } = options;
    const settings = { host, port, sockets, transport, device, timeout: timeoutS };
    const args = Object.entries(settings).flatMap(([name, value]) => [`--${name}`, String(value)]);
    const child = spawn(python, ['-B', options.script ?? SCRIPT, ...args], {
      stdio: ['pipe', 'pipe', 'pipe'],
      env: { ...process.env, ...env },
    });
    const started = new PeerProcess(child);
    try {
      return new PythonPeer(started, await started.answer(started.ready, 'start'));
    } catch (error) {
      child.kill('SIGKILL');
      throw error;
    }
  }

  /** The end of its stderr. */
  get stderr(): string {
    return this.#process.stderr;
  }

  /** Rejects if the command failed, or the peer has exited. */
  async ask(op: string, fields: object = {}): Promise<PeerAnswer> {
    const answer = await this.attempt(op, fields);
    if (answer.error !== undefined) throw new Error(`${op}: ${answer.error}`);
    return answer;
  }

  /** Like `ask`, but with `error` in the answer. */
  async attempt(op: string, fields: object = {}): Promise<PeerAnswer> {
    const id = ++this.#seq;
    const answer = deferred<PeerAnswer>();
    this.#process.waiting.set(id, answer);
    this.#process.child.stdin!.write(`${JSON.stringify({ id, op, ...fields })}\n`);
    return this.#process.answer(answer, op);
  }

  /** Ends it cleanly; rejects if it received something that nobody had asked for. */
  async quit(): Promise<void> {
    const { child } = this.#process;
    const exited = child.exitCode === null ? once(child, 'exit') : undefined;
    await this.ask('quit');
    await exited;
  }

  /** For cleanup, and as `kill -9`. Idempotent. */
  async dispose(): Promise<void> {
    const { child, waiting } = this.#process;
    if (child.exitCode !== null || child.signalCode !== null) return;
    for (const one of waiting.values()) one.promise.catch(() => {});
    child.kill('SIGKILL');
    await once(child, 'exit');
  }
}

interface ReadyLine {
  readonly ready: string;
  readonly about: Readonly<Record<string, string>>;
}

class PeerProcess {
  readonly child: ChildProcess;
  readonly ready = deferred<ReadyLine>();
  readonly waiting = new Map<number, Deferred<PeerAnswer>>();
  stderr = '';

  constructor(child: ChildProcess) {
    this.child = child;
    child.stderr!.on('data', (chunk: Buffer) => {
      this.stderr = (this.stderr + chunk).slice(-STDERR_CHARS);
    });
    // It exited in the middle of a command: `close` reports that.
    child.stdin!.on('error', () => {});
    createInterface({ input: child.stdout! }).on('line', (line) => {
      if (!line.startsWith('{')) {
        this.stderr = `${this.stderr}${line}\n`.slice(-STDERR_CHARS); // NCCL_DEBUG
        return;
      }
      const answer = JSON.parse(line) as PeerAnswer & Partial<ReadyLine>;
      if (answer.ready !== undefined) this.ready.resolve({ ready: answer.ready, about: answer.about ?? {} });
      this.waiting.get(answer.id)?.resolve(answer);
      this.waiting.delete(answer.id);
    });
    child.once('close', (code) => {
      this.#fail(new Error(`the Python peer ended with status ${code}\n${this.stderr}`));
    });
    child.once('error', (error) => this.#fail(error));
  }

  /** If there is no answer in time, rejects with the stacks of its threads. */
  async answer<T>(pending: Deferred<T>, op: string): Promise<T> {
    const timer = setTimeout(async () => {
      this.child.kill('SIGUSR1');
      await sleep(STACKS_MS);
      pending.reject(
        new Error(`${op}: the Python peer has not answered within ${ANSWER_MS / 1_000} s\n${this.stderr}`),
      );
    }, ANSWER_MS);
    try {
      return await pending.promise;
    } finally {
      clearTimeout(timer);
    }
  }

  #fail(error: Error): void {
    this.ready.promise.catch(() => {});
    this.ready.reject(error);
    for (const one of this.waiting.values()) one.reject(error);
  }
}
