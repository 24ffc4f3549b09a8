/**
 * The token ids of a prompt that a proxy has tokenized, on their way to a worker (docs/protocol.md, "Prompts that are tokenized already"):
 * behind the body, which stays as it came, 4 bytes each, little-endian. A header says how many they are.
 */
import { PdError } from '../errors.ts';

/** In the `features` of a ping: this worker takes them, from callers that it trusts. */
export const PROMPT_IDS_FEATURE = 'prompt-ids';

/** How many ids follow the body. */
export const PROMPT_IDS_HEADER = 'x-pd-prompt-ids';

const ID_BYTES = 4;

export function appendPromptIds(body: Uint8Array, ids: Uint32Array): Uint8Array<ArrayBuffer> {
  const bytes = new Uint8Array(body.byteLength + ids.length * ID_BYTES);
  bytes.set(body);
  const view = new DataView(bytes.buffer, body.byteLength);
  for (const [at, id] of ids.entries()) view.setUint32(at * ID_BYTES, id, true);
  return bytes;
}

/** `header`: how many ids stand at the end of `bytes`; without one all of it is the body. Throws REQUEST_INVALID. */
export function splitPromptIds(
  bytes: Uint8Array<ArrayBuffer>,
  header: unknown,
): { readonly body: Uint8Array<ArrayBuffer>; readonly ids?: Uint32Array<ArrayBuffer> } {
  if (header === undefined) return { body: bytes };
  const count = typeof header === 'string' && /^[1-9]\d{0,8}$/.test(header) ? Number(header) : Number.NaN;
  const end = bytes.byteLength - count * ID_BYTES;
  if (!(end >= 0)) {
    const what = `${JSON.stringify(header)} is not a number of token ids that ${bytes.byteLength} bytes can hold`;
    throw new PdError('REQUEST_INVALID', `${PROMPT_IDS_HEADER}: ${what}`);
  }
  const view = new DataView(bytes.buffer, bytes.byteOffset + end);
  const ids = Uint32Array.from({ length: count }, (_, at) => view.getUint32(at * ID_BYTES, true));
  return { body: bytes.subarray(0, end), ids };
}
