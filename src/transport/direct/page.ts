/**
 * The page that two workers share: for each WANT under way a slot, in which its owner (who wants the blocks) grants, and its writer tells
 * how far it is. A memfd of 64 KiB, sealed in size; its first slot is a header, whose GPU words serve self-tests. Words are 64 bits,
 * little-endian, one writer each:
 *
 *   owner    0 grant      the seq that may write; 0 none
 *   GPU      8 flag       seq and mark of the last launch that has ended, 9 began and 10 ended (ns of the GPU's clock), 11 fault (ids outside)
 *   writer  16 state      seq and state, 17 token, 18 to 21 digest (32 bytes), 22 milliseconds since the epoch
 *
 * A flag ends nothing: all that was promised is there once the state says `done`, which the writer's CPU sets behind the event of its last
 * launch. Without a page DONE alone serves. Each thread makes its own view of the address; nobody ever unmaps a page, so that no
 * view outlives it: a peer that starts again costs 64 KiB.
 *
 * A slot belongs to one seq until DONE, FAIL or DROPPED has come for it or its writer is dead, like the blocks of its WANT: only then is it
 * granted to another (transfer/native/wants.ts keeps that book). Whoever reads names the seq: what a slot says of another is as good as nothing.
 */
import { closeSync } from 'node:fs';
import { nativeView } from '../../../ffi/native.ts';
import type { FileDescriptor, SharedPointer } from '../../../ffi/pointers.ts';
import { createSharedMemory, mapSharedMemory } from '../../../ffi/unix.ts';
import { PdError } from '../../errors.ts';

export const PAGE_BYTES = 65_536;
const SLOT_BYTES = 256;
const SLOT_WORDS = SLOT_BYTES / 8;
/** Slots of WANTs: 1 to SLOTS. */
export const SLOTS = PAGE_BYTES / SLOT_BYTES - 1;

/** 'PDPAGE' and the version of this layout. */
const MAGIC = 0x5044_5041_4745_0001n;
const GRANT = 0;
const FLAG = 8;
const BEGAN = 9;
const ENDED = 10;
const FAULT = 11;
const STATE = 16;
const TOKEN = 17;
const DIGEST = 18;
const DIGEST_WORDS = 4;
const TIME = 22;

const MARK_BITS = 20n;
const STATE_BITS = 8n;
/** Launches of one WANT that are told apart. */
export const MAX_MARK = 2 ** Number(MARK_BITS) - 1;
/** Highest seq: what is left of a word beside a mark. */
export const MAX_SEQ = 2 ** 43 - 1;
/** No token was drawn: the owner computes the last position itself. */
export const NO_TOKEN = 0xffff_ffff;

/**
 * What a writer's CPU says of a WANT. `writing`: bound, some of it is under way. `last`: its last chunk has begun, so whoever waits may
 * spin. The other three are final, and set only when no launch for it can come or run any more.
 */
export type SlotState = 'none' | 'writing' | 'last' | 'done' | 'failed' | 'dropped';
const STATES: readonly SlotState[] = ['none', 'writing', 'last', 'done', 'failed', 'dropped'];

/** An address that every thread of the process may use; plain data. */
export interface PageRef {
  readonly address: SharedPointer;
}

/** Where a launch finds a slot's words, from the beginning of the page. */
export function slotOffsets(slot: number): { readonly grant: number; readonly marks: number } {
  checkSlot(slot);
  return { grant: slot * SLOT_BYTES + 8 * GRANT, marks: slot * SLOT_BYTES + 8 * FLAG };
}

/** Where the launch of a self-test finds its words, and what it takes for its grant: the header's first word, which never changes. */
export const PROBE = { grant: 8 * GRANT, seq: MAGIC, marks: 8 * FLAG, flag: 1n } as const;

/** What a launch sets the flag to. `mark`: 1 to MAX_MARK, the number of the launch. */
export function flagOf(seq: number, mark: number): bigint {
  if (mark < 1 || mark > MAX_MARK) throw new PdError('INTERNAL', `mark ${mark} of a write`);
  return (BigInt(checkSeq(seq)) << MARK_BITS) | BigInt(mark);
}

export interface SlotFlag {
  /** Number of the last launch whose bytes are all there. */
  readonly mark: number;
  /** Nanoseconds of the GPU's clock when that launch began and ended. */
  readonly began: bigint;
  readonly ended: bigint;
}

export interface SlotResult {
  readonly state: SlotState;
  /** With `done`: what was drawn, or NO_TOKEN; and the 32 bytes of what it was drawn under. */
  readonly token: number;
  readonly digest: Uint8Array;
  /** When the state was set, milliseconds since the epoch. */
  readonly time: number;
}

class View {
  protected readonly words: BigUint64Array;

  constructor({ address }: PageRef) {
    const { buffer, byteOffset } = nativeView(address, PAGE_BYTES);
    this.words = new BigUint64Array(buffer, byteOffset, PAGE_BYTES / 8);
  }

  protected load(slot: number, word: number): bigint {
    return Atomics.load(this.words, slot * SLOT_WORDS + word);
  }

  protected store(slot: number, word: number, value: bigint): void {
    Atomics.store(this.words, slot * SLOT_WORDS + word, value);
  }

  /** Throws MESSAGE_INVALID: the memory behind the descriptor is no page of this version. */
  checkMagic(): void {
    if (this.load(0, 0) !== MAGIC)
      throw new PdError('MESSAGE_INVALID', 'the shared page is of another version');
  }
}

