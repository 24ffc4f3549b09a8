/** Where this checkout or archive lies, whether its sources run or what was compiled of them into dist/. */
import { fileURLToPath } from 'node:url';

/** Ends with a slash. */
export const ROOT = fileURLToPath(
  new URL(import.meta.url.includes('/dist/support/') ? '../../' : '../', import.meta.url),
);

/** The file of a program: `pd-worker`. */
export function programFile(name: string): string {
  return `${ROOT}bin/${name}`;
}
