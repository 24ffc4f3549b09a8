/** Server-sent events, as far as a relay must know them. */
import type { PdError } from '../errors.ts';
import { openAiError } from '../openai-error.ts';

/** An unfinished event longer than this is passed on in parts. Bytes. */
const MAX_HELD = 64 * 1024;

/**
 * Passes whole events through and holds the start of an unfinished one, so that a stream that breaks off can still end with an event of
 * ours. Servers write an event at a time, so nothing waits in practice; a reader could not use half an event anyway.
 */
export class SseEvents {
  #held: Buffer = Buffer.alloc(0);

  /** What may go out now. */
  push(chunk: Buffer): Buffer {
    const bytes = this.#held.length > 0 ? Buffer.concat([this.#held, chunk]) : chunk;
    const end = Math.max(endAfter(bytes, '\n\n'), endAfter(bytes, '\r\n\r\n'));
    const out = bytes.length - end > MAX_HELD ? bytes.length : end;
    this.#held = bytes.subarray(out);
    return bytes.subarray(0, out);
  }

  /** What the stream ended on; empty for a well-formed one. */
  rest(): Buffer {
    return this.#held;
  }
}

function endAfter(bytes: Buffer, separator: string): number {
  const at = bytes.lastIndexOf(separator, undefined, 'latin1');
  return at < 0 ? 0 : at + separator.length;
}

/** The last two events of a stream that broke off. */
export function errorEvents(error: PdError): string {
  return `data: ${JSON.stringify(openAiError(error))}\n\ndata: [DONE]\n\n`;
}
