/**
 * Lists of block numbers as bytes (docs/protocol.md, "Native hand-over"): runs of neighbours, each by its distance from the run before.
 *
 *   run      varint 2 * zigzag(first - end of the run before) + (length > 1 ? 1 : 0), then varint length - 2 where that bit is set
 *   varint   7 bits a byte, the lowest first, the top bit says that another byte follows
 *
 * A cache gives neighbours where it can: 1,024 blocks in one run are 5 bytes, and 3 KiB where no two of them are neighbours.
 */
import { protocolError } from '../../wire/limits.ts';

/** Block numbers are below this. */
const MAX_BLOCK = 2 ** 31;
/** Of one varint: 2 * zigzag of a difference of block numbers has 33 bits. */
const MAX_VARINT_BYTES = 5;

/** Bytes that `count` blocks take at most. */
export function blockListBytes(count: number): number {
  return count * MAX_VARINT_BYTES;
}

export function encodeBlocks(blocks: readonly number[]): Uint8Array {
  const bytes: number[] = [];
  let end = 0;
  for (let at = 0; at < blocks.length; ) {
    const first = blocks[at]!;
    let length = 1;
    while (blocks[at + length] === first + length) length++;
    writeVarint(bytes, 2 * zigzag(first - end) + (length > 1 ? 1 : 0));
    if (length > 1) writeVarint(bytes, length - 2);
    end = first + length;
    at += length;
  }
  return Uint8Array.from(bytes);
}

/**
 * Exactly `count` different blocks, which the caller has bounded. Throws MESSAGE_INVALID for anything else; what a few bytes claim takes
 * no memory before it is known to be within `count`.
 */
export function decodeBlocks(bytes: Uint8Array, count: number, what: string): number[] {
  const invalid = (why: string) => protocolError('bad_field', `${what}: blocks ${why}`);
  const blocks: number[] = [];
  let at = 0;
  const readVarint = () => {
    let value = 0;
    for (let place = 0; place < MAX_VARINT_BYTES; place++) {
      const byte = bytes[at++];
      if (byte === undefined) throw invalid('end in the middle of a number');
      value += (byte & 0x7f) * 2 ** (7 * place);
      if (byte < 0x80) return value;
    }
    throw invalid(`have a number of more than ${MAX_VARINT_BYTES} bytes`);
  };
  let end = 0;
  while (at < bytes.length) {
    const head = readVarint();
    const first = end + unzigzag(Math.floor(head / 2));
    const length = head % 2 === 1 ? readVarint() + 2 : 1;
    end = first + length;
    if (first < 0 || end > MAX_BLOCK) throw invalid(`name ${first} to ${end - 1}`);
    if (blocks.length + length > count) throw invalid(`are more than the ${count} announced`);
    for (let block = first; block < end; block++) blocks.push(block);
  }
  if (blocks.length !== count) throw invalid(`are ${blocks.length}, not the ${count} announced`);
  const sorted = Int32Array.from(blocks).sort();
  for (let i = 1; i < count; i++) {
    if (sorted[i] === sorted[i - 1]) throw invalid(`name ${sorted[i]} twice`);
  }
  return blocks;
}

/** 0, -1, 1, -2 ... to 0, 1, 2, 3 ... */
function zigzag(value: number): number {
  return value < 0 ? -2 * value - 1 : 2 * value;
}

function unzigzag(value: number): number {
  return value % 2 === 1 ? -(value + 1) / 2 : value / 2;
}

function writeVarint(bytes: number[], value: number): void {
  let rest = value;
  for (; rest >= 0x80; rest = Math.floor(rest / 0x80)) bytes.push((rest % 0x80) | 0x80);
  bytes.push(rest);
}
