/** How each of our programs starts and fails: one readable line with the code and what to do, no stack unless asked for. */
import { PdError } from '../errors.ts';

/** `pd-worker: CONFIG_INVALID: --kv-port: ... Hint: ...` */
export function startErrorLine(program: string, error: PdError): string {
  return `${program}: ${error.code}: ${error.message}\n  ${error.hint}`;
}

/** The arguments before and after `--`. */
export function splitArguments(argv: readonly string[]): [own: readonly string[], extra: readonly string[]] {
  const end = argv.indexOf('--');
  return end < 0 ? [argv, []] : [argv.slice(0, end), argv.slice(end + 1)];
}

/** To stdout, to the last byte: exit does not wait until a pipe has taken everything. */
export function print(text: string): Promise<void> {
  return new Promise((resolve) => process.stdout.write(text, () => resolve()));
}

/** Runs a program's main; a failure is that line on stderr and exit status 1, with the stack at log level debug or trace. */
export async function runCli(program: string, main: () => Promise<void>): Promise<void> {
  try {
    await main();
  } catch (cause) {
    const error = PdError.from(cause);
    console.error(startErrorLine(program, error));
    const { PD_LOG_LEVEL, VLLM_LOGGING_LEVEL } = process.env;
    const flag = /--log-level[= ](debug|trace)\b/.test(process.argv.join(' '));
    if (flag || /^(debug|trace)$/i.test(PD_LOG_LEVEL ?? VLLM_LOGGING_LEVEL ?? '')) console.error(cause);
    process.exit(1);
  }
}
