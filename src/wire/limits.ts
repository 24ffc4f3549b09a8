/**
 * Bounds on what a peer may send, checked over the raw bytes before the msgpack library sees them: a few hundred bytes of nested array
 * headers make a decoder allocate until the process dies, and no `catch` sees that.
 */
import { type ErrorCode, PdError } from '../errors.ts';

/** ROUTER `maxMessageSize`, and the largest message that we send. Bytes. */
export const MAX_BODY_BYTES = 64 * 1024;
/** Characters of a tensor id. */
export const MAX_TENSOR_ID = 4096;
export const MAX_DIMS = 8;
/** Characters of any other text: model names, addresses, reasons. */
export const MAX_TEXT = 1024;
/** Characters of the digest of a prompt. */
export const MAX_DIGEST = 64;

/** Bytes of one string: a tensor id in the widest UTF-8. */
const MAX_STR = MAX_TENSOR_ID * 4;
const MAX_BIN = 4096;
const MAX_EXT = 256;
const MAX_ARRAY = 1024;
const MAX_MAP = 64;
const MAX_DEPTH = 8;

export const DECODER_LIMITS = {
  maxStrLength: MAX_STR,
  maxBinLength: MAX_BIN,
  maxExtLength: MAX_EXT,
  maxArrayLength: MAX_ARRAY,
  maxMapLength: MAX_MAP,
} as const;

/** Set by the operator; a peer's announcement is checked against it before a byte is accepted. */
export interface WireLimits {
  /** Largest single tensor, bytes. */
  readonly maxTensorBytes: number;
}

/** Labels of pd_protocol_errors_total that reading a message can produce. */
export type ProtocolErrorKind = 'malformed' | 'unknown_command' | 'bad_field' | 'limit' | 'unknown_dtype';

const CODES: Record<ProtocolErrorKind, ErrorCode> = {
  malformed: 'MESSAGE_INVALID',
  unknown_command: 'MESSAGE_INVALID',
  bad_field: 'MESSAGE_INVALID',
  limit: 'LIMIT_EXCEEDED',
  unknown_dtype: 'DTYPE_UNKNOWN',
};

export function protocolError(
  kind: ProtocolErrorKind,
  message: string,
  options?: { cause?: unknown },
): PdError {
  return new PdError(CODES[kind], message, { kind }, options);
}

/** The metric label of an error that a decoder of `wire/` threw; `malformed` for any other error. */
export function protocolErrorKind(error: unknown): ProtocolErrorKind {
  const kind = error instanceof PdError ? error.context['kind'] : undefined;
  return typeof kind === 'string' && Object.hasOwn(CODES, kind) ? (kind as ProtocolErrorKind) : 'malformed';
}

/** The largest body, and the largest bin in it, in bytes. */
export interface BodyLimits {
  readonly body: number;
  readonly bin: number;
  /** Elements of an array. */
  readonly array?: number;
}

const BODY_LIMITS: BodyLimits = { body: MAX_BODY_BYTES, bin: MAX_BIN };

/**
 * Walks one msgpack value without building it. Throws LIMIT_EXCEEDED if it is too large or too deep, and MESSAGE_INVALID if it is
 * truncated, has bytes after its end, or uses the one byte that msgpack never uses. What passes is safe to decode.
 */
export function checkMsgpack(body: Uint8Array, most: BodyLimits = BODY_LIMITS): void {
  if (body.length > most.body) {
    throw protocolError('limit', `message of ${body.length} bytes, ${most.body} are allowed`);
  }
  const view = new DataView(body.buffer, body.byteOffset, body.byteLength);
  // Values still to come in each open container, outermost first.
  const open: number[] = [1];
  let at = 0;
  while (open.length > 0) {
    const left = open[open.length - 1]!;
    if (left === 0) {
      open.pop();
      continue;
    }
    open[open.length - 1] = left - 1;
    const header = readHeader(view, at, most);
    at = header.next;
    if (at > body.length) throw truncated(body.length);
    if (header.children > 0) {
      if (open.length > MAX_DEPTH) {
        throw protocolError('limit', `message nests deeper than ${MAX_DEPTH} levels`);
      }
      // Every child takes at least a byte, so a header that claims more than is left lies.
      if (header.children > body.length - at) throw truncated(body.length);
      open.push(header.children);
    }
  }
  if (at !== body.length) {
    throw protocolError('malformed', `${body.length - at} bytes after the end of the message`);
  }
}

