/** Everything that pd-launch starts, as one unit: start it, wait until it serves, stop it in order, give up on it. */
import { deferred } from '../deferred.ts';
import { PdError } from '../errors.ts';
import {
  type ChildSpec,
  DEFAULT_RESTART,
  type Death,
  type RestartPolicy,
  SupervisedChild,
} from './launch-child.ts';

/** Children that can replace one another; the first group stops first. */
export type Group = readonly ChildSpec[];

export interface SupervisorOptions {
  readonly groups: readonly Group[];
  readonly restart?: RestartPolicy;
  /** After SIGTERM, before SIGKILL. */
  readonly killAfterMs: number;
  readonly onLine: (name: string, line: string) => void;
  /** For the supervisor's own lines. */
  readonly say: (text: string) => void;
}

export class Supervisor {
  readonly #failed = deferred<PdError>();
  /** Resolves with the reason when the system cannot go on: the last child of a group was given up on. */
  readonly failed = this.#failed.promise;
  readonly #options: SupervisorOptions;
  readonly #groups: readonly (readonly SupervisedChild[])[];
  /** Meanwhile a child that exits with an error status fails the start: the cause will not go away. */
  #starting = true;
  #stopping: Promise<void> | undefined;

  constructor(options: SupervisorOptions) {
    this.#options = options;
    const restart = options.restart ?? DEFAULT_RESTART;
    this.#groups = options.groups.map((group) =>
      group.map(
        (spec) =>
          new SupervisedChild(spec, restart, {
            line: (child, line) => options.onLine(child.name, line),
            started: (child) => options.say(`${child.name} started, pid ${child.pid}`),
            died: (child, death, pauseMs) => this.#died(child, death, pauseMs),
          }),
      ),
    );
  }

  get children(): readonly SupervisedChild[] {
    return this.#groups.flat();
  }

  start(): void {
    for (const child of this.children) child.start();
  }

  /** Polls `ready` until it is true. Throws if a child fails meanwhile, and at the deadline. Returns when stopped. */
  async untilReady(ready: () => Promise<boolean>, timeoutMs: number): Promise<void> {
    const deadline = performance.now() + timeoutMs;
    let failure: PdError | undefined;
    void this.failed.then((error) => {
      failure = error;
    });
    while (!this.#stopping) {
      if (await ready()) {
        this.#starting = false;
        return;
      }
      if (failure) throw failure;
      if (performance.now() > deadline) {
        const tails = this.children.map((child) => tailOf(child)).join('\n');
        throw new PdError(
          'PROGRAM_FAILED',
          `not ready after ${timeoutMs / 1_000} s (--start-timeout)\n${tails}`,
        );
      }
      // other processes: only their exit can be awaited
      await Promise.race([this.failed, new Promise((resolve) => setTimeout(resolve, 100))]);
    }
  }

  /** Group by group, so that the proxy can relay what workers are still computing. Idempotent. */
  stop(): Promise<void> {
    this.#stopping ??= (async () => {
      for (const group of this.#groups) {
        await Promise.all(group.map((child) => child.stop(this.#options.killAfterMs)));
      }
    })();
    return this.#stopping;
  }

  /** At once. */
  kill(): void {
    for (const child of this.children) {
      void child.stop(0);
      child.kill();
    }
  }

  #died(child: SupervisedChild, { how, code, count }: Death, pauseMs: number | undefined): void {
    const { say } = this.#options;
    if (this.#stopping) return;
    if (this.#starting && code !== null && code !== 0) {
      void child.stop(0); // not restarted, however long the others take to stop
      this.#failed.resolve(
        new PdError('PROGRAM_FAILED', `${child.name} did not start: ${how}\n${tailOf(child)}`),
      );
      return;
    }
    if (pauseMs !== undefined) {
      say(`${child.name} exited: ${how}; restarting it in ${pauseMs} ms`);
      return;
    }
    say(`${child.name} exited: ${how}; ${count} times in a minute: giving up on it\n${tailOf(child)}`);
    const group = this.#groups.find((children) => children.includes(child)) ?? [];
    if (!group.every((other) => other.givenUp)) return;
    const message = `${child.name} keeps exiting (${how}), and nothing is left to replace it`;
    this.#failed.resolve(new PdError('PROGRAM_FAILED', message));
  }
}

function tailOf(child: SupervisedChild): string {
  const lines = child.tail.map((line) => `  ${child.name} | ${line}`);
  return lines.length === 0 ? `  ${child.name} printed nothing` : lines.join('\n');
}
