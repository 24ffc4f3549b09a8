/** Environment variables of vLLM's that its users have set, read where ours say nothing. */
import type { LogLevel } from '../transfer/types.ts';
import type { OptionLayer } from './options.ts';

const LOGGING_LEVEL = 'VLLM_LOGGING_LEVEL';

/** Python's names. `error` is the least that is logged here: what ends a program is above it. */
const LEVELS: Readonly<Record<string, LogLevel>> = {
  DEBUG: 'debug',
  INFO: 'info',
  WARN: 'warn',
  WARNING: 'warn',
  ERROR: 'error',
  CRITICAL: 'error',
  FATAL: 'error',
};

export interface VllmLogLevel {
  /** For the option `logLevel`, between the config file and the default. */
  readonly layer: OptionLayer;
  /** For a value that is no level: it is another program's variable, so it stops nobody. */
  readonly warning?: string;
}

export function vllmLogLevel(env: Readonly<Record<string, string | undefined>>): VllmLogLevel {
  const given = env[LOGGING_LEVEL]?.trim();
  if (!given) return { layer: { values: {} } };
  const value = LEVELS[given.toUpperCase()];
  if (value !== undefined) {
    return { layer: { values: { logLevel: { value, label: `${LOGGING_LEVEL} (environment)` } } } };
  }
  const known = 'DEBUG, INFO, WARNING, ERROR and CRITICAL';
  return {
    layer: { values: {} },
    warning: `${LOGGING_LEVEL}=${given} is no level (known are ${known}) and is left out of account; --log-level sets ours`,
  };
}
