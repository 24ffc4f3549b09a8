/** A line on stderr that says what is being measured; nothing if stderr is not a terminal. */
import { bar } from '../../src/observability/bytes.ts';

export interface Progress {
  /** `done` of `total` steps. */
  say(what: string, done?: number, total?: number): void;
  /** Removes the line. */
  end(): void;
}

export const NO_PROGRESS: Progress = { say: () => undefined, end: () => undefined };

export function terminalProgress(out: NodeJS.WriteStream = process.stderr): Progress {
  if (!out.isTTY) return NO_PROGRESS;
  return {
    say: (what, done, total) => {
      const steps = done === undefined || !total ? '' : `${bar(done / total)} ${done}/${total} `;
      out.write(`\r\x1b[K${`${steps}${what}`.slice(0, Math.max(20, (out.columns ?? 80) - 1))}`);
    },
    end: () => {
      out.write('\r\x1b[K');
    },
  };
}
