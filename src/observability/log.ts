/** Loggers: pino, written synchronously to stdout by whichever thread logs, so that the last line before a crash is there. */
import { createRequire } from 'node:module';
import { isatty } from 'node:tty';
import pino from 'pino';
import type { PinoPretty } from 'pino-pretty';
import type { LogOptions } from './log-options.ts';

export type Logger = pino.Logger;

/** `name` is the part of the process that logs: main, core, transfer, proxy. */
export function createLogger(options: LogOptions, name: string): Logger {
  // By descriptor: in a thread `process.stdout` is a pipe to the main thread, never a terminal.
  const terminal = isatty(1);
  const format = options.format === 'auto' ? (terminal ? 'pretty' : 'json') : options.format;
  const settings: pino.LoggerOptions = {
    level: options.level,
    base: { name },
    timestamp: pino.stdTimeFunctions.isoTime,
    formatters: { level: (label) => ({ level: label }) },
  };
  if (format === 'json') return pino(settings, pino.destination({ dest: 1, sync: true }));
  // Loaded here only: it takes longer than pino itself, in each thread.
  const pretty = createRequire(import.meta.url)('pino-pretty') as typeof PinoPretty;
  const stream = pretty({
    destination: 1,
    sync: true,
    colorize: terminal,
    translateTime: 'SYS:HH:MM:ss.l',
    ignore: 'pid,hostname,name',
    messageFormat: '[{name}] {msg}',
  });
  return pino(settings, stream);
}

/** Logs a repeated event at most once per `intervalMs` and key, with the number suppressed since. */
export class RateLimitedLog {
  readonly #last = new Map<string, { at: number; suppressed: number }>();
  readonly #intervalMs: number;

  constructor(intervalMs = 10_000) {
    this.#intervalMs = intervalMs;
  }

  /** Calls `write` with the number of events suppressed before, or counts this one. */
  log(key: string, write: (suppressed: number) => void): void {
    const now = performance.now();
    const seen = this.#last.get(key);
    if (seen && now - seen.at < this.#intervalMs) {
      seen.suppressed++;
      return;
    }
    if (this.#last.size >= 1_000) this.#last.clear(); // keys may come from peers: bounded
    this.#last.set(key, { at: now, suppressed: 0 });
    write(seen?.suppressed ?? 0);
  }
}
