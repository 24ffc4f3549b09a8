import { readFileSync } from 'node:fs';

/** Version of this package, for --version and /version. */
export function packageVersion(): string {
  // The same file from src/ and from dist/src/.
  for (const path of ['../package.json', '../../package.json']) {
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
