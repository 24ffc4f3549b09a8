/** Where this checkout or archive is, whether its sources run or the code compiled into dist/. */
import { fileURLToPath } from 'node:url';

/** Ends with a slash. */
export const ROOT = fileURLToPath(
  new URL(import.meta.url.includes('/dist/support/') ? '../../' : '../', import.meta.url),
);

/** The file of a program such as `pd-worker`. */
export function programFile(name: string): string {
  return `${ROOT}bin/${name}`;
}
