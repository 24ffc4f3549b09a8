import { readFile } from 'node:fs/promises';
import { invalid } from './checked.ts';

/** A checkpoint's JSON file, parsed, or undefined where there is no such file. Throws CHECKPOINT_INVALID. */
export async function readJson(path: string): Promise<unknown> {
  let text: string;
  try {
    text = await readFile(path, 'utf8');
  } catch (cause) {
    const code = (cause as NodeJS.ErrnoException).code;
    if (code === 'ENOENT' || code === 'ENOTDIR') return undefined;
    throw invalid(`${path} cannot be read`, cause);
  }
  try {
    return JSON.parse(text);
  } catch (cause) {
    throw invalid(`${path} is not JSON`, cause);
  }
}