interface Header {
  /** Offset after the header and its own bytes; children of containers follow. */
  readonly next: number;
  /** Values that follow: elements of an array, keys and values of a map. */
  readonly children: number;
}

function readHeader(
  view: DataView,
  at: number,
  { bin: maxBin, array: maxArray = MAX_ARRAY }: BodyLimits,
): Header {
  if (at >= view.byteLength) throw truncated(view.byteLength);
  const tag = view.getUint8(at);
  const leaf = (bytes: number): Header => ({ next: at + 1 + bytes, children: 0 });
  // `width` bytes of length, then that many bytes (and `extra`, the type of an ext).
  const run = (width: 1 | 2 | 4, most: number, what: string, extra = 0): Header => {
    const length = readLength(view, at + 1, width);
    return leaf(width + extra + within(length, most, what));
  };
  const container = (
    width: 0 | 2 | 4,
    count: number,
    most: number,
    what: string,
    perItem: 1 | 2,
  ): Header => ({
    next: at + 1 + width,
    children: within(count, most, what) * perItem,
  });
  if (tag <= 0x7f || tag >= 0xe0) return leaf(0);
  if (tag <= 0x8f) return container(0, tag & 0x0f, MAX_MAP, 'map', 2);
  if (tag <= 0x9f) return container(0, tag & 0x0f, maxArray, 'array', 1);
  if (tag <= 0xbf) return leaf(tag & 0x1f);
  switch (tag) {
    case 0xc0: // nil
    case 0xc2: // false
    case 0xc3: // true
      return leaf(0);
    case 0xc4:
      return run(1, maxBin, 'bin');
    case 0xc5:
      return run(2, maxBin, 'bin');
    case 0xc6:
      return run(4, maxBin, 'bin');
    case 0xc7:
      return run(1, MAX_EXT, 'ext', 1);
    case 0xc8:
      return run(2, MAX_EXT, 'ext', 1);
    case 0xc9:
      return run(4, MAX_EXT, 'ext', 1);
    case 0xcc: // uint 8
    case 0xd0: // int 8
      return leaf(1);
    case 0xcd:
    case 0xd1:
      return leaf(2);
    case 0xca: // float 32
    case 0xce:
    case 0xd2:
      return leaf(4);
    case 0xcb: // float 64
    case 0xcf:
    case 0xd3:
      return leaf(8);
    case 0xd4: // fixext 1: type and data
      return leaf(2);
    case 0xd5:
      return leaf(3);
    case 0xd6:
      return leaf(5);
    case 0xd7:
      return leaf(9);
    case 0xd8:
      return leaf(17);
    case 0xd9:
      return run(1, MAX_STR, 'str');
    case 0xda:
      return run(2, MAX_STR, 'str');
    case 0xdb:
      return run(4, MAX_STR, 'str');
    case 0xdc:
      return container(2, readLength(view, at + 1, 2), maxArray, 'array', 1);
    case 0xdd:
      return container(4, readLength(view, at + 1, 4), maxArray, 'array', 1);
    case 0xde:
      return container(2, readLength(view, at + 1, 2), MAX_MAP, 'map', 2);
    case 0xdf:
      return container(4, readLength(view, at + 1, 4), MAX_MAP, 'map', 2);
    default: // 0xc1, which msgpack never uses
      throw protocolError('malformed', `byte 0x${tag.toString(16)} at ${at} is not msgpack`);
  }
}

function readLength(view: DataView, at: number, width: 1 | 2 | 4): number {
  if (at + width > view.byteLength) throw truncated(view.byteLength);
  return width === 1 ? view.getUint8(at) : width === 2 ? view.getUint16(at) : view.getUint32(at);
}

function within(length: number, most: number, what: string): number {
  if (length > most) throw protocolError('limit', `${what} of ${length} in a message, ${most} are allowed`);
  return length;
}

function truncated(bytes: number): PdError {
  return protocolError('malformed', `message of ${bytes} bytes ends in the middle of a value`);
}
