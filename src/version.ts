/** This installation: its files, and its version. */
import { existsSync, readFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

/** A file of this installation, found from `src/` as from `dist/src/`; undefined if it is missing. */
export function installedFile(path: string): string | undefined {
  for (let at = dirname(fileURLToPath(import.meta.url)); ; at = dirname(at)) {
    const file = join(at, path);
    if (existsSync(file)) return file;
    if (at === dirname(at)) return undefined;
  }
}

/** Version of this package, for --version and /version. */
export function packageVersion(): string {
  const file = installedFile('package.json');
  const { version } = file ? (JSON.parse(readFileSync(file, 'utf8')) as { version?: unknown }) : {};
  return typeof version === 'string' ? version : 'unknown';
}
