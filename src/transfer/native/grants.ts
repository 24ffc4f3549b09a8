/**
 * The producer's ledger: who wants which KV, what is being written for it, and when it may be said to be over. Pure: it is told what
 * happens and answers with what to do. Its driver owns sockets, streams and the block manager, and keeps four rules:
 *
 *   1. Actions are carried out at once, in order, before the ledger is told anything else.
 *   2. Each `write` is answered by exactly one `landed`, once no thread will launch anything for it any more and the event behind its
 *      last launch has fired; where nothing was launched, at once. On a pair, whose reader alone writes to its blocks: once its parts
 *      are on their way. Before each launch of it `mayLaunch` is asked. Writes to one process share one stream.
 *   3. `tick` comes every quarter of a second while `isIdle` is false, after what has arrived has been read.
 *   4. No message of a process is handed in before its hello.
 *
 *   WANT --> unbound --begin--> bound --progress--> writing --finish--> ending --landed--> done     (told, repeated until ACK)
 *               |                 |                    |                   |
 *               |                 +-- fail, DROP ------+-----> ending -----+--landed--> failed, dropped
 *               +-- deadline, DROP, other prompt --------------------------------------> failed, dropped
 *
 * An end is told only when every write of its WANT has landed: then nothing will be written to those blocks any more (Safety 2 of the
 * hand-over). What has been told is kept until the consumer knows it; after that its seq is over for good, however late a copy of it
 * comes. Computed KV that nobody has asked for yet stays under a lease, which the block manager holds.
 */
import { type ErrorCode, PdError, unreachable } from '../../errors.ts';
import type { TransferId } from '../../wire/ids.ts';
import type { Draw, GrantAction } from './actions.ts';
import { type Grant, GrantBooks, isTold, type Request, stateOf } from './grant-books.ts';
import {
  type AckMessage,
  answerTo,
  type ConsumerMessage,
  type DropMessage,
  type EndMessage,
  type Failure,
  type Nonce,
  type ProducerMessage,
  type WantMessage,
} from './messages.ts';
import type { Process, Processes } from './processes.ts';

export interface GrantsOptions {
  /** Of this process. */
  readonly nonce: Nonce;
  /** Tokens per block, of both ends. */
  readonly blockSize: number;
  /** Whether the id of a request says that its KV is for `peer`. */
  readonly names: (id: TransferId, peer: string) => boolean;
  /** How long a WANT may wait for its request. */
  readonly unboundMs: number;
  /** How long KV that nobody asks for is kept. */
  readonly leaseMs: number;
  /** How long an id that is over is remembered. */
  readonly endedMs?: number;
  /** WANTs of one process that wait for their request, and all that are not acknowledged. */
  readonly maxUnbound?: number;
  readonly maxWants?: number;
}

const LONGEST_REPEAT_MS = 60_000;

export class Grants {
  readonly #options: Required<GrantsOptions>;
  readonly #books: GrantBooks;
  readonly #processes: Processes<Grant>;
  readonly #requests: Map<TransferId, Request>;
  #nextLaunch = 1;
  #draining = false;
  #actions: GrantAction[] = [];
  /** `promised`: blocks that WANTs have named. `written`: blocks whose write was asked for. */
  readonly #counts = { wants: 0, promised: 0, written: 0, leasesEnded: 0 };

  constructor(options: GrantsOptions) {
    this.#options = { endedMs: 600_000, maxUnbound: 1_024, maxWants: 8_192, ...options };
    this.#books = new GrantBooks(options.nonce);
    this.#processes = this.#books.processes;
    this.#requests = this.#books.requests;
  }

  /** A peer has said hello. `cacheBlocks`: what its cache has; a WANT names none beyond. Again after each reconnect. */
  introduced(peer: string, nonce: Nonce, cacheBlocks: number, now: number): GrantAction[] {
    const { process, before } = this.#processes.introduce(peer, nonce, cacheBlocks);
    if (before) this.#bury(before, now);
    for (const grant of process.books.values()) if (isTold(grant)) this.#tell(grant, now);
    return this.#take();
  }

