/** Two processes that write into each other's caches, and what is asked of them: for the check on GPUs and for tests on stand-ins. */
import { type ChildProcess, fork } from 'node:child_process';
import { readFileSync } from 'node:fs';
import { setTimeout as sleep } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import type { PagedLayout } from '../../src/kv/layout.ts';

/** Blocks of the source and where each goes. */
export interface BlockPairs {
  readonly source: readonly number[];
  readonly target: readonly number[];
}

export type DirectCommand =
  /** A cache of its own, in the place of the one before. */
  | {
      readonly do: 'cache';
      readonly layout: PagedLayout;
      readonly layers: number;
      /** Waits where others hold the memory, and says so: `waits` is called. */
      readonly whenFree?: boolean;
    }
  /** Lets a process with this nonce connect. */
  | { readonly do: 'admit'; readonly nonce: string }
  | { readonly do: 'connect'; readonly path: string; readonly nonce: string }
  | { readonly do: 'disconnect' }
  /** Every byte of the cache by a rule, and the writing of it drained. */
  | { readonly do: 'fill'; readonly seed: number }
  | { readonly do: 'grant'; readonly seq: number }
  | { readonly do: 'revoke' | 'give'; readonly slot: number }
  /** Both lists to the GPU, for the writes that follow. */
  | ({ readonly do: 'tables' } & BlockPairs)
  /** Launches of `each` layers, `repeat` times over; marks count on from `mark`. `drain`: answer when all have ended. */
  | {
      readonly do: 'write';
      readonly seq: number;
      readonly slot: number;
      readonly mark: number;
      readonly each: number;
      readonly ctas: number;
      readonly repeat?: number;
      readonly drain?: boolean;
      /** Stops itself (SIGSTOP) before the first launch: `stopped` resolves then. */
      readonly stop?: true;
    }
  /** Spins until the flag shows `mark`; with `check`, reads the cache back at once. */
  | {
      readonly do: 'watch';
      readonly seq: number;
      readonly slot: number;
      readonly mark: number;
      readonly check?: CacheCheck;
    }
  /** Compares the whole cache. */
  | ({ readonly do: 'check' } & CacheCheck)
  /** Once no new flag has come for a while: the last one, and when it came after the end of the connection. */
  | { readonly do: 'last-flag'; readonly seq: number; readonly slot: number }
  /** Another, local cache under a launch of one thread block; how long unmapping the peer's takes meanwhile. */
  | { readonly do: 'unmap-beside-kernel'; readonly repeat: number }
  /** Maps its own cache's descriptor as if it had `bytes` bytes. */
  /** `more`: bytes beyond what there is. */
  | { readonly do: 'map-too-much'; readonly more: number }
  /** Unmaps at once, launches or not: what product code never does. */
  | { readonly do: 'unmap-under-writes' }
  | { readonly do: 'state' };

/** Blocks `target` are to be those of a cache filled by `from`, everything else as filled by `seed`. */
export interface CacheCheck extends BlockPairs {
  readonly seed: number;
  readonly from: number;
}

export interface DirectAnswer {
  readonly id: number;
  readonly error?: string;
  readonly code?: string;
  readonly slot?: number;
  /** Runs that differ, of how many, and the first of them. */
  readonly wrong?: number;
  readonly runs?: number;
  readonly first?: string;
  /** Of the system's monotonic clock, ns: before the launch, or when the flag was seen. */
  readonly at?: bigint;
  /** What the GPU's clock says of the last launch, ns. */
  readonly gpu?: bigint;
  readonly mark?: number;
  readonly milliseconds?: number;
  readonly image?: string;
  readonly free?: number;
  readonly mapped?: boolean;
  /** From the end of the connection to the end of writes and the unmapping; -1 where it has not ended. */
  readonly unmappedAfterMs?: number;
  readonly connected?: number;
  /** Why a cache was waited for. */
  readonly waited?: string;
}

export interface Ready {
  readonly path: string;
  readonly nonce: string;
}

export class DirectPeer {
  readonly process: ChildProcess;
  readonly ready: Promise<Ready>;
  waits: () => void = () => {};
  #next = 0;
  readonly #waiting = new Map<number, (answer: DirectAnswer) => void>();

  /** On GPU `device`; its socket lies in `folder`. */
  constructor(device: number, folder: string, env: Readonly<Record<string, string>> = {}) {
    // The built one, also where this runs from the sources: a process is quicker there than one that compiles first.
    const built = import.meta.url.endsWith('.ts') ? '../../dist/bench/transfer/' : './';
    const entry = fileURLToPath(new URL(`${built}direct-peer.js`, import.meta.url));
    this.process = fork(entry, [String(device), folder], {
      serialization: 'advanced',
      execArgv: [],
      env: { ...process.env, ...env },
    });
    this.ready = new Promise((resolve, reject) => {
      this.process.once('message', (ready: Ready) => resolve(ready));
      this.process.once('exit', (code, signal) => {
        reject(new Error(`the peer ended with ${code ?? signal}`));
        for (const answer of this.#waiting.values()) answer({ id: 0, error: `ended with ${code ?? signal}` });
      });
    });
    this.ready.catch(() => {});
    this.process.on('message', (message: DirectAnswer | 'waits') => {
      if (message === 'waits') this.waits();
      else this.#waiting.get(message.id)?.(message);
    });
  }

  /** Never rejects: `error` says what went wrong. */
  async try(command: DirectCommand): Promise<DirectAnswer> {
    const id = ++this.#next;
    const answer = new Promise<DirectAnswer>((resolve) => this.#waiting.set(id, resolve));
    this.process.send({ id, command }, (error) => {
      if (error) this.#waiting.get(id)?.({ id, error: error.message });
    });
    const got = await answer;
    this.#waiting.delete(id);
    return got;
  }

  async ask(command: DirectCommand): Promise<DirectAnswer> {
    const answer = await this.try(command);
    if (answer.error !== undefined) throw new Error(`${command.do}: ${answer.error}`);
    return answer;
  }

  /** Resolves once SIGSTOP has stopped it, its own or another's; SIGCONT resumes it. Throws where it has ended. */
  async stopped(): Promise<void> {
    // The third field, behind a name that may have spaces in it.
    while (!/\) T [^)]*$/.test(readFileSync(`/proc/${this.process.pid}/stat`, 'utf8'))) await sleep(5);
  }

  get exit(): Promise<NodeJS.Signals | number | null> {
    const { exitCode, signalCode } = this.process;
    if (exitCode !== null || signalCode !== null) return Promise.resolve(signalCode ?? exitCode);
    return new Promise((resolve) => this.process.once('exit', (code, signal) => resolve(signal ?? code)));
  }

  /** kill -9; resolves when it is gone. */
  async kill(): Promise<void> {
    this.process.kill('SIGKILL');
    await this.exit;
  }
}

/** Connects `writer` to `owner`, whose cache it may write into then. */
export async function pair(writer: DirectPeer, owner: DirectPeer): Promise<DirectAnswer> {
  const [{ nonce }, to] = await Promise.all([writer.ready, owner.ready]);
  await owner.ask({ do: 'admit', nonce });
  return writer.ask({ do: 'connect', ...to });
}
