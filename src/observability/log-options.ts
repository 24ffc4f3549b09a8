/** How a program logs, as its configuration says it; without pino, so that whoever only reads configuration need not load that. */

export const LOG_LEVELS = ['trace', 'debug', 'info', 'warn', 'error', 'silent'] as const;
export type LogLevel = (typeof LOG_LEVELS)[number];

export const LOG_FORMATS = ['auto', 'pretty', 'json'] as const;

export interface LogOptions {
  readonly level: LogLevel;
  /** `pretty` for a terminal, `json` for collectors, `auto` by whether stdout is a terminal. */
  readonly format: (typeof LOG_FORMATS)[number];
}
