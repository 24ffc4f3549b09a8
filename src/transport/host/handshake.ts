/**
 * The first bytes each way on a data connection: rank 1 shows the first half of the token, rank 0 answers with the second. So each knows
 * that the other has the NEW of this pair, and neither a port scanner nor a process that got the port later passes for a peer.
 *
 *   0     4    "PDHT"
 *   4     1    version, 1
 *   5     3    zero
 *   8     16   half of the token
 */
const MAGIC = Buffer.from('PDHT', 'ascii');
const VERSION = 1;
const HALF_AT = 8;
const HALF_BYTES = 16;
export const HANDSHAKE_BYTES = HALF_AT + HALF_BYTES;

export type TokenHalf = 'first' | 'second';

/** The half in hex: what rank 0 knows its pairs by. */
export function tokenKey(token: Uint8Array, half: TokenHalf): string {
  const at = half === 'first' ? 0 : HALF_BYTES;
  return Buffer.from(token.subarray(at, at + HALF_BYTES)).toString('hex');
}

export function encodeHandshake(token: Uint8Array, half: TokenHalf): Uint8Array {
  const bytes = Buffer.alloc(HANDSHAKE_BYTES);
  bytes.set(MAGIC);
  bytes.writeUInt8(VERSION, MAGIC.length);
  bytes.write(tokenKey(token, half), HALF_AT, 'hex');
  return bytes;
}

/** The half in hex, or undefined where the bytes are no handshake of this version. */
export function decodeHandshake(bytes: Uint8Array): string | undefined {
  const buffer = Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  if (buffer.length !== HANDSHAKE_BYTES || !buffer.subarray(0, 4).equals(MAGIC)) return undefined;
  return buffer[4] === VERSION ? buffer.toString('hex', HALF_AT) : undefined;
}
