import { existsSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { PdError } from '../errors.ts';

/** Directory of the bundled demo model, found from `src/` as from `dist/src/`. */
export function demoModelDir(): string {
  const start = dirname(fileURLToPath(import.meta.url));
  for (let dir = start; dir !== dirname(dir); dir = dirname(dir)) {
    const candidate = join(dir, 'models', 'demo');
    if (existsSync(join(candidate, 'config.json'))) return candidate;
  }
  throw new PdError(
    'CHECKPOINT_INVALID',
    `the bundled demo model is missing: no models/demo in a directory above ${start}`,
  );
}
