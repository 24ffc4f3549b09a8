/** What a checkpoint's files hold, checked: what is wrong becomes CHECKPOINT_INVALID. Pure. */

import { type ErrorCode, PdError } from '../errors.ts';
import { z } from '../zod.ts';

/** `json` as the schema describes it. Throws CHECKPOINT_INVALID, or `code`, that begins with `where` and names each field at fault. */
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

/** CHECKPOINT_INVALID for what a library or the system refuses, with its own words. */
export function invalid(what: string, cause: unknown): PdError {
  return new PdError('CHECKPOINT_INVALID', `${what}: ${PdError.from(cause).message}`, {}, { cause });
}
