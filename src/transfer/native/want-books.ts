/** The books of the consumer's ledger (wants.ts): wants by seq and by the process that is asked, slots, and what is in quarantine. Pure. */
import type { Ask } from './actions.ts';
import type { EndMessage, Nonce, WantMessage } from './messages.ts';
import { type Process, Processes } from './processes.ts';

export interface Want {
  readonly process: Process<Want>;
  readonly ask: Ask;
  readonly message: WantMessage;
  deadline: number;
  saidAt: number;
  givenUp: boolean;
  /** Its owner has been told, or has given it up itself. */
  told: boolean;
  exposed: boolean;
  flagged: boolean;
  /** Its producer has said something of it. */
  heard: boolean;
  end: EndMessage | undefined;
  readonly receipts: Set<number>;
  /** By layer: how many of its blocks have been announced from the first one on. */
  readonly announced: number[];
}

export class WantBooks {
  readonly processes: Processes<Want>;
  readonly wants = new Map<number, Want>();
  readonly #numSlots: number;
  readonly #freeSlots = new Map<Process<Want>, number[]>();

  constructor(nonce: Nonce, numSlots: number) {
    this.processes = new Processes(nonce);
    this.#numSlots = numSlots;
  }

  enter(want: Want): void {
    const { process, message } = want;
    this.wants.set(message.seq, want);
    process.books.set(message.seq, want);
  }

  /** It is over: nothing of it is kept, and its slot is free. */
  remove({ process, message }: Want): void {
    this.wants.delete(message.seq);
    process.books.delete(message.seq);
    if (message.slot !== undefined) this.#freeSlots.get(process)?.push(message.slot);
    if (process.dead) this.bury(process);
  }

  /** A process that is gone is forgotten, once nothing was asked of it that is not over. */
  bury(process: Process<Want>): void {
    if (process.books.size > 0) return;
    this.processes.bury(process);
    this.#freeSlots.delete(process);
  }

  /** Free ones, of the page that is shared with that process; whoever takes one takes it out. */
  slotsOf(process: Process<Want>): number[] {
    const known = this.#freeSlots.get(process);
    if (known) return known;
    const slots = Array.from({ length: this.#numSlots }, (_, i) => this.#numSlots - i);
    this.#freeSlots.set(process, slots);
    return slots;
  }

  /** Blocks that were given up and may still be written to, of one peer's processes. */
  quarantinedBy(peer: string): number {
    let count = 0;
    for (const want of this.wants.values()) {
      if (want.process.peer === peer && isQuarantined(want)) count += want.message.blocks.length;
    }
    return count;
  }

  /** The same, of each peer that has some. */
  quarantine(): { readonly peer: string; readonly blocks: number }[] {
    const peers = new Set<string>();
    for (const want of this.wants.values()) if (isQuarantined(want)) peers.add(want.process.peer);
    return [...peers].map((peer) => ({ peer, blocks: this.quarantinedBy(peer) }));
  }

  /** Wants by state, and blocks in quarantine. */
  stats() {
    const states = { waiting: 0, givenUp: 0, ended: 0 };
    let quarantined = 0;
    for (const want of this.wants.values()) {
      states[want.end ? 'ended' : want.givenUp ? 'givenUp' : 'waiting']++;
      if (isQuarantined(want)) quarantined += want.message.blocks.length;
    }
    return { ...states, quarantined };
  }

  /** What is wrong, in words; empty when all is well. */
  checkIntegrity(): string[] {
    const problems: string[] = [];
    const slots = new Set<string>();
    for (const [seq, want] of this.wants) {
      const { slot } = want.message;
      if (want.process.books.get(seq) !== want) problems.push(`want ${seq} is in no process's book`);
      if (want.told && !want.givenUp && !want.end) problems.push(`want ${seq} is told and goes on`);
      if (!want.exposed && want.receipts.size > 0) problems.push(`want ${seq} is retracted and written to`);
      if (slot === undefined) continue;
      const place = `${want.process.peer} ${want.process.nonce} ${slot}`;
      if (slots.has(place)) problems.push(`slot ${slot} has two wants`);
      slots.add(place);
      if (this.#freeSlots.get(want.process)?.includes(slot)) problems.push(`slot ${slot} is free and in use`);
    }
    return problems;
  }
}

function isQuarantined(want: Want): boolean {
  return want.exposed && want.told;
}