  /** That process is dead: the end of its Unix socket, or of its pair, has been seen. */
  died(peer: string, nonce: Nonce, now: number): GrantAction[] {
    const process = this.#processes.remove(peer, nonce);
    if (process) this.#bury(process, now);
    return this.#take();
  }

  /**
   * Its connection is gone: what travels on a pair has been given up by its consumer as well, so nothing is kept for it. By `direct` its
   * process may live and come back, and hears then.
   */
  unreachable(peer: string, now: number): GrantAction[] {
    const process = this.#processes.at(peer);
    for (const grant of [...(process?.books.values() ?? [])]) {
      const { seq, transport } = grant.want;
      if (transport === 'direct') continue;
      if (!isTold(grant)) {
        this.#fail(grant, { code: 'PEER_LOST', message: 'its connection is gone' }, now);
      } else {
        process?.books.delete(seq);
        process?.settle(seq);
      }
    }
    return this.#take();
  }

  /** What the ROUTER has read of a peer that has said hello. */
  message(peer: string, message: ConsumerMessage, now: number): GrantAction[] {
    const process = this.#processes.sender(peer, message);
    if (!process) {
      this.#do({ kind: 'introduce', peer });
      return this.#take();
    }
    switch (message.cmd) {
      case 'WANT':
        this.#want(process, message, now);
        break;
      case 'DROP':
        this.#drop(process, message, now);
        break;
      case 'ACK':
        this.#ack(process, message);
        break;
      default:
        unreachable(message, 'message');
    }
    this.#raiseFloor(process, message.floor);
    return this.#take();
  }