/** The owner's view: who wants blocks. Of the owner's threads one grants; all may read. */
export class OwnerPage extends View {
  /** Makes a page; `descriptor` is to be passed to the writer, and closed then. Throws SYSTEM_CALL_FAILED. */
  static create(): { readonly ref: PageRef; readonly descriptor: FileDescriptor } {
    const descriptor = createSharedMemory('pd-page', PAGE_BYTES);
    try {
      const ref = { address: mapSharedMemory(descriptor, PAGE_BYTES, 'a page of flags') };
      new OwnerPage(ref).store(0, 0, MAGIC);
      return { ref, descriptor };
    } catch (error) {
      closeSync(descriptor);
      throw error;
    }
  }

  /** For `seq` alone from now on: a slot that belongs to no other any more. */
  grant(slot: number, seq: number): void {
    checkSlot(slot);
    checkSeq(seq);
    for (let word = 1; word < SLOT_WORDS; word++) this.store(slot, word, 0n);
    this.store(slot, GRANT, BigInt(seq));
  }

  /** From now on no launch for its seq writes, but one that has begun goes on: the blocks stay in quarantine. Idempotent. */
  revoke(slot: number): void {
    checkSlot(slot);
    this.store(slot, GRANT, 0n);
  }

  /** How far the launches of `seq` are; undefined where none has ended. */
  flag(slot: number, seq: number): SlotFlag | undefined {
    const flag = this.load(slot, FLAG);
    if (flag >> MARK_BITS !== BigInt(seq)) return undefined;
    const mark = Number(flag & BigInt(MAX_MARK));
    return { mark, began: this.load(slot, BEGAN), ended: this.load(slot, ENDED) };
  }

  /** What the writer's CPU says of `seq`. Costs one read while there is nothing new. */
  state(slot: number, seq: number): SlotState {
    const word = this.load(slot, STATE);
    if (word >> STATE_BITS !== BigInt(seq)) return 'none';
    return STATES[Number(word & 0xffn)] ?? 'none';
  }

  /** With what the writer left for `seq`. */
  result(slot: number, seq: number): SlotResult {
    const state = this.state(slot, seq);
    const digest = new BigUint64Array(DIGEST_WORDS);
    for (let i = 0; i < DIGEST_WORDS; i++) digest[i] = this.load(slot, DIGEST + i);
    return {
      state,
      token: Number(this.load(slot, TOKEN) & 0xffff_ffffn),
      digest: new Uint8Array(digest.buffer),
      time: Number(this.load(slot, TIME)),
    };
  }
}

/** The writer's view. */
export class WriterPage extends View {
  /**
   * Maps the page behind a peer's descriptor, which may be closed then. Throws MESSAGE_INVALID where it has another size, is not sealed or
   * of another version.
   */
  static map(descriptor: FileDescriptor): PageRef {
    const ref = { address: mapSharedMemory(descriptor, PAGE_BYTES, "the peer's page of flags") };
    new WriterPage(ref).checkMagic();
    return ref;
  }

  /** Whether `seq` may still write: false once its owner has given up. The launch asks again. */
  granted(slot: number, seq: number): boolean {
    checkSlot(slot);
    return this.load(slot, GRANT) === BigInt(seq);
  }

  /**
   * Only when the owner is dead, who alone sets grants otherwise: launches that still wait in the stream then write nothing, and it drains
   * at once.
   */
  revokeAll(): void {
    for (let slot = 1; slot <= SLOTS; slot++) this.store(slot, GRANT, 0n);
  }

  /** What a launch for `seq` leaves, where no GPU launches: in a rehearsal. */
  play(slot: number, seq: number): void {
    this.store(slot, FLAG, flagOf(seq, 1));
  }

  /** How long the last write of a self-test took on the GPU. */
  get probeNanoseconds(): bigint {
    return this.load(0, ENDED) - this.load(0, BEGAN);
  }

  /** Ids outside of either cache that a launch for this slot met: a defect of one end. */
  faults(slot: number): number {
    checkSlot(slot);
    return Number(this.load(slot, FAULT));
  }

  /** Before the end. */
  progress(slot: number, seq: number, state: 'writing' | 'last'): void {
    this.#set(slot, seq, state);
  }

  /**
   * The end, set behind the event of the last launch and when no thread will launch for `seq` any more. `digest`: 32 bytes. False where the
   * slot is not granted to `seq`: nothing was written.
   */
  end(
    slot: number,
    seq: number,
    state: 'done' | 'failed' | 'dropped',
    { token = NO_TOKEN, digest }: { readonly token?: number; readonly digest?: Uint8Array } = {},
  ): boolean {
    if (!this.granted(slot, seq)) return false;
    if (digest) {
      if (digest.length !== 8 * DIGEST_WORDS)
        throw new PdError('INTERNAL', `a digest of ${digest.length} bytes`);
      const from = new DataView(digest.buffer, digest.byteOffset, digest.byteLength);
      for (let i = 0; i < DIGEST_WORDS; i++) this.store(slot, DIGEST + i, from.getBigUint64(8 * i, true));
    }
    this.store(slot, TOKEN, BigInt(token));
    return this.#set(slot, seq, state);
  }

  #set(slot: number, seq: number, state: SlotState): boolean {
    if (!this.granted(slot, seq)) return false;
    this.store(slot, TIME, BigInt(Date.now()));
    this.store(slot, STATE, (BigInt(seq) << STATE_BITS) | BigInt(STATES.indexOf(state)));
    return true;
  }
}

function checkSlot(slot: number): void {
  if (!Number.isInteger(slot) || slot < 1 || slot > SLOTS)
    throw new PdError('MESSAGE_INVALID', `slot ${slot} is not one of the ${SLOTS} of a page`);
}

function checkSeq(seq: number): number {
  if (!Number.isInteger(seq) || seq < 1 || seq > MAX_SEQ)
    throw new PdError('INTERNAL', `seq ${seq} is not one of 1 to ${MAX_SEQ}`);
  return seq;
}
