/** How every program of ours starts, and how it fails: one readable line with the code and what to do, never a stack unasked. */
import { readFileSync } from 'node:fs';
import { PdError } from '../errors.ts';

/** Version of this package, for --version and /version. */
export function packageVersion(): string {
  // The same file from src/ and from dist/src/.
  for (const path of ['../../package.json', '../../../package.json']) {
    try {
      const { version } = JSON.parse(readFileSync(new URL(path, import.meta.url), 'utf8')) as {
        version?: unknown;
      };
      if (typeof version === 'string') return version;
    } catch {
      // not at this depth
    }
  }
  return 'unknown';
}

/** `pd-worker: CONFIG_INVALID: --kv-port: ... Hint: ...` */
export function startErrorLine(program: string, error: PdError): string {
  return `${program}: ${error.code}: ${error.message}\n  ${error.hint}`;
}

/** Runs a program's main; a failure is one line on stderr and exit status 1, with the stack under `PD_LOG_LEVEL=debug` or trace. */
export async function runCli(program: string, main: () => Promise<void>): Promise<void> {
  try {
    await main();
  } catch (cause) {
    const error = PdError.from(cause);
    console.error(startErrorLine(program, error));
    if (/^(debug|trace)$/.test(process.env['PD_LOG_LEVEL'] ?? '') || debugFlag()) console.error(cause);
    process.exit(1);
  }
}

function debugFlag(): boolean {
  return /--log-level[= ](debug|trace)\b/.test(process.argv.join(' '));
}
