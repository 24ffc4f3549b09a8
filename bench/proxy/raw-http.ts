/**
 * As much HTTP/1.1 as a benchmark needs of both ends: messages out of what a socket reads, at a few microseconds each, so that neither load
 * nor instances are what is measured. Bodies have a length or come in chunks.
 */

export interface MessageHandlers {
  readonly onHead: (head: string) => void;
  /** Parts of a body as they come, without the sizes of its chunks. */
  readonly onData: (bytes: Buffer) => void;
  readonly onEnd: () => void;
}

const END_OF_HEAD = '\r\n\r\n';

export class MessageReader {
  readonly #handlers: MessageHandlers;
  #held: Buffer | undefined;
  /** Bytes of the body, or of its chunk, that are still to come; undefined: a head is. */
  #left: number | undefined;
  #chunked = false;

  constructor(handlers: MessageHandlers) {
    this.#handlers = handlers;
  }

  push(read: Buffer): void {
    let bytes = this.#held ? Buffer.concat([this.#held, read]) : read;
    this.#held = undefined;
    while (bytes.length > 0 || (this.#left === 0 && !this.#chunked)) {
      const rest = this.#left === undefined ? this.#head(bytes) : this.#body(bytes);
      if (!rest) {
        this.#held = bytes;
        return;
      }
      bytes = rest;
    }
  }

  #head(bytes: Buffer): Buffer | undefined {
    const end = bytes.indexOf(END_OF_HEAD, 0, 'latin1');
    if (end < 0) return undefined;
    const head = bytes.toString('latin1', 0, end);
    this.#chunked = /\r\ntransfer-encoding: *chunked/i.test(head);
    this.#left = this.#chunked ? 0 : Number(/\r\ncontent-length: *(\d+)/i.exec(head)?.[1] ?? 0);
    this.#handlers.onHead(head);
    return bytes.subarray(end + END_OF_HEAD.length);
  }

  #body(bytes: Buffer): Buffer | undefined {
    if (this.#left! > 0) {
      const part = bytes.subarray(0, this.#left);
      this.#left! -= part.length;
      // The line break after a chunk is not of the body, and may be cut off from it.
      this.#handlers.onData(part);
      return bytes.subarray(part.length);
    }
    if (!this.#chunked) {
      this.#left = undefined;
      this.#handlers.onEnd();
      return bytes;
    }
    const from = bytes[0] === 0x0d ? 2 : 0;
    const end = bytes.indexOf('\r\n', from, 'latin1');
    if (end < 0) return undefined;
    const size = Number.parseInt(bytes.toString('latin1', from, end), 16);
    if (size > 0) {
      this.#left = size;
      return bytes.subarray(end + 2);
    }
    if (bytes.length < end + 4) return undefined;
    this.#left = undefined;
    this.#handlers.onEnd();
    return bytes.subarray(end + 4);
  }
}

/** As chunk of a body. */
export function chunkOf(text: string): string {
  return `${Buffer.byteLength(text).toString(16)}\r\n${text}\r\n`;
}

export const LAST_CHUNK = '0\r\n\r\n';
