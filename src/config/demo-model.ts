import { dirname } from 'node:path';
import { PdError } from '../errors.ts';
import { installedFile } from '../version.ts';

/** Directory of the bundled demo model. */
export function demoModelDir(): string {
  const config = installedFile('models/demo/config.json');
  if (config !== undefined) return dirname(config);
  throw new PdError(
    'CHECKPOINT_INVALID',
    'the bundled demo model is missing: models/demo of this installation',
  );
}