  /** A request that computes its prompt here, and whose id names a consumer. */
  begin(id: TransferId, promptDigest: string, tokens: number, now: number): GrantAction[] {
    const before = this.#requests.get(id);
    if (before) this.#endRequest(before, 'KV_SEND_FAILED', 'a later request has its id', now);
    const { endedIds } = this.#books;
    const ended = endedIds.get(id);
    endedIds.delete(id);
    const request: Request = {
      id,
      promptDigest,
      tokens,
      grants: new Set(),
      computed: 0,
      sources: [],
      draw: undefined,
      leasedUntil: undefined,
      unwanted: ended?.unwanted ?? false,
    };
    this.#requests.set(id, request);
    for (const grant of this.#books.unboundTo(id)) this.#bind(grant, request, now);
    return this.#take();
  }

  /**
   * The KV of the first `computed` tokens lies in `sources`, or will in the order of the compute stream: what is launched behind the
   * events of this step reads it. After a preemption it may begin again, in other blocks; what has been written stays written.
   */
  progress(id: TransferId, computed: number, sources: readonly number[]): GrantAction[] {
    const request = this.#requestOf(id);
    if (!request) return [];
    const tokens = Math.min(computed, request.tokens);
    if (sources.length < this.#blocksFor(tokens)) {
      throw new PdError('INTERNAL', `${sources.length} blocks cannot hold ${tokens} tokens of ${id}`);
    }
    request.computed = tokens;
    request.sources = sources.slice(0, this.#blocksFor(tokens));
    for (const grant of request.grants) this.#write(grant, request);
    return this.#take();
  }

  /** The prompt is computed (`progress` has said so) and its first token drawn. Its blocks may go once `lease` is done, or is not asked for. */
  finish(id: TransferId, draw: Draw, now: number): GrantAction[] {
    const request = this.#requestOf(id);
    if (!request) return [];
    if (request.computed < request.tokens) {
      throw new PdError('INTERNAL', `${id} has ${request.computed} of ${request.tokens} tokens computed`);
    }
    request.draw = draw;
    for (const grant of [...request.grants]) this.#finishGrant(grant, draw, now);
    if (this.#requests.get(id) !== request) return this.#take();
    if (request.grants.size === 0 && (request.unwanted || this.#draining)) {
      this.#forget(request, 'its consumer has given it up', now);
    } else {
      // Also while writes are under way, which hold their own blocks alone: a further WANT of this id would read others.
      request.leasedUntil = now + this.#options.leaseMs;
      this.#do({ kind: 'lease', id });
    }
    return this.#take();
  }

  /** The KV of a request will not come (abort, error), or its lease has had to make room. */
  fail(id: TransferId, code: ErrorCode, why: string, now: number): GrantAction[] {
    const request = this.#requests.get(id);
    if (request) this.#endRequest(request, code, why, now);
    return this.#take();
  }

  /** Whether a launch of that write may still be made. False: what is left of it is not written, and `landed` follows. */
  mayLaunch(launch: number): boolean {
    const grant = this.#books.launches.get(launch)?.grant;
    return grant !== undefined && !grant.owner.dead && (grant.end === undefined || grant.end.cmd === 'DONE');
  }

  /** Nothing of that write is under way any more. `failure`: not all of it was written. */
  landed(launch: number, now: number, failure?: Failure): GrantAction[] {
    const known = this.#books.launches.get(launch);
    if (!known) throw new PdError('INTERNAL', `write ${launch} has landed before, or never was`);
    const { grant, sources } = known;
    this.#books.launches.delete(launch);
    grant.launches.delete(launch);
    if (failure && (grant.end === undefined || grant.end.cmd === 'DONE')) {
      grant.end = { cmd: 'FAIL', ...answerTo(grant.want), ...failure };
    }
    // the end first: its consumer waits
    this.#settle(grant, now);
    this.#do({ kind: 'unhold', launch, sources });
    return this.#take();
  }

  tick(now: number): GrantAction[] {
    for (const process of this.#processes.all()) {
      for (const grant of process.books.values()) {
        if (grant.saidAt !== undefined) {
          if (now - grant.saidAt < grant.repeatMs) continue;
          grant.repeatMs = Math.min(2 * grant.repeatMs, LONGEST_REPEAT_MS);
          this.#tell(grant, now);
        } else if (!grant.request && grant.end === undefined && now >= grant.deadline) {
          const waited = `no request of that id came within ${this.#options.unboundMs / 1_000} s`;
          this.#fail(grant, { code: 'KV_SEND_FAILED', message: waited }, now);
        }
      }
    }
    for (const request of this.#requests.values()) {
      if (request.leasedUntil === undefined || request.grants.size > 0 || now < request.leasedUntil) continue;
      this.#forget(request, `nobody asked for it within ${this.#options.leaseMs / 1_000} s`, now);
    }
    this.#books.endedIds.sweep(now - this.#options.endedMs);
    return this.#take();
  }

  /** Ends every WANT, present and to come: the worker stops. What has been launched still lands, and each end is told. */
  shutdown(now: number): GrantAction[] {
    this.#draining = true;
    const why = 'the worker is stopping';
    for (const request of [...this.#requests.values()]) {
      this.#endRequest(request, 'SERVER_DRAINING', why, now);
    }
    for (const grant of this.#books.unbound())
      this.#fail(grant, { code: 'SERVER_DRAINING', message: why }, now);
    return this.#take();
  }

  /** Whether a process at that address has said hello, and is not known to be gone. */
  knows(peer: string): boolean {
    return this.#processes.at(peer) !== undefined;
  }

  /** For how long the WANT of that peer has waited that has waited longest for its request; 0 where none does. */
  longestUnbound(peer: string, now: number): number {
    let longest = 0;
    for (const { request, end, deadline } of this.#processes.at(peer)?.books.values() ?? [])
      if (!request && !end) longest = Math.max(longest, now - (deadline - this.#options.unboundMs));
    return longest;
  }

  /** Nothing to wait for: no WANT that is not acknowledged, no write, no lease. */
  get isIdle(): boolean {
    const { unbound, bound, writing, ending, told, launches, leases } = this.stats();
    return unbound + bound + writing + ending + told + launches + leases === 0;
  }

  /** For metrics and `/debug/state`. WANTs by state, `told` being those whose end is not acknowledged; then the other books; then totals. */
  stats() {
    return { ...this.#books.stats(), ...this.#counts, ignored: this.#processes.ignored };
  }

  /** What is wrong, in words; empty when all is well. */
  checkIntegrity(): string[] {
    return this.#books.checkIntegrity();
  }

  #want(process: Process<Grant>, want: WantMessage, now: number): void {
    const known = process.books.get(want.seq);
    if (known) {
      if (known.want.ticket !== want.ticket) this.#processes.ignore('forged');
      else this.#answerAgain(known, now);
      return;
    }
    if (process.isSettled(want.seq)) {
      this.#processes.ignore('stale');
      return;
    }
    if (process.books.size >= this.#options.maxWants) {
      this.#processes.ignore('overfull');
      return;
    }
    const grant = this.#open(process, want, now);
    this.#counts.wants++;
    this.#counts.promised += want.blocks.length;
    const refusal = this.#refusalOf(process, want);
    const request = this.#requests.get(want.id);
    if (refusal) this.#fail(grant, refusal, now);
    else if (request) this.#bind(grant, request, now);
  }

  #open(process: Process<Grant>, want: WantMessage, now: number): Grant {
    return this.#books.open(process, want, now + this.#options.unboundMs);
  }

  /** Why a WANT fails before anything is written, as far as it can be told without its request. */
  #refusalOf(process: Process<Grant>, { id, tokens, skip, blocks }: WantMessage): Failure | undefined {
    if (this.#draining) return { code: 'SERVER_DRAINING', message: 'the worker is stopping' };
    if (!this.#options.names(id, process.peer)) {
      return { code: 'MESSAGE_INVALID', message: `the id of the request does not name ${process.peer}` };
    }
    const expected = this.#blocksFor(tokens) - skip;
    if (blocks.length !== expected) {
      return {
        code: 'KV_SHAPE_MISMATCH',
        message: `${blocks.length} blocks are named for ${tokens} tokens without ${skip} blocks, which are ${expected} of ${this.#options.blockSize}`,
      };
    }
    const beyond = blocks.find((block) => block >= process.cacheBlocks);
    if (beyond !== undefined) {
      return {
        code: 'KV_SHAPE_MISMATCH',
        message: `block ${beyond} is named, of a cache of ${process.cacheBlocks}`,
      };
    }
    if (this.#requests.has(id)) return undefined;
    const ended = this.#books.endedIds.get(id);
    if (ended) return { code: 'KV_SEND_FAILED', message: `the request is over: ${ended.why}` };
    let unbound = 0;
    for (const grant of process.books.values()) if (!grant.request && !grant.end) unbound++;
    if (unbound <= this.#options.maxUnbound) return undefined;
    return {
      code: 'LIMIT_EXCEEDED',
      message: `${this.#options.maxUnbound} others of ${process.peer} wait for their request`,
    };
  }

  #bind(grant: Grant, request: Request, now: number): void {
    const { promptDigest, tokens, id, seq, transport } = grant.want;
    if (promptDigest !== request.promptDigest || tokens !== request.tokens) {
      const message = `the request of that id has another prompt here (${request.tokens} tokens, digest ${request.promptDigest}; wanted ${tokens}, ${promptDigest})`;
      this.#fail(grant, { code: 'PROMPT_MISMATCH', message }, now);
      return;
    }
    this.#books.leaveUnbound(grant);
    grant.request = request;
    request.grants.add(grant);
    request.unwanted = false;
    this.#do({ kind: 'bound', id, transport, peer: grant.owner.peer, nonce: grant.owner.nonce, seq });
    this.#write(grant, request);
    if (request.draw) this.#finishGrant(grant, request.draw, now);
  }

  /** Asks for the write of the blocks that have been filled since the last one; of the prompt's last one also where it will stay part-filled. */
  #write(grant: Grant, request: Request): void {
    const { computed, tokens } = request;
    const first = grant.written;
    const last = computed === tokens;
    const end = last ? this.#blocksFor(tokens) : Math.floor(computed / this.#options.blockSize);
    if (grant.end !== undefined || end <= first) return;
    const { skip, blocks, slot, transport, seq, id, ticket } = grant.want;
    const sources = request.sources.slice(first, end);
    const launch = this.#nextLaunch++;
    grant.written = end;
    grant.begun = true;
    grant.launches.add(launch);
    this.#books.launches.set(launch, { grant, sources });
    this.#counts.written += sources.length;
    this.#do({
      kind: 'write',
      launch,
      id,
      ticket,
      peer: grant.owner.peer,
      nonce: grant.owner.nonce,
      seq,
      transport,
      ...(slot !== undefined && { slot }),
      place: first - skip,
      sources,
      targets: blocks.slice(first - skip, end - skip),
      last,
    });
  }

  #finishGrant(grant: Grant, draw: Draw, now: number): void {
    if (grant.end !== undefined) return;
    const { blocks, skip } = grant.want;
    const end = { ...answerTo(grant.want), ...draw, promised: blocks.length, written: grant.written - skip };
    this.#end(grant, { cmd: 'DONE', ...end }, now);
  }

  #drop(process: Process<Grant>, { id, want, to, from }: DropMessage, now: number): void {
    if (!this.#options.names(id, process.peer)) {
      this.#processes.ignore('forged');
      return;
    }
    if (!want) {
      this.#giveUp(id, now);
      return;
    }
    const grant = process.books.get(want.seq);
    if (grant) {
      if (grant.want.ticket !== want.ticket || grant.want.id !== id) {
        this.#processes.ignore('forged');
        return;
      }
      if (grant.end !== undefined) {
        this.#answerAgain(grant, now);
        return;
      }
      const isUnbound = grant.request === undefined;
      this.#end(grant, { cmd: 'DROPPED', ...answerTo(grant.want) }, now);
      if (isUnbound) this.#giveUp(id, now);
      if (!isTold(grant)) this.#answerAgain(grant, now);
      return;
    }
    if (process.isSettled(want.seq)) {
      this.#processes.ignore('stale');
      return;
    }
    // Its WANT was lost, or is still on its way: the seq is over before it began.
    const unheard = { ...NEVER_HEARD, id, ...want, to, from };
    if (process.books.size >= this.#options.maxWants) {
      this.#processes.ignore('overfull');
      return;
    }
    const open = this.#open(process, unheard, now);
    this.#end(open, { cmd: 'DROPPED', ...answerTo(open.want) }, now);
    this.#giveUp(id, now);
  }

  /** Its consumer will not ask for it. */
  #giveUp(id: TransferId, now: number): void {
    const request = this.#requests.get(id);
    if (!request) {
      this.#rememberId(id, 'its consumer has given it up', true, now);
      return;
    }
    if (request.grants.size > 0) return;
    request.unwanted = true;
    if (request.draw) this.#forget(request, 'its consumer has given it up', now);
  }

  #ack(process: Process<Grant>, { seq, ticket }: AckMessage): void {
    const grant = process.books.get(seq);
    if (!grant) return;
    if (grant.want.ticket !== ticket || !isTold(grant)) {
      this.#processes.ignore('forged');
      return;
    }
    process.books.delete(seq);
    process.settle(seq);
  }

  /** What is below is over and known to be; but a floor that passes what is not told is not believed further than that. */
  #raiseFloor(process: Process<Grant>, floor: number): void {
    let reached = floor;
    for (const [seq, grant] of process.books) if (!isTold(grant)) reached = Math.min(reached, seq);
    for (const seq of process.books.keys()) if (seq < reached) process.books.delete(seq);
    process.raiseFloor(reached);
  }

  /** Decides an end; the first decision stands. */
  #end(grant: Grant, end: EndMessage, now: number): void {
    if (grant.end !== undefined) return;
    grant.end = end;
    this.#books.leaveUnbound(grant);
    this.#settle(grant, now);
  }

