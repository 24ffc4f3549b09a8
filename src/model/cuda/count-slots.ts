/** Which sequence's tokens each slot of counts on the GPU holds, and how many of them. The least recently used goes first. */
import type { TokenHistory } from '../../scheduler/types.ts';

interface Slot {
  readonly index: number;
  counted: number;
  used: number;
}

/** What is to be counted before a slot is that of a sequence. */
export interface Counting {
  readonly slot: number;
  /** Another's counts stand there. */
  readonly fresh: boolean;
  /** The first token that is not counted. */
  readonly from: number;
}

export class CountSlots {
  /** By slot. Of a sequence that ended, only this is left. */
  readonly #slots: (Slot | undefined)[];
  /** Sequences are not kept from going. */
  readonly #byHistory = new WeakMap<TokenHistory, Slot>();
  #clock = 0;

  constructor(count: number) {
    this.#slots = new Array<Slot | undefined>(count).fill(undefined);
  }

  /** What `history` still needs, which is taken for done. Of the sequences since then, at most as many as there are slots keep theirs. */
  take(history: TokenHistory): Counting {
    this.#clock++;
    const known = this.#byHistory.get(history);
    if (known && this.#slots[known.index] === known && known.counted <= history.length) {
      const from = known.counted;
      known.counted = history.length;
      known.used = this.#clock;
      return { slot: known.index, fresh: false, from };
    }
    const used = this.#slots.map((slot) => slot?.used ?? 0);
    const index = used.indexOf(Math.min(...used));
    const slot = { index, counted: history.length, used: this.#clock };
    this.#slots[index] = slot;
    this.#byHistory.set(history, slot);
    return { slot: index, fresh: true, from: 0 };
  }

  /** What the slots hold is not known any more: a step failed. */
  forget(): void {
    this.#slots.fill(undefined);
  }
}
