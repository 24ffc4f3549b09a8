import { readFile } from 'node:fs/promises';
import { PdError } from '../errors.ts';

/** A checkpoint's JSON file, parsed, or undefined where there is no such file. Throws CHECKPOINT_INVALID. */
export async function readJson(path: string): Promise<unknown> {
  let text: string;
  try {
    text = await readFile(path, 'utf8');
  } catch (cause) {
    const code = (cause as NodeJS.ErrnoException).code;
    if (code === 'ENOENT' || code === 'ENOTDIR') return undefined;
    throw new PdError(
      'CHECKPOINT_INVALID',
      `${path} cannot be read: ${PdError.from(cause).message}`,
      {},
      { cause },
    );
  }
  try {
    return JSON.parse(text);
  } catch (cause) {
    throw new PdError(
      'CHECKPOINT_INVALID',
      `${path} is not JSON: ${PdError.from(cause).message}`,
      {},
      { cause },
    );
  }
}
