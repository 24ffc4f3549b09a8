/**
 * Looks into the pages that this consumer shares with its producers, for as long as a slot is granted: each millisecond; without a pause once
 * the last chunk of one is under way, for a while, and for a moment after its WANT, as KV that is computed already is written at once. A producer
 * that stands still costs this core thread no more than timers.
 */
import { NO_TOKEN, type OwnerPage, type SlotFlag, type SlotState } from '../../transport/direct/page.ts';
import type { Draw } from './actions.ts';
import type { Nonce } from './messages.ts';

/** A slot, granted to the want of that seq. */
export interface GrantedSlot {
  readonly peer: string;
  readonly nonce: Nonce;
  readonly slot: number;
  readonly seq: number;
}

interface Watched extends GrantedSlot {
  flagged: boolean;
  /** Without a pause until then. */
  spinUntil: number;
  /** Its last chunk has been seen to begin. */
  ending: boolean;
}

interface PageEvents {
  /** All bytes are there; when the last of them were written, on the GPU's clock. */
  flag(slot: GrantedSlot, times: SlotFlag): void;
  /** And its writer says so, with what it drew. */
  done(slot: GrantedSlot, draw: Draw): void;
}

const LOOK_MS = 1;
/** From WANT to KV that its producer holds already. */
const AT_ONCE_MS = 2;
/** Longer than the last chunk of most prompts takes. */
const SPIN_MS = 250;
/** Of a sampling digest; a page has room for twice as many. */
const DIGEST_BYTES = 16;

export class PageWatch {
  readonly #pageOf: (nonce: Nonce) => OwnerPage | undefined;
  readonly #on: PageEvents;
  readonly #slots = new Map<number, Watched>();
  #looking = false;

  constructor(pageOf: (nonce: Nonce) => OwnerPage | undefined, on: PageEvents) {
    this.#pageOf = pageOf;
    this.#on = on;
  }

  grant(granted: GrantedSlot): void {
    const { nonce, slot, seq } = granted;
    this.#pageOf(nonce)?.grant(slot, seq);
    const spinUntil = performance.now() + AT_ONCE_MS;
    this.#slots.set(seq, { ...granted, flagged: false, spinUntil, ending: false });
    this.#look();
  }

  revoke(nonce: Nonce, slot: number): void {
    this.#pageOf(nonce)?.revoke(slot);
    for (const [seq, held] of this.#slots) {
      if (held.nonce === nonce && held.slot === slot) this.#slots.delete(seq);
    }
  }

  /** No page is looked into any more. */
  close(): void {
    this.#slots.clear();
  }

  #look(): void {
    if (this.#looking || this.#slots.size === 0) return;
    this.#looking = true;
    let soon = false;
    for (const held of [...this.#slots.values()]) {
      const page = this.#pageOf(held.nonce);
      if (!page) continue;
      if (this.#lookAt(held, page) === 'last' && !held.ending) {
        held.ending = true;
        held.spinUntil = performance.now() + SPIN_MS;
      }
      if (performance.now() < held.spinUntil) soon = true;
    }
    const again = () => {
      this.#looking = false;
      this.#look();
    };
    if (soon) setImmediate(again);
    else setTimeout(again, LOOK_MS);
  }

  #lookAt(held: Watched, page: OwnerPage): SlotState {
    const { slot, seq } = held;
    const times = held.flagged ? undefined : page.flag(slot, seq);
    if (times) {
      held.flagged = true;
      this.#on.flag(held, times);
    }
    const state = page.state(slot, seq);
    if (state !== 'done' || !held.flagged) return state;
    const { token, digest } = page.result(slot, seq);
    this.#on.done(held, {
      drawn: token === NO_TOKEN ? [] : [token],
      samplingDigest: Buffer.from(digest.subarray(0, DIGEST_BYTES)).toString('hex'),
    });
    return state;
  }
}

/** What `PageWatch` reads as a digest; undefined where it is none that a page has room for. */
export function digestForPage(samplingDigest: string): Uint8Array | undefined {
  const given = Buffer.from(samplingDigest, 'hex');
  if (given.length !== DIGEST_BYTES) return undefined;
  const digest = new Uint8Array(2 * DIGEST_BYTES);
  digest.set(given);
  return digest;
}
