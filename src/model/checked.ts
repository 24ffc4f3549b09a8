/** Reading a checkpoint's files with validation: whatever is wrong becomes CHECKPOINT_INVALID. */
import { readFile } from 'node:fs/promises';
import { type ErrorCode, PdError } from '../errors.ts';
import { z } from '../zod.ts';

/** `json` as the schema describes it. Throws CHECKPOINT_INVALID, or `code`; the message begins with `where` and names each invalid field. */
export function checked<T>(
  schema: z.ZodType<T>,
  json: unknown,
  where: string,
  code: ErrorCode = 'CHECKPOINT_INVALID',
): T {
  const parsed = schema.safeParse(json);
  if (parsed.success) return parsed.data;
  throw new PdError(code, `${where}: ${z.prettifyError(parsed.error)}`);
}

/** CHECKPOINT_INVALID; if there is a cause, with its message. */
export function invalid(what: string, cause?: unknown): PdError {
  if (cause === undefined) return new PdError('CHECKPOINT_INVALID', what);
  return PdError.because('CHECKPOINT_INVALID', what, cause);
}

/** A checkpoint's JSON file, parsed, or undefined if there is no such file. Throws CHECKPOINT_INVALID. */
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
