/**
 * The 128 bytes of NEW for the host transport, as NCCL's carry its bootstrap address:
 *
 *   0     4    "PDHT"
 *   4     1    version, 1
 *   5     1    length of the address, 1 to 64
 *   6     2    port, little endian
 *   8     88   address: an IPv4 or IPv6 literal in ASCII, without brackets, zero-padded
 *   96    32   token, random: see handshake.ts
 */
import { randomBytes } from 'node:crypto';
import { isIP } from 'node:net';
import { PdError } from '../../errors.ts';
import type { HostPort } from '../../net/address.ts';
import { UNIQUE_ID_BYTES, type UniqueId } from '../../wire/messages.ts';

const MAGIC = 'PDHT';
const VERSION = 1;
const ADDRESS_AT = 8;
const MAX_ADDRESS = 64;
const TOKEN_AT = 96;
const TOKEN_BYTES = 32;

/** Where rank 0 takes data connections, and the secret that both ranks show each other. */
export interface DataAddress {
  readonly address: HostPort;
  readonly token: Uint8Array;
}

export function encodeUniqueId(address: HostPort, token: Uint8Array = randomBytes(TOKEN_BYTES)): UniqueId {
  const text = Buffer.from(address.host, 'ascii');
  if (isIP(address.host) === 0 || text.length > MAX_ADDRESS) {
    throw new PdError('ADDRESS_INVALID', `data address ${JSON.stringify(address.host)} is no IP address`);
  }
  if (token.length !== TOKEN_BYTES) throw new PdError('INTERNAL', `token of ${token.length} bytes`);
  const id = Buffer.alloc(UNIQUE_ID_BYTES);
  id.write(MAGIC, 'ascii');
  id.writeUInt8(VERSION, 4);
  id.writeUInt8(text.length, 5);
  id.writeUInt16LE(address.port, 6);
  id.set(text, ADDRESS_AT);
  id.set(token, TOKEN_AT);
  return new Uint8Array(id) as Uint8Array as UniqueId;
}

/** Throws MESSAGE_INVALID where the bytes are not of this transport: the peer then runs NCCL, or another version. */
export function decodeUniqueId(uniqueId: UniqueId, peer: string): DataAddress {
  const id = Buffer.from(uniqueId.buffer, uniqueId.byteOffset, uniqueId.byteLength);
  if (id.length !== UNIQUE_ID_BYTES || id.toString('latin1', 0, 4) !== MAGIC) {
    throw invalid(
      peer,
      'the unique id is not of the host transport: one end moves KV by NCCL and the other does not',
    );
  }
  if (id[4] !== VERSION) throw invalid(peer, `host transport version ${id[4]}, this end has ${VERSION}`);
  const host = id.toString('latin1', ADDRESS_AT, ADDRESS_AT + Math.min(id[5]!, MAX_ADDRESS));
  const port = id.readUInt16LE(6);
  if (isIP(host) === 0 || port === 0) {
    throw invalid(peer, `data address ${JSON.stringify(host)} port ${port} is none`);
  }
  return { address: { host, port }, token: new Uint8Array(id.subarray(TOKEN_AT)) };
}

function invalid(peer: string, what: string): PdError {
  return new PdError('MESSAGE_INVALID', `NEW of ${peer}: ${what}`, {
    peer,
    kind: 'bad_field',
    stage: 'pair-init',
  });
}
