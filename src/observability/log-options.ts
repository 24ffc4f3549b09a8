/** How a program logs, in its configuration; apart from pino, so that reading configuration does not load it. */

export const LOG_LEVELS = ['trace', 'debug', 'info', 'warn', 'error', 'silent'] as const;
export type LogLevel = (typeof LOG_LEVELS)[number];

export const LOG_FORMATS = ['auto', 'pretty', 'json'] as const;

export interface LogOptions {
  readonly level: LogLevel;
  /** `pretty` for a terminal, `json` for collectors, `auto`: pretty if stdout is a terminal, else json. */
  readonly format: (typeof LOG_FORMATS)[number];
}
