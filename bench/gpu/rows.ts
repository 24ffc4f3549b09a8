/** Results on stdout, a line each, and the exit status that follows from them. */

let failures = 0;

/** Prints a line, with a mark if it is not `ok`. */
export function row(name: string, value: string, ok = true): void {
  if (!ok) failures++;
  console.log(`${ok ? '  ' : 'X '}${name.padEnd(58)} ${value}`);
}

/** Runs a part. What it throws becomes a failed row, and the result is undefined. */
export async function part<T>(name: string, run: () => Promise<T>): Promise<T | undefined> {
  try {
    return await run();
  } catch (error) {
    row(name, error instanceof Error ? (error.stack ?? error.message) : String(error), false);
    return undefined;
  }
}

/** Prints the last line; exit status 1 if a row failed. */
export function conclude(): void {
  console.log(failures === 0 ? 'all as it should be' : `${failures} FAILED`);
  process.exitCode = failures === 0 ? 0 : 1;
}
