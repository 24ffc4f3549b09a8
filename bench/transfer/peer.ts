/** A peer process as the benchmark holds it. Every question has a deadline; a peer that dies fails what was asked of it. */
import { type ChildProcess, fork } from 'node:child_process';
import { fileURLToPath } from 'node:url';
import { PdError } from '../../src/errors.ts';
import type { HostPort } from '../../src/net/address.ts';
import { monotonicMs } from '../measure/machine.ts';
import type { Command, PeerMessage, PeerSetup, Reply } from './messages.ts';

/** For libraries, kernels and the area. */
const START_TIMEOUT_MS = 60_000;
/** For one command, where it names no other. */
const COMMAND_TIMEOUT_MS = 60_000;
/** A peer that is told to quit has this long; then it is killed. */
const QUIT_TIMEOUT_MS = 10_000;

interface Question {
  readonly what: string;
  resolve(reply: Reply): void;
  reject(error: PdError): void;
}

export interface Ending {
  readonly code: number | null;
  readonly signal: NodeJS.Signals | null;
  /** From the call to the end of the process. */
  readonly milliseconds: number;
}

export class Peer {
  readonly name: string;
  readonly setup: PeerSetup;
  /** The engine's. */
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
      // young generations of their final size from the start: growing, they would look like memory that is lost
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

  /** Throws what its engine or device fails with at start. */
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

  /** Rejects with what the command fails with, PEER_LOST where the process ends, or TRANSFER_TIMEOUT after `timeoutMs`. */
  ask(command: Command, timeoutMs = COMMAND_TIMEOUT_MS): Promise<Reply> {
    if (this.#gone) return Promise.reject(this.#gone);
    const seq = ++this.#seq;
    return new Promise((resolve, reject) => {
      const what = `${this.name}: ${command.do}`;
      const settle = () => {
        clearTimeout(timer);
        this.#questions.delete(seq);
      };
      const timer = setTimeout(() => {
        settle();
        reject(new PdError('TRANSFER_TIMEOUT', `${what} was not answered within ${timeoutMs} ms`));
      }, timeoutMs);
      this.#questions.set(seq, {
        what,
        resolve: (reply) => {
          settle();
          resolve(reply);
        },
        reject: (error) => {
          settle();
          reject(error);
        },
      });
      // an error here is the end of the process, which is told on its own
      this.#process.send({ seq, command }, () => undefined);
    });
  }

  /** kill -9. Resolves when it is gone. Idempotent. */
  async kill(): Promise<Ending> {
    const start = monotonicMs();
    this.#process.kill('SIGKILL');
    const ended = await this.#ended;
    return { ...ended, milliseconds: monotonicMs() - start };
  }

  /** Lets it dispose its engine and end; kills it where that takes too long. Idempotent. */
  async quit(): Promise<Ending> {
    const start = monotonicMs();
    this.ask({ do: 'quit' }, QUIT_TIMEOUT_MS).catch(() => undefined);
    const timer = setTimeout(() => this.#process.kill('SIGKILL'), QUIT_TIMEOUT_MS);
    const ended = await this.#ended;
    clearTimeout(timer);
    return { ...ended, milliseconds: monotonicMs() - start };
  }

  #ready(): Promise<HostPort> {
    return new Promise((resolve, reject) => {
      const timer = setTimeout(
        () =>
          reject(
            new PdError('DEVICE_UNAVAILABLE', `${this.name} was not ready within ${START_TIMEOUT_MS} ms`),
          ),
        START_TIMEOUT_MS,
      );
      void this.#ended.then(() => {
        clearTimeout(timer);
        reject(this.#gone);
      });
      this.#process.on('message', (message: PeerMessage) => {
        switch (message.type) {
          case 'ready':
            clearTimeout(timer);
            resolve(message.address);
            return;
          case 'not-ready':
            clearTimeout(timer);
            reject(PdError.fromData(message.error));
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
    });
  }
}