  #fail(grant: Grant, { code, message }: Failure, now: number): void {
    this.#end(grant, { cmd: 'FAIL', ...answerTo(grant.want), code, message }, now);
  }

  /** Tells an end that is decided, once nothing is being written for it. */
  #settle(grant: Grant, now: number): void {
    const { owner, request, end } = grant;
    if (end === undefined || grant.launches.size > 0 || isTold(grant)) return;
    const { seq } = grant.want;
    this.#do({ kind: 'ended', peer: owner.peer, nonce: owner.nonce, seq });
    if (owner.dead) {
      owner.books.delete(seq);
      if (owner.books.size === 0) this.#drained(owner);
    } else {
      this.#tell(grant, now);
    }
    if (!request) return;
    request.grants.delete(grant);
    grant.request = undefined;
    if (request.grants.size > 0 || this.#requests.get(request.id) !== request) return;
    request.unwanted = true;
    if (request.draw) this.#forget(request, WHY_OVER[end.cmd], now);
  }

  #answerAgain(grant: Grant, now: number): void {
    if (isTold(grant)) {
      this.#tell(grant, now);
      return;
    }
    this.#send(grant, { cmd: 'HELD', ...answerTo(grant.want), state: stateOf(grant) });
  }

  #tell(grant: Grant, now: number): void {
    if (!grant.end) return;
    grant.saidAt = now;
    this.#send(grant, grant.end);
  }

  #send({ owner: { peer }, want: { slot } }: Grant, message: ProducerMessage): void {
    this.#do({ kind: 'send', peer, message, ...(slot !== undefined && { slot }) });
  }

  #endRequest(request: Request, code: ErrorCode, why: string, now: number): void {
    this.#forget(request, why, now);
    for (const grant of [...request.grants]) {
      if (grant.end?.cmd !== 'DONE') this.#fail(grant, { code, message: why }, now);
    }
  }

  /** The request is over here; WANTs that are bound to it end by themselves. */
  #forget(request: Request, why: string, now: number): void {
    if (this.#requests.get(request.id) !== request) return;
    this.#requests.delete(request.id);
    this.#rememberId(request.id, why, false, now);
    if (request.leasedUntil === undefined) return;
    this.#counts.leasesEnded++;
    this.#do({ kind: 'release', id: request.id });
  }

  #rememberId(id: TransferId, why: string, unwanted: boolean, now: number): void {
    this.#books.endedIds.set(id, { why, unwanted }, now);
  }

  /** Nobody hears the answers to that process's WANTs, and nothing more is launched for them. */
  #bury(process: Process<Grant>, now: number): void {
    for (const grant of [...process.books.values()]) {
      if (isTold(grant)) process.books.delete(grant.want.seq);
      else this.#fail(grant, { code: 'PEER_LOST', message: 'its process is gone' }, now);
    }
    if (process.books.size === 0) this.#drained(process);
  }

  #drained(process: Process<Grant>): void {
    if (this.#processes.bury(process)) {
      this.#do({ kind: 'drained', peer: process.peer, nonce: process.nonce });
    }
  }

  /** Undefined for one that has been failed meanwhile. */
  #requestOf(id: TransferId): Request | undefined {
    const request = this.#requests.get(id);
    if (request?.draw) throw new PdError('INTERNAL', `${id} is computed and goes on`);
    return request;
  }

  #blocksFor(tokens: number): number {
    return Math.ceil(tokens / this.#options.blockSize);
  }

  #do(action: GrantAction): void {
    this.#actions.push(action);
  }

  #take(): GrantAction[] {
    const actions = this.#actions;
    this.#actions = [];
    return actions;
  }
}

const WHY_OVER = {
  DONE: 'its KV has been handed over',
  FAIL: 'its KV could not be handed over',
  DROPPED: 'its consumer has given it up',
} as const satisfies Record<EndMessage['cmd'], string>;

/** Stands for a WANT of which only the DROP was heard. */
const NEVER_HEARD = {
  cmd: 'WANT',
  floor: 1,
  promptDigest: '',
  tokens: 0,
  skip: 0,
  blocks: [],
  samplingDigest: '',
  transport: 'host',
} as const satisfies Partial<WantMessage>;
