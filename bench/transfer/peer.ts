/** A peer process as the benchmark sees it. Every command has a deadline; a peer that dies fails its pending commands. */
import { type ChildProcess, fork } from 'node:child_process';
import { fileURLToPath } from 'node:url';
import { type Deferred, deferred, withDeadline } from '../../src/deferred.ts';
import { PdError } from '../../src/errors.ts';
import type { HostPort } from '../../src/net/address.ts';
import { monotonicMs } from '../measure/machine.ts';
import type { Command, PeerMessage, PeerSetup, Reply } from './messages.ts';

/** For libraries, kernels and the area. */
const START_TIMEOUT_MS = 60_000;
/** For one command, unless given. */
const COMMAND_TIMEOUT_MS = 60_000;
/** A peer that is told to quit has this long before it is killed. */
const QUIT_TIMEOUT_MS = 10_000;

interface Question extends Deferred<Reply> {
  readonly what: string;
}

export interface Ending {
  readonly code: number | null;
  readonly signal: NodeJS.Signals | null;
  /** From the call to the exit of the process. */
  readonly milliseconds: number;
}

export class Peer {
  readonly name: string;
  readonly setup: PeerSetup;
  /** Of its engine. */
  address: HostPort = { host: '', port: 0 };
  readonly #process: ChildProcess;
  readonly #questions = new Map<number, Question>();
  readonly #ended: Promise<{ code: number | null; signal: NodeJS.Signals | null }>;
  #seq = 0;
  #gone: PdError | undefined;

  private constructor(name: string, setup: PeerSetup) {
    this.name = name;
    this.setup = setup;
    // what it prints (logs, NCCL_DEBUG) is not part of the results
    this.#process = fork(fileURLToPath(new URL('./peer-main.js', import.meta.url)), [JSON.stringify(setup)], {
      serialization: 'advanced',
      // young generations of their final size from the start: growing ones would look like a leak
      execArgv: ['--min-semi-space-size=16'],
      stdio: ['ignore', 2, 2, 'ipc'],
    });
    this.#ended = new Promise((resolve) => {
      const end = (code: number | null, signal: NodeJS.Signals | null, why: string) => {
        this.#gone ??= new PdError('PEER_LOST', `${name} ${why}`, { peer: name });
        for (const question of this.#questions.values()) question.reject(this.#gone);
        this.#questions.clear();
        resolve({ code, signal });
      };
      this.#process.once('exit', (code, signal) =>
        end(code, signal, `ended with ${signal ?? `status ${code}`}`),
      );
      this.#process.once('error', (error) => end(null, null, `could not be started: ${error.message}`));
    });
  }

  /** Throws the error of its engine or device at start. */
  static async start(name: string, setup: PeerSetup): Promise<Peer> {
    const peer = new Peer(name, setup);
    try {
      peer.address = await peer.#ready();
    } catch (error) {
      await peer.kill();
      throw error;
    }
    return peer;
  }

  get alive(): boolean {
    return this.#gone === undefined;
  }

  /** Rejects with the error of the command, PEER_LOST if the process ends, or TRANSFER_TIMEOUT after `timeoutMs`. */
  async ask(command: Command, timeoutMs = COMMAND_TIMEOUT_MS): Promise<Reply> {
    if (this.#gone) throw this.#gone;
    const seq = ++this.#seq;
    const question = { what: `${this.name}: ${command.do}`, ...deferred<Reply>() };
    this.#questions.set(seq, question);
    // an error here means that the process has ended, which is reported separately
    this.#process.send({ seq, command }, () => undefined);
    const reply = await withDeadline(question.promise, timeoutMs).finally(() => this.#questions.delete(seq));
    if (reply) return reply;
    throw new PdError('TRANSFER_TIMEOUT', `${question.what} was not answered within ${timeoutMs} ms`);
  }

  /** kill -9. Resolves when it has exited. Idempotent. */
  async kill(): Promise<Ending> {
    const start = monotonicMs();
    this.#process.kill('SIGKILL');
    const ended = await this.#ended;
    return { ...ended, milliseconds: monotonicMs() - start };
  }

  /** Lets it dispose its engine and exit; kills it if that takes too long. Idempotent. */
  async quit(): Promise<Ending> {
    const start = monotonicMs();
    this.ask({ do: 'quit' }, QUIT_TIMEOUT_MS).catch(() => undefined);
    if (!(await withDeadline(this.#ended, QUIT_TIMEOUT_MS))) this.#process.kill('SIGKILL');
    return { ...(await this.#ended), milliseconds: monotonicMs() - start };
  }

  async #ready(): Promise<HostPort> {
    const ready = deferred<HostPort>();
    void this.#ended.then(() => ready.reject(this.#gone));
    this.#process.on('message', (message: PeerMessage) => {
      switch (message.type) {
        case 'ready':
          ready.resolve(message.address);
          return;
        case 'not-ready':
          ready.reject(PdError.fromData(message.error));
          return;
        case 'reply':
          this.#questions.get(message.seq)?.resolve(message.reply);
          return;
        case 'failed': {
          const question = this.#questions.get(message.seq);
          const { code, message: text, context } = message.error;
          question?.reject(new PdError(code, `${question.what}: ${text}`, context));
          return;
        }
      }
    });
    const address = await withDeadline(ready.promise, START_TIMEOUT_MS);
    if (address) return address;
    throw new PdError('DEVICE_UNAVAILABLE', `${this.name} was not ready within ${START_TIMEOUT_MS} ms`);
  }
}
