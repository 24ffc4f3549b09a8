/**
 * KV events: what enters and leaves a worker's prefix cache, as vLLM publishes it over ZeroMQ (docs/protocol.md, "KV events"). Pure.
 *
 *   PUB       [topic, sequence, batch]          sequence: 8 bytes, big-endian, from 0
 *   replay    [sequence, batch] ... [-1, ""]    to whoever sends the sequence to begin at
 *   snapshot  [header, keys]                    ours: all that is cached, as of a sequence
 *
 * Batches are written as vLLM does since June 2026 (each event a map), or as before (each a list by position), and both are read.
 */
import { Decoder, Encoder } from '@msgpack/msgpack';
import { PdError } from '../errors.ts';
import { type Fields, field, isFields, show } from './fields.ts';
import { type BodyLimits, checkMsgpack, protocolError } from './limits.ts';

declare const brand: unique symbol;
/** The last 64 bits of a block's hash: eight characters of one byte each, most significant first. */
export type BlockKey = string & { readonly [brand]: 'BlockKey' };

const KEY_BYTES = 8;

export type KvEvent =
  /** Consecutive blocks of one sequence. */
  | {
      readonly type: 'stored';
      readonly keys: readonly BlockKey[];
      /** Of the block before the first; absent at the start of a sequence. */
      readonly parent?: BlockKey;
      /** Of all its blocks. */
      readonly tokens: readonly number[];
      /** Tokens per block. */
      readonly blockSize: number;
    }
  | { readonly type: 'removed'; readonly keys: readonly BlockKey[] }
  /** Nothing is cached any more. */
  | { readonly type: 'cleared' };

export interface KvEventBatch {
  /** Seconds since 1970. */
  readonly time: number;
  readonly events: readonly KvEvent[];
}

export const KV_EVENT_FORMS = ['map', 'positional'] as const;
/** How each event of a batch is written: `map` as vLLM from June 2026, `positional` as before. */
export type KvEventForm = (typeof KV_EVENT_FORMS)[number];

/** What vLLM calls the memory that KV is computed in, on a GPU or not. */
export type KvMedium = 'GPU' | 'CPU';

/** Of a batch. Bytes. */
export const MAX_KV_EVENTS_BYTES = 2 * 2 ** 20;
const MAX_ARRAY = 2 ** 18;
const LIMITS = { body: MAX_KV_EVENTS_BYTES, bin: 64, array: MAX_ARRAY };

const encoder = new Encoder({ useBigInt64: true, initialBufferSize: 4_096 });
const decoder = new Decoder({
  useBigInt64: true,
  maxStrLength: 4_096,
  maxBinLength: 64,
  maxArrayLength: MAX_ARRAY,
  maxMapLength: 64,
  maxExtLength: 64,
});

/** As llm-d reads it. `pod`: the HTTP address that the worker announces. */
export function kvTopic(pod: string, model: string): string {
  return `kv@${pod}@${model}`;
}

export function encodeSequence(sequence: number): Buffer {
  const bytes = Buffer.alloc(8);
  bytes.writeBigInt64BE(BigInt(sequence));
  return bytes;
}

/** Throws MESSAGE_INVALID if it is not 8 bytes, or not a safe integer. */
export function decodeSequence(bytes: Uint8Array): number {
  if (bytes.length !== 8) throw protocolError('malformed', `sequence of ${bytes.length} bytes, not 8`);
  const sequence = Number(Buffer.from(bytes).readBigInt64BE());
  if (!Number.isSafeInteger(sequence)) throw protocolError('bad_field', `sequence ${sequence}`);
  return sequence;
}

/** Ends a replay. */
export const END_OF_REPLAY = -1;

/** A key from the bytes of a whole hash. */
export function blockKey(hash: Uint8Array): BlockKey {
  const end = hash.length;
  return Buffer.from(hash.buffer, hash.byteOffset, end).toString('latin1', end - KEY_BYTES, end) as BlockKey;
}

export function encodeKvEvents(
  { time, events }: KvEventBatch,
  form: KvEventForm,
  medium: KvMedium,
): Uint8Array {
  return encoder.encode([time, events.map((event) => eventFields(event, form, medium))]);
}

function eventFields(event: KvEvent, form: KvEventForm, medium: KvMedium): unknown {
  const named = namedFields(event, medium);
  if (form === 'map') return named;
  // Fields that were appended after `medium` are left out, since old readers do not know them.
  const { lora_name: _, ...known } = named;
  return Object.values(known);
}

/** In vLLM's order, which is also that of the list. */
function namedFields(event: KvEvent, medium: KvMedium): Fields {
  switch (event.type) {
    case 'stored':
      return {
        type: 'BlockStored',
        block_hashes: event.keys.map(toInteger),
        parent_block_hash: event.parent === undefined ? null : toInteger(event.parent),
        token_ids: event.tokens,
        block_size: event.blockSize,
        lora_id: null,
        medium,
        lora_name: null,
      };
    case 'removed':
      return { type: 'BlockRemoved', block_hashes: event.keys.map(toInteger), medium };
    case 'cleared':
      return { type: 'AllBlocksCleared' };
  }
}

/** Reads either form; skips events of unknown types. Throws MESSAGE_INVALID or LIMIT_EXCEEDED. */
export function decodeKvEvents(body: Uint8Array): KvEventBatch {
  const batch = decodeValue(body, LIMITS, 'KV events');
  if (!Array.isArray(batch) || typeof batch[0] !== 'number' || !Array.isArray(batch[1])) {
    throw protocolError('malformed', `KV events: ${show(typeof batch)} is not [time, events]`);
  }
  return { time: batch[0], events: (batch[1] as unknown[]).flatMap((event) => readEvent(event) ?? []) };
}

