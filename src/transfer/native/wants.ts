/**
 * The consumer's ledger: what has been asked for, what came of it, and which blocks another process may still write to. Pure: it is told
 * what happens and answers with what to do. Its driver owns sockets, the page and the block manager, and keeps four rules:
 *
 *   1. Actions are carried out at once, in order, before the ledger is told anything else.
 *   2. Each `receive` is answered by exactly one `received`.
 *   3. `tick` comes every quarter of a second while `isIdle` is false, after what has arrived has been read.
 *   4. A process is said to be dead only where that is certain (`died`); all else is `introduced` or nothing.
 *
 *   ask --> asked --DONE (and its flag, where there is a slot)--> loaded
 *             |------FAIL----------------------------------------> failed
 *             |
 *             | abort, deadline, another process at that address
 *             v
 *          given up: DROP, repeated; its blocks in quarantine --DONE, FAIL, DROPPED, death--> over
 *
 * `retract` says that nothing can be written to a want's blocks any more. Until then they are nobody else's, not even its own request's: one
 * that computes its prompt itself takes other blocks (Safety 1 of the hand-over). What travels on a pair (nccl, host) is written by this
 * process alone, so there blocks wait for this end's own receives only.
 */
import { type ErrorData, PdError, unreachable } from '../../errors.ts';
import type { TransferId } from '../../wire/ids.ts';
import type { Ask, Draw, WantAction } from './actions.ts';
import {
  answerTo,
  type EndMessage,
  type Nonce,
  type PartMessage,
  type ProducerMessage,
  type Ticket,
  type WantMessage,
} from './messages.ts';
import type { Process, Processes } from './processes.ts';
import { type Want, WantBooks } from './want-books.ts';

export interface WantsOptions {
  /** Of this process. */
  readonly nonce: Nonce;
  /** Blocks of this cache. Above a quarter of it in quarantine by one peer, that peer is asked for nothing more. */
  readonly cacheBlocks: number;
  readonly layers: number;
  /** 16 random bytes in hex, for each want. */
  readonly newTicket: () => Ticket;
  /** Slots of the page that is shared with a process, from 1 on; a want by `direct` takes one. */
  readonly slots: number;
}

/** Why nothing was asked. `unknown`: no process there has said hello. */
export type Refusal = 'unknown' | 'quarantine' | 'slots';

const REPEAT_MS = 1_000;
/** Where no tick came for so long, this process was stopped: what has arrived meanwhile is read before anything is late. */
const STALL_MS = 2_000;
const GRACE_MS = 1_000;

export class Wants {
  readonly #options: WantsOptions;
  readonly #books: WantBooks;
  readonly #processes: Processes<Want>;
  readonly #wants: Map<number, Want>;
  readonly #receipts = new Map<number, Want | undefined>();
  readonly #nextParts = new Map<string, number>();
  #nextSeq = 1;
  #nextReceipt = 1;
  #lastTick = 0;
  #actions: WantAction[] = [];
  readonly #counts = { asked: 0, loaded: 0, failed: 0, aborted: 0, refused: 0 };

  constructor(options: WantsOptions) {
    this.#options = options;
    this.#books = new WantBooks(options.nonce, options.slots);
    this.#processes = this.#books.processes;
    this.#wants = this.#books.wants;
  }

  /** A peer has said hello, or again after a reconnect: what it may not have heard is said again. */
  introduced(peer: string, nonce: Nonce, now: number): WantAction[] {
    const { process, before } = this.#processes.introduce(peer, nonce, 0);
    if (before) this.#displaced(before, now);
    for (const want of process.books.values()) this.#repeat(want, now);
    return this.#take();
  }

  /** That process can write nothing any more: it is dead, and what it had launched has landed. */
  died(peer: string, nonce: Nonce, now: number): WantAction[] {
    const process = this.#processes.remove(peer, nonce);
    if (!process) return this.#take();
    this.#displaced(process, now);
    for (const want of [...process.books.values()]) {
      if (want.end === undefined) want.end = { cmd: 'DROPPED', ...answerTo(want.message) };
      this.#settle(want);
    }
    return this.#take();
  }

