/** test/peers/peer.py as a child process: commands in, answers out. What vLLM would not understand ends it, and so the test. */
import { type ChildProcess, execFileSync, spawn } from 'node:child_process';
import { createHash } from 'node:crypto';
import { once } from 'node:events';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';
import { type Deferred, deferred } from '../../src/deferred.ts';
import { type HostPort, parseHostPort } from '../../src/net/address.ts';
import { type Dtype, tensorBytes } from '../../src/wire/dtype.ts';

const SCRIPT = fileURLToPath(new URL('../peers/peer.py', import.meta.url));
/** Debian's, whose packages are python3-msgpack and python3-zmq; else what is in PATH. */
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

/** What both ends make from a seed. */
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
  /** Path of peer.py, for callers that were built into another folder. */
  readonly script?: string;
  readonly env?: NodeJS.ProcessEnv;
}

export class PythonPeer {
  readonly address: HostPort;
  readonly #child: ChildProcess;
  readonly #waiting: Map<number, Deferred<PeerAnswer>>;
  #seq = 0;

  private constructor(child: ChildProcess, address: string, waiting: Map<number, Deferred<PeerAnswer>>) {
    this.#child = child;
    this.address = parseHostPort(address);
    this.#waiting = waiting;
  }

  static async start(options: PythonPeerOptions): Promise<PythonPeer> {
    const { python, host = '127.0.0.1', port = 0, sockets = 'zmtp', transport = 'host', env = {} } = options;
    const settings = { host, port, sockets, transport, device: options.device ?? 'cuda:0' };
    const args = Object.entries(settings).flatMap(([name, value]) => [`--${name}`, String(value)]);
    const child = spawn(python, ['-B', options.script ?? SCRIPT, ...args], {
      stdio: ['pipe', 'pipe', 'pipe'],
      env: { ...process.env, ...env },
    });
    let stderr = '';
    child.stderr!.on('data', (chunk: Buffer) => {
      stderr = (stderr + chunk).slice(-4_000);
    });
    const ready = deferred<string>();
    const waiting = new Map<number, Deferred<PeerAnswer>>();
    createInterface({ input: child.stdout! }).on('line', (line) => {
      const answer = JSON.parse(line) as PeerAnswer & { ready?: string };
      if (answer.ready !== undefined) ready.resolve(answer.ready);
      waiting.get(answer.id)?.resolve(answer);
      waiting.delete(answer.id);
    });
    child.once('close', (code) => {
      const ended = new Error(`the Python peer ended with status ${code}\n${stderr}`);
      ready.reject(ended);
      for (const one of waiting.values()) one.reject(ended);
    });
    child.once('error', (error) => ready.reject(error));
    return new PythonPeer(child, await ready.promise, waiting);
  }

  /** Rejects where the command failed, or the peer has ended. */
  async ask(op: string, fields: object = {}): Promise<PeerAnswer> {
    const answer = await this.attempt(op, fields);
    if (answer.error !== undefined) throw new Error(`${op}: ${answer.error}`);
    return answer;
  }

  /** As `ask`, with `error` in the answer. */
  async attempt(op: string, fields: object = {}): Promise<PeerAnswer> {
    const id = ++this.#seq;
    const answer = deferred<PeerAnswer>();
    this.#waiting.set(id, answer);
    this.#child.stdin!.write(`${JSON.stringify({ id, op, ...fields })}\n`);
    return answer.promise;
  }

  /** Ends it well; rejects where something came that nobody had asked for. */
  async quit(): Promise<void> {
    await this.ask('quit');
    if (this.#child.exitCode === null) await once(this.#child, 'exit');
  }

  /** For clean-up. Idempotent. */
  async dispose(): Promise<void> {
    if (this.#child.exitCode !== null || this.#child.signalCode !== null) return;
    for (const one of this.#waiting.values()) one.promise.catch(() => {});
    this.#child.kill('SIGKILL');
    await once(this.#child, 'exit');
  }
}
