/** Lines on stdout, one for each thing measured or checked, and the exit status that follows from them. */

let failures = 0;

/** A line that is marked where it is not `ok`. */
export function row(name: string, value: string, ok = true): void {
  if (!ok) failures++;
  console.log(`${ok ? '  ' : 'X '}${name.padEnd(58)} ${value}`);
}

/** Runs a part; an error that it throws is a failed row with its stack. */
export async function part<T>(name: string, run: () => Promise<T>): Promise<T | undefined> {
  try {
    return await run();
  } catch (error) {
    row(name, error instanceof Error ? (error.stack ?? error.message) : String(error), false);
    return undefined;
  }
}

/** The last line, and exit status 1 where a row failed. */
export function conclude(): void {
  console.log(failures === 0 ? 'all as it should be' : `${failures} FAILED`);
  process.exitCode = failures === 0 ? 0 : 1;
}
