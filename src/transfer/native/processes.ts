/**
 * The processes at the other ends, as a ledger sees them: which one has an address now, which ones had it before, and what is in the book
 * of each. Pure. A message counts only where it names the process that has said hello at that address last.
 *
 *   hello --> present --another says hello there--> displaced --its last entry is over--> forgotten
 *                |   <----------- hello ------------   |
 *                +---------------- died ---------------+
 *
 * Displaced is not dead: a process that has been stopped may have lost its port and still write when it goes on. Whoever has memory that it
 * may write to keeps it until `died`. It may come back, too: whoever took its name for a moment must not keep it from its peers for good.
 */
import type { Nonce } from './messages.ts';

/** Why a message meant nothing. */
export type IgnoredKind =
  /** For a process that is not this one. */
  | 'misaddressed'
  /** Of a process that has not said hello, or is not the one at that address any more. */
  | 'unintroduced'
  /** Names a WANT and does not have its ticket, or cannot be true. */
  | 'forged'
  /** About a seq that both ends know to be over. */
  | 'stale'
  /** One process has as many WANTs as it may. */
  | 'overfull'
  /** A flag of another seq, or in another slot. */
  | 'flag';

export class Process<Entry> {
  /** Its address: the routing id. */
  readonly peer: string;
  readonly nonce: Nonce;
  /** Blocks of its cache. */
  cacheBlocks: number;
  /** By seq. */
  readonly books = new Map<number, Entry>();
  /** Gone, or displaced for now: it is told nothing, and nothing of it is heard. */
  dead = false;
  #floor = 1;
  readonly #settled = new Set<number>();

  constructor(peer: string, nonce: Nonce, cacheBlocks: number) {
    this.peer = peer;
    this.nonce = nonce;
    this.cacheBlocks = cacheBlocks;
  }

  /** Seqs that are over, above the floor; those below it need no book. */
  get numSettled(): number {
    return this.#settled.size;
  }

  isSettled(seq: number): boolean {
    return seq < this.#floor || this.#settled.has(seq);
  }

  settle(seq: number): void {
    if (seq < this.#floor) return;
    this.#settled.add(seq);
    if (this.#settled.size <= MAX_SETTLED) return;
    const inOrder = [...this.#settled].sort((a, b) => a - b);
    this.raiseFloor(inOrder[inOrder.length >> 1]!);
  }

  /** Every seq below is settled. */
  raiseFloor(floor: number): void {
    if (floor <= this.#floor) return;
    this.#floor = floor;
    for (const seq of this.#settled) if (seq < floor) this.#settled.delete(seq);
  }
}

/** Processes that nothing is open with are forgotten from here on, the oldest first: whoever asks again is asked for its hello. */
const MAX_PRESENT = 8_192;
/** Seqs of a process that are over, above its floor: beyond as many the floor is that of the newer half. */
const MAX_SETTLED = 65_536;

export class Processes<Entry> {
  readonly #nonce: Nonce;
  readonly #present = new Map<string, Process<Entry>>();
  /** Dead or displaced, with entries that are not over. */
  readonly #departed = new Set<Process<Entry>>();
  readonly #ignored: Record<IgnoredKind, number> = {
    misaddressed: 0,
    unintroduced: 0,
    forged: 0,
    stale: 0,
    overfull: 0,
    flag: 0,
  };

  /** `nonce`: of this process. */
  constructor(nonce: Nonce) {
    this.#nonce = nonce;
  }

  /** `process`: the one that has said hello. `before`: the one that it displaces. */
  introduce(
    peer: string,
    nonce: Nonce,
    cacheBlocks: number,
  ): { readonly process: Process<Entry>; readonly before?: Process<Entry> } {
    const present = this.#present.get(peer);
    if (present?.nonce === nonce) {
      present.cacheBlocks = cacheBlocks;
      return { process: present };
    }
    const process = this.#departedAt(peer, nonce) ?? new Process<Entry>(peer, nonce, cacheBlocks);
    this.#departed.delete(process);
    process.dead = false;
    process.cacheBlocks = cacheBlocks;
    if (present) this.#depart(present);
    this.#present.set(peer, process);
    this.#forgetIdle();
    return present ? { process, before: present } : { process };
  }

  /** The process of that address and nonce, where it is the one that has said hello last. */
  find(peer: string, nonce: Nonce): Process<Entry> | undefined {
    const process = this.#present.get(peer);
    return process?.nonce === nonce ? process : undefined;
  }

  /** The process that sends such a message, where it is for this one; else it is counted, and means nothing. */
  sender(
    peer: string,
    { from, to }: { readonly from: Nonce; readonly to: Nonce },
  ): Process<Entry> | undefined {
    const process = to === this.#nonce ? this.find(peer, from) : undefined;
    if (!process) this.ignore(to === this.#nonce ? 'unintroduced' : 'misaddressed');
    return process;
  }

  at(peer: string): Process<Entry> | undefined {
    return this.#present.get(peer);
  }

  /** It has died. Answers it where it was present or has entries that are not over. */
  remove(peer: string, nonce: Nonce): Process<Entry> | undefined {
    const process = this.find(peer, nonce);
    if (process) {
      this.#depart(process);
      return process;
    }
    return this.#departedAt(peer, nonce);
  }

  /** Its last entry is over. False where that had been said before. */
  bury(process: Process<Entry>): boolean {
    return this.#departed.delete(process);
  }

  *all(): IterableIterator<Process<Entry>> {
    yield* this.#present.values();
    yield* this.#departed;
  }

  get numSettled(): number {
    let count = 0;
    for (const process of this.all()) count += process.numSettled;
    return count;
  }

  ignore(kind: IgnoredKind): void {
    this.#ignored[kind]++;
  }

  /** Messages that meant nothing, by why. */
  get ignored(): Readonly<Record<IgnoredKind, number>> {
    return { ...this.#ignored };
  }

  #depart(process: Process<Entry>): void {
    process.dead = true;
    if (this.#present.get(process.peer) === process) this.#present.delete(process.peer);
    this.#departed.add(process);
  }

  #departedAt(peer: string, nonce: Nonce): Process<Entry> | undefined {
    for (const departed of this.#departed)
      if (departed.peer === peer && departed.nonce === nonce) return departed;
    return undefined;
  }

  #forgetIdle(): void {
    for (const [peer, { books }] of this.#present) {
      if (this.#present.size <= MAX_PRESENT) return;
      if (books.size === 0) this.#present.delete(peer);
    }
  }
}
