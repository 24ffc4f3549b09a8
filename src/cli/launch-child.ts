/**
 * One supervised program: started, its output read, restarted when it dies.
 *
 *   idle --start--> running --dies--> pausing --> running ...
 *                      |                 `--too many deaths--> givenUp
 *                      `--stop--> stopped
 */
import { type ChildProcess, spawn } from 'node:child_process';
import { existsSync } from 'node:fs';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';

export interface ChildSpec {
  /** For logs: `proxy`, `producer-0`. */
  readonly name: string;
  /** Arguments to node: a script and the script's own. */
  readonly args: readonly string[];
  readonly env?: Readonly<Record<string, string | undefined>>;
}

export interface RestartPolicy {
  /** Before the first restart; doubles with each death in the window. */
  readonly firstPauseMs: number;
  readonly maxPauseMs: number;
  /** That many deaths within the window, and it is not restarted. */
  readonly deaths: number;
  readonly windowMs: number;
}

export const DEFAULT_RESTART: RestartPolicy = {
  firstPauseMs: 500,
  maxPauseMs: 10_000,
  deaths: 5,
  windowMs: 60_000,
};

/** How a process ended: `exit status 1`, `SIGKILL`. */
export interface Death {
  readonly how: string;
  /** Null if a signal ended it. */
  readonly code: number | null;
  /** Deaths in the window, this one included. */
  readonly count: number;
}

export interface ChildEvents {
  line(child: SupervisedChild, line: string): void;
  started(child: SupervisedChild): void;
  /** `pauseMs` until it is restarted; undefined if it is not. */
  died(child: SupervisedChild, death: Death, pauseMs: number | undefined): void;
}

const TAIL_LINES = 30;

export class SupervisedChild {
  readonly name: string;
  readonly #spec: ChildSpec;
  readonly #policy: RestartPolicy;
  readonly #events: ChildEvents;
  readonly #tail: string[] = [];
  /** Times of death within the window, monotonic. */
  #deaths: number[] = [];
  #process: ChildProcess | undefined;
  #ended: Promise<unknown> = Promise.resolve();
  #restart: NodeJS.Timeout | undefined;
  #state: 'idle' | 'running' | 'pausing' | 'stopped' | 'givenUp' = 'idle';

  constructor(spec: ChildSpec, policy: RestartPolicy, events: ChildEvents) {
    this.name = spec.name;
    this.#spec = spec;
    this.#policy = policy;
    this.#events = events;
  }

  get pid(): number | undefined {
    return this.#process?.pid;
  }

  get givenUp(): boolean {
    return this.#state === 'givenUp';
  }

  /** Its last lines, across restarts. */
  get tail(): readonly string[] {
    return this.#tail;
  }

  start(): void {
    this.#state = 'running';
    const guard = guardModule();
    const child = spawn(process.execPath, [...(guard ? ['--import', guard] : []), ...this.#spec.args], {
      stdio: ['pipe', 'pipe', 'pipe'],
      env: { ...process.env, ...this.#spec.env },
      // A process group of its own: Ctrl-C in a terminal reaches the launcher alone, which then stops children in order.
      detached: true,
    });
    this.#process = child;
    child.stdin.on('error', () => {}); // never written to
    for (const stream of [child.stdout, child.stderr]) {
      createInterface({ input: stream }).on('line', (line) => this.#line(line));
    }
    // Its own children are killed with it; they would hold our pipes open too.
    child.once('exit', () => this.kill());
    this.#ended = new Promise<void>((resolve) => {
      // `close`, not `exit`: by then the last lines have been read. A process that could not be started emits `error` only.
      child.once('close', (code, signal) => {
        resolve();
        this.#died(code, signal ?? `exit status ${code}`);
      });
      child.once('error', (error) => {
        if (child.pid !== undefined) return;
        resolve();
        this.#line(`cannot start: ${error.message}`);
        this.#died(1, error.message);
      });
    });
    this.#events.started(this);
  }

  /** SIGTERM, and after `killAfterMs` SIGKILL to its whole process group. Resolves when it has exited. Idempotent. */
  async stop(killAfterMs: number): Promise<void> {
    clearTimeout(this.#restart);
    const running = this.#state === 'running' || this.#state === 'stopped';
    this.#state = 'stopped';
    const child = this.#process;
    if (!running || !child || child.exitCode !== null || child.signalCode !== null) return;
    child.kill('SIGTERM');
    const timer = setTimeout(() => this.kill(), killAfterMs);
    await this.#ended;
    clearTimeout(timer);
  }

  /** SIGKILL now, to it and its children. */
  kill(): void {
    const pid = this.#process?.pid;
    if (pid === undefined) return;
    try {
      process.kill(-pid, 'SIGKILL');
    } catch {
      // already gone
    }
  }

  #line(line: string): void {
    this.#tail.push(line);
    if (this.#tail.length > TAIL_LINES) this.#tail.shift();
    this.#events.line(this, line);
  }

  #died(code: number | null, how: string): void {
    if (this.#state !== 'running') return;
    const { firstPauseMs, maxPauseMs, deaths, windowMs } = this.#policy;
    const now = performance.now();
    this.#deaths = [...this.#deaths.filter((at) => now - at < windowMs), now];
    const count = this.#deaths.length;
    if (count >= deaths) {
      this.#state = 'givenUp';
      this.#events.died(this, { how, code, count }, undefined);
      return;
    }
    this.#state = 'pausing';
    const pauseMs = Math.min(maxPauseMs, firstPauseMs * 2 ** (count - 1));
    this.#restart = setTimeout(() => this.start(), pauseMs);
    this.#events.died(this, { how, code, count }, pauseMs);
  }
}

/** Built JavaScript, so that any child can load it; undefined only if nothing has been built. */
function guardModule(): string | undefined {
  const beside = new URL('./launch-guard.js', import.meta.url);
  const built = new URL('../../dist/src/cli/launch-guard.js', import.meta.url);
  return [beside, built].find((url) => existsSync(fileURLToPath(url)))?.href;
}