  /** The pair that this peer's bytes come on is a new one, so its parts are counted from 1. */
  pairOpened(peer: string): void {
    this.#nextParts.set(peer, 1);
  }

  ask(ask: Ask, now: number): { readonly seq: number; readonly actions: WantAction[] } | Refusal {
    const process = this.#processes.at(ask.peer);
    const refusal = this.#refusalOf(ask, process);
    if (refusal !== undefined || !process) {
      this.#counts.refused++;
      return refusal ?? 'unknown';
    }
    if (this.#wants.size === 0) this.#lastTick = now;
    const seq = this.#nextSeq++;
    const slot = ask.transport === 'direct' ? this.#books.slotsOf(process).pop() : undefined;
    const { id, promptDigest, samplingDigest, tokens, skip, blocks, transport } = ask;
    const message: WantMessage = {
      cmd: 'WANT',
      from: this.#options.nonce,
      to: process.nonce,
      seq,
      ticket: this.#options.newTicket(),
      floor: 1,
      id,
      promptDigest,
      tokens,
      skip,
      blocks: [...blocks],
      ...(slot !== undefined && { slot }),
      samplingDigest,
      transport,
    };
    const want: Want = {
      process,
      ask,
      message,
      deadline: now + ask.withinMs,
      saidAt: now,
      givenUp: false,
      told: false,
      exposed: true,
      flagged: slot === undefined,
      heard: false,
      end: undefined,
      receipts: new Set(),
      announced: new Array<number>(this.#options.layers).fill(0),
    };
    this.#books.enter(want);
    this.#counts.asked++;
    this.#do({ kind: 'expose', seq, blocks: message.blocks });
    if (slot !== undefined) this.#do({ kind: 'grant', peer: ask.peer, nonce: process.nonce, slot, seq });
    this.#repeat(want, now);
    return { seq, actions: this.#take() };
  }

  /** What the DEALER to that peer has read. */
  message(peer: string, message: ProducerMessage, now: number): WantAction[] {
    const process = this.#processes.sender(peer, message);
    if (!process) return this.#take();
    const want = process.books.get(message.seq);
    if (want && want.message.ticket !== message.ticket) {
      this.#processes.ignore('forged');
      return this.#take();
    }
    if (want) want.heard = true;
    switch (message.cmd) {
      case 'HELD':
        break;
      case 'PART':
        this.#part(process, want, message);
        break;
      case 'DONE':
      case 'FAIL':
      case 'DROPPED':
        this.#ended(process, want, message, now);
        break;
      default:
        unreachable(message, 'message');
    }
    return this.#take();
  }

  /** The flag of a slot in the page shared with that process says `seq`. */
  flag(peer: string, nonce: Nonce, slot: number, seq: number): WantAction[] {
    const want = this.#processes.find(peer, nonce)?.books.get(seq);
    if (want?.message.slot !== slot) {
      this.#processes.ignore('flag');
      return this.#take();
    }
    want.flagged = true;
    this.#settle(want);
    return this.#take();
  }

  /** As DONE, told by the writer's CPU in the slot of the page shared with that process: all blocks are written. */
  doneInPage(
    at: { readonly peer: string; readonly nonce: Nonce; readonly slot: number; readonly seq: number },
    draw: Draw,
    now: number,
  ): WantAction[] {
    const process = this.#processes.find(at.peer, at.nonce);
    const want = process?.books.get(at.seq);
    if (!process || want?.message.slot !== at.slot) {
      this.#processes.ignore('flag');
      return this.#take();
    }
    const { length } = want.message.blocks;
    this.#ended(
      process,
      want,
      { cmd: 'DONE', ...answerTo(want.message), ...draw, promised: length, written: length },
      now,
    );
    return this.#take();
  }

  /** What was received for it lies where it was to. `ok` false: it did not come whole. */
  received(receipt: number, ok: boolean, now: number): WantAction[] {
    if (!this.#receipts.has(receipt)) {
      throw new PdError('INTERNAL', `receipt ${receipt} is over, or never was`);
    }
    const want = this.#receipts.get(receipt);
    this.#receipts.delete(receipt);
    if (!want) return this.#take();
    want.receipts.delete(receipt);
    const message = 'the pair ended in the middle of its KV';
    if (ok) this.#settle(want);
    else this.#abandon(want, { code: 'PEER_LOST', message, context: {} }, now);
    return this.#take();
  }

  /** Its owner does not want it any more; it is told nothing. Its blocks may be in quarantine from now on. Idempotent. */
  abort(seq: number, now: number): WantAction[] {
    const want = this.#wants.get(seq);
    if (!want || want.told) return this.#take();
    want.told = true;
    this.#counts.aborted++;
    if (!want.end) this.#giveUp(want, now);
    this.#settle(want);
    return this.#take();
  }

  /** It will not come, as is known by other ways than its producer's word to us; its owner is told. Idempotent. */
  fail(seq: number, error: ErrorData, now: number): WantAction[] {
    const want = this.#wants.get(seq);
    if (want && !want.told) this.#abandon(want, error, now);
    return this.#take();
  }

  /** The connection to that peer, and the pair with it, is gone: whoever waits for it is told. Its process may live, and write by `direct`. */
  unreachable(peer: string, error: ErrorData, now: number): WantAction[] {
    const process = this.#processes.at(peer);
    for (const want of [...(process?.books.values() ?? [])]) {
      if (want.message.transport === 'direct') continue;
      const unheard = !want.heard && !want.told;
      if (unheard) want.told = true;
      else this.#fail(want, error);
      if (!want.end && !unheard) this.#giveUp(want, now);
      // nothing comes on that pair any more, and its producer forgets it as well
      want.end ??= { cmd: 'DROPPED', ...answerTo(want.message) };
      this.#settle(want);
      if (unheard) this.#do({ kind: 'again', seq: want.message.seq, owner: want.ask.owner, error });
    }
    return this.#take();
  }

  /** Its producer is done with the prompt: it is late `withinMs` from now, unless it was before. */
  hasten(seq: number, withinMs: number, now: number): void {
    const want = this.#wants.get(seq);
    if (want) want.deadline = Math.min(want.deadline, now + withinMs);
  }

  /** A request settled without its producer's KV, which so need not be kept. */
  unwanted(peer: string, id: TransferId): WantAction[] {
    const process = this.#processes.at(peer);
    if (process) {
      const message = {
        cmd: 'DROP',
        from: this.#options.nonce,
        to: process.nonce,
        floor: this.#floorOf(process),
        id,
      } as const;
      this.#do({ kind: 'send', peer, message });
    }
    return this.#take();
  }

  tick(now: number): WantAction[] {
    const stalled = now - this.#lastTick >= STALL_MS;
    this.#lastTick = now;
    for (const want of [...this.#wants.values()]) {
      if (stalled) want.deadline = Math.max(want.deadline, now + GRACE_MS);
      if (!want.told && now >= want.deadline) {
        const { withinMs } = want.ask;
        const message = want.end
          ? 'its KV is said to be written and its flag never came'
          : 'its KV did not come';
        const text = `${message} within ${withinMs / 1_000} s`;
        this.#abandon(want, { code: 'KV_LOAD_TIMEOUT', message: text, context: {} }, now);
      } else if (!want.end && now - want.saidAt >= REPEAT_MS) {
        this.#repeat(want, now);
      }
    }
    return this.#take();
  }

  /** Nothing that has been asked for is waited for, or may be written to. */
  get isIdle(): boolean {
    return this.#wants.size === 0 && this.#receipts.size === 0;
  }

  /** Blocks that were given up and may still be written to, of one peer's processes. */
  quarantinedBy(peer: string): number {
    return this.#books.quarantinedBy(peer);
  }

  /** The same, of each peer that has some. */
  quarantine(): ReturnType<WantBooks['quarantine']> {
    return this.#books.quarantine();
  }

  /** For metrics and `/debug/state`: wants by state, blocks in quarantine, receives under way, then totals. */
  stats() {
    return {
      ...this.#books.stats(),
      receipts: this.#receipts.size,
      ...this.#counts,
      ignored: this.#processes.ignored,
    };
  }

  /** What is wrong, in words; empty when all is well. */
  checkIntegrity(): string[] {
    return this.#books.checkIntegrity();
  }

  #refusalOf(ask: Ask, process: Process<Want> | undefined): Refusal | undefined {
    if (!process) return 'unknown';
    if (this.quarantinedBy(ask.peer) > this.#options.cacheBlocks / 4) return 'quarantine';
    if (ask.transport === 'direct' && this.#books.slotsOf(process).length === 0) return 'slots';
    return undefined;
  }

  #part(process: Process<Want>, want: Want | undefined, part: PartMessage): void {
    const next = this.#nextParts.get(process.peer) ?? 1;
    this.#nextParts.set(process.peer, part.part + 1);
    if (part.part !== next) this.#do({ kind: 'reset-pair', peer: process.peer });
    const receipt = this.#nextReceipt++;
    const fits =
      want?.exposed &&
      !want.givenUp &&
      !want.end &&
      want.message.transport !== 'direct' &&
      part.layer + part.layers <= this.#options.layers &&
      part.block + part.blocks <= want.message.blocks.length;
    this.#receipts.set(receipt, fits ? want : undefined);
    if (!fits) {
      this.#do({ kind: 'receive', peer: process.peer, receipt, part, into: 'scratch' });
      return;
    }
    want.receipts.add(receipt);
    for (let layer = part.layer; layer < part.layer + part.layers; layer++) {
      // a gap is left open, and DONE finds it
      const before = want.announced[layer] ?? 0;
      if (part.block <= before) want.announced[layer] = Math.max(before, part.block + part.blocks);
    }
    const into = want.message.blocks.slice(part.block, part.block + part.blocks);
    this.#do({ kind: 'receive', peer: process.peer, receipt, part, into });
  }

  #ended(process: Process<Want>, want: Want | undefined, end: EndMessage, now: number): void {
    if (!want) {
      // It was over before: the producer has not heard so.
      if (end.seq >= this.#nextSeq) this.#processes.ignore('forged');
      else this.#acknowledge(process, end);
      return;
    }
    if (want.end === undefined) {
      want.end = end;
      want.saidAt = now;
    }
    // whoever waits for it comes first
    this.#settle(want);
    this.#acknowledge(process, end);
  }

  /** What follows from all that is known of a want: blocks back, its owner told, its entry gone. */
  #settle(want: Want): void {
    const { end, message } = want;
    if (want.receipts.size > 0) return;
    // Where this process alone writes, giving up and having received all is enough.
    const isOver = end !== undefined || (want.givenUp && message.transport !== 'direct');
    if (!isOver) return;
    // The flag says that the bytes are visible here: both, or neither counts.
    if (end?.cmd === 'DONE' && !want.told && !want.flagged) return;
    if (want.exposed) {
      want.exposed = false;
      this.#do({ kind: 'retract', seq: message.seq });
    }
    if (end === undefined) return;
    if (!want.told) this.#conclude(want, end);
    if (!want.givenUp) this.#revoke(want);
    this.#books.remove(want);
  }

  #conclude(want: Want, end: EndMessage): void {
    const { message, ask, announced } = want;
    const { seq, blocks } = message;
    if (end.cmd !== 'DONE') {
      const error: ErrorData =
        end.cmd === 'FAIL'
          ? { code: end.code, message: `${ask.peer} says: ${end.message}`, context: {} }
          : { code: 'KV_LOAD_FAILED', message: `${ask.peer} says that it was given up`, context: {} };
      this.#fail(want, error);
      return;
    }
    const isWhole =
      end.promised === blocks.length &&
      end.written === blocks.length &&
      (message.transport === 'direct' || announced.every((count) => count === blocks.length));
    if (!isWhole) {
      const least = Math.min(...announced);
      const text = `${ask.peer} says that it wrote ${end.written} of ${end.promised} blocks; ${blocks.length} were wanted, ${message.transport === 'direct' ? 'and flagged' : `${least} announced`}`;
      this.#fail(want, { code: 'KV_LOAD_FAILED', message: text, context: {} });
      return;
    }
    want.told = true;
    this.#counts.loaded++;
    const { drawn, logprobs, samplingDigest } = end;
    const draw = { drawn, ...(logprobs && { logprobs }), samplingDigest };
    const isOurs = samplingDigest === ask.samplingDigest && drawn.length > 0;
    this.#do({ kind: 'loaded', seq, owner: ask.owner, ...(isOurs && { draw }) });
  }

  /** Tells the owner, once, and gives it its blocks back first where nothing can be written to them. */
  #fail(want: Want, error: ErrorData): void {
    if (want.told) return;
    want.told = true;
    this.#counts.failed++;
    const { seq } = want.message;
    if (want.exposed && want.end !== undefined && want.receipts.size === 0) {
      want.exposed = false;
      this.#do({ kind: 'retract', seq });
    }
    const context = { ...error.context, transferId: want.ask.id, peer: want.ask.peer };
    this.#do({
      kind: 'failed',
      seq,
      owner: want.ask.owner,
      error: { ...error, context },
      quarantined: want.exposed,
    });
  }

  /** It will not come: its owner is told, and its producer where that does not know. */
  #abandon(want: Want, error: ErrorData, now: number): void {
    this.#fail(want, error);
    if (!want.end) this.#giveUp(want, now);
    this.#settle(want);
  }

  #giveUp(want: Want, now: number): void {
    if (want.givenUp) return;
    want.givenUp = true;
    this.#revoke(want);
    this.#repeat(want, now);
  }

  /** Launches that have not looked yet write nothing. */
  #revoke({ message: { slot }, process: { peer, nonce } }: Want): void {
    if (slot !== undefined) this.#do({ kind: 'grant', peer, nonce, slot, seq: 0 });
  }

  /** Nothing more is heard of that process; it may still write. */
  #displaced(process: Process<Want>, now: number): void {
    for (const want of [...process.books.values()]) {
      this.#fail(want, {
        code: 'PEER_LOST',
        message: 'its process is gone, or another has its address',
        context: {},
      });
      if (!want.end) this.#giveUp(want, now);
      // On a pair nobody else writes, and nobody is left to say DROPPED.
      if (want.message.transport !== 'direct') want.end ??= { cmd: 'DROPPED', ...answerTo(want.message) };
      this.#settle(want);
    }
    this.#books.bury(process);
  }

  /** Says what a producer may not have heard. */
  #repeat(want: Want, now: number): void {
    const { process, message, givenUp, end, ask } = want;
    if (process.dead || end) return;
    want.saidAt = now;
    const floor = this.#floorOf(process);
    const { from, to, seq, ticket, id } = message;
    this.#do({
      kind: 'send',
      peer: ask.peer,
      message: givenUp ? { cmd: 'DROP', from, to, want: { seq, ticket }, floor, id } : { ...message, floor },
    });
  }

  #acknowledge(process: Process<Want>, { from, to, seq, ticket }: EndMessage): void {
    const message = { cmd: 'ACK', from: to, to: from, seq, ticket, floor: this.#floorOf(process) } as const;
    this.#do({ kind: 'send', peer: process.peer, message });
  }

  /** The lowest seq whose end is not known. */
  #floorOf(process: Process<Want>): number {
    for (const [seq, { end }] of process.books) if (!end) return seq;
    return this.#nextSeq;
  }

  #do(action: WantAction): void {
    this.#actions.push(action);
  }

  #take(): WantAction[] {
    const actions = this.#actions;
    this.#actions = [];
    return actions;
  }
}