function decodeValue(body: Uint8Array, limits: BodyLimits, what: string): unknown {
  checkMsgpack(body, limits);
  try {
    return decoder.decode(body);
  } catch (cause) {
    throw protocolError('malformed', `${what}: ${PdError.from(cause).message}`, { cause });
  }
}

const POSITIONS: Readonly<Record<string, readonly string[]>> = {
  BlockStored: ['block_hashes', 'parent_block_hash', 'token_ids', 'block_size'],
  BlockRemoved: ['block_hashes'],
  AllBlocksCleared: [],
};

function readEvent(event: unknown): KvEvent | undefined {
  const type = Array.isArray(event)
    ? (event[0] as unknown)
    : isFields(event)
      ? field(event, 'type')
      : undefined;
  if (typeof type !== 'string')
    throw protocolError('bad_field', `KV event: its type is ${show(typeof type)}`);
  const positions = Object.hasOwn(POSITIONS, type) ? POSITIONS[type]! : [];
  const fields = Array.isArray(event)
    ? Object.fromEntries(positions.map((name, at) => [name, event[at + 1] as unknown]))
    : (event as Fields);
  switch (type) {
    case 'BlockStored':
      return readStored(fields);
    case 'BlockRemoved':
      return { type: 'removed', keys: readKeys(field(fields, 'block_hashes')) };
    case 'AllBlocksCleared':
      return { type: 'cleared' };
    default:
      return undefined;
  }
}

function readStored(fields: Fields): KvEvent {
  const parent = field(fields, 'parent_block_hash');
  const tokens = field(fields, 'token_ids');
  const blockSize = field(fields, 'block_size');
  if (!Array.isArray(tokens)) throw protocolError('bad_field', 'BlockStored: token_ids is not a list');
  if (!Number.isSafeInteger(blockSize) || (blockSize as number) < 1) {
    throw protocolError('bad_field', `BlockStored: block_size is ${show(blockSize)}`);
  }
  return {
    type: 'stored',
    keys: readKeys(field(fields, 'block_hashes')),
    ...(parent === null || parent === undefined ? {} : { parent: readKey(parent) }),
    tokens: tokens as number[],
    blockSize: blockSize as number,
  };
}

function readKeys(hashes: unknown): BlockKey[] {
  if (!Array.isArray(hashes)) throw protocolError('bad_field', 'KV event: block_hashes is not a list');
  return hashes.map(readKey);
}

const scratch = Buffer.alloc(KEY_BYTES);

/** An integer of 64 bits, or the bytes of the whole hash, of which an integer is the end. */
function readKey(hash: unknown): BlockKey {
  if (hash instanceof Uint8Array && hash.length >= KEY_BYTES) return blockKey(hash);
  if (typeof hash === 'bigint' || (typeof hash === 'number' && Number.isSafeInteger(hash))) {
    scratch.writeBigUInt64BE(BigInt.asUintN(64, BigInt(hash)));
    return blockKey(scratch);
  }
  throw protocolError('bad_field', `KV event: a block's hash is ${show(hash)}`);
}

function toInteger(key: BlockKey): bigint {
  scratch.write(key, 'latin1');
  return scratch.readBigUInt64BE();
}

/** All that a worker has cached. */
export interface KvSnapshot {
  /** Of the last batch that is in it; -1: none has been published. */
  readonly sequence: number;
  /** Tokens per block. */
  readonly blockSize: number;
  readonly keys: readonly BlockKey[];
}

/** Of the keys of a snapshot: a million blocks. Bytes. */
export const MAX_SNAPSHOT_BYTES = 8 * 2 ** 20;

/** Two frames. If there are more keys than fit, the first are left out, as if they had been evicted. */
export function encodeSnapshot({ sequence, blockSize, keys }: KvSnapshot): readonly [Uint8Array, Uint8Array] {
  const told = keys.slice(-MAX_SNAPSHOT_BYTES / KEY_BYTES);
  const bytes = Buffer.allocUnsafe(told.length * KEY_BYTES);
  for (const [at, key] of told.entries()) bytes.write(key, at * KEY_BYTES, 'latin1');
  return [encoder.encode({ version: 1, sequence, block_size: blockSize, count: told.length }), bytes];
}

/** Throws MESSAGE_INVALID or LIMIT_EXCEEDED. */
export function decodeSnapshot(header: Uint8Array, bytes: Uint8Array): KvSnapshot {
  const fields = decodeValue(header, { body: 1_024, bin: 64 }, 'snapshot');
  const read = (name: string, least: number) => {
    const value = isFields(fields) ? field(fields, name) : undefined;
    if (Number.isSafeInteger(value) && (value as number) >= least) return value as number;
    throw protocolError('bad_field', `snapshot: ${name} is ${show(value)}, not an integer from ${least}`);
  };
  const count = read('count', 0);
  if (bytes.length > MAX_SNAPSHOT_BYTES || bytes.length !== count * KEY_BYTES) {
    throw protocolError('limit', `snapshot: ${bytes.length} bytes for ${count} keys`);
  }
  const keys: BlockKey[] = [];
  // Many times as quick as to read each from its bytes.
  const text = Buffer.from(bytes.buffer, bytes.byteOffset, bytes.length).toString('latin1');
  for (let at = 0; at < text.length; at += KEY_BYTES) keys.push(text.slice(at, at + KEY_BYTES) as BlockKey);
  return { sequence: read('sequence', -1), blockSize: read('block_size', 1), keys };
}
