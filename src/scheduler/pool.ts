/** Every sequence of the scheduler, the queue it is in and the blocks it holds. The scheduler decides; this keeps the books. */
import type { FinishedRequest, SchedulerConnector } from '../connector/connector.ts';
import { type ErrorData, PdError } from '../errors.ts';
import type { BlockManager } from '../kv/block-manager.ts';
import type { EngineRequestId, TransferId } from '../wire/ids.ts';
import { byTurn, endOutput, type RequestGroup, Sequence, SequenceQueue } from './sequence.ts';
import type { CoreRequest, FinishReason, RequestOutput } from './types.ts';

export interface SchedulerStats {
  preemptions: number;
  /** Prompt tokens looked up in the prefix cache, and found. */
  prefixQueries: number;
  prefixHits: number;
}

export class SequencePool {
  readonly blocks: BlockManager;
  readonly stats: SchedulerStats = { preemptions: 0, prefixQueries: 0, prefixHits: 0 };
  /** No blocks. */
  readonly waiting = new SequenceQueue();
  /** Blocks, and KV up to the last known token or what must be computed here; they only need a place in the batch. */
  readonly ready = new SequenceQueue();
  readonly running = new SequenceQueue();
  /** Outside the batch until their load ends. */
  readonly loading = new Map<EngineRequestId, Sequence>();
  readonly #groups = new Map<EngineRequestId, RequestGroup>();
  readonly #connector: SchedulerConnector | undefined;
  readonly #finished: FinishedRequest[] = [];
  #arrivals = 0;

  constructor(blocks: BlockManager, connector: SchedulerConnector | undefined) {
    this.blocks = blocks;
    this.#connector = connector;
  }

  get size(): number {
    return this.#groups.size;
  }

  get(requestId: EngineRequestId): RequestGroup | undefined {
    return this.#groups.get(requestId);
  }

  /** All, or those that are known by `transferId`. */
  groups(transferId?: TransferId): RequestGroup[] {
    const all = [...this.#groups.values()];
    return transferId === undefined ? all : all.filter(({ request }) => request.transferId === transferId);
  }

  add(request: CoreRequest): void {
    const sequences: Sequence[] = [];
    const group: Omit<RequestGroup, 'leader'> & { leader?: Sequence } = {
      request,
      arrival: this.#arrivals++,
      sequences,
      live: request.n,
      loading: false,
      aborted: false,
      prefilled: false,
    };
    for (let index = 0; index < request.n; index++) {
      const sequence = new Sequence(group as RequestGroup, index);
      if (index > 0) sequence.state = 'following';
      sequences.push(sequence);
    }
    const [leader] = sequences;
    if (!leader) throw new PdError('INTERNAL', `request ${request.requestId} has no completions`);
    group.leader = leader;
    this.#groups.set(request.requestId, group as RequestGroup);
    this.waiting.insert(leader);
  }

  /** Moves a sequence to the queue of `state`; blocks are the caller's business. */
  move(sequence: Sequence, state: 'waiting' | 'ready' | 'running' | 'loading'): void {
    this.#leaveQueue(sequence);
    sequence.state = state;
    if (state === 'loading') this.loading.set(sequence.group.request.requestId, sequence);
    else this[state].insert(sequence);
  }

  /** Lets go of its blocks, to compute everything (again) in others. */
  restart(sequence: Sequence): void {
    this.#giveBack(sequence);
    this.move(sequence, 'waiting');
  }

  /** Its blocks go to others. */
  preempt(sequence: Sequence): void {
    this.restart(sequence);
    this.stats.preemptions++;
    if (sequence.isLeader) this.#connector?.requestPreempted(sequence.group.request.requestId);
  }

  /** The last to come of those whose blocks may be taken. */
  victim(): Sequence | undefined {
    const { last: running } = this.running;
    const { last: ready } = this.ready;
    if (!running || !ready) return running ?? ready;
    return byTurn(running, ready) > 0 ? running : ready;
  }

  /**
   * Once the leader's blocks hold the prompt but its last token, those that follow share them, as far as there are blocks for copies;
   * each computes that last token itself, so it is sampled like any other.
   */
  forkFollowers(leader: Sequence): void {
    const numTokens = leader.promptLength - 1;
    if (leader.numComputed < numTokens) return;
    for (const follower of leader.group.sequences) {
      if (follower.state !== 'following') continue;
      if (numTokens > 0 && this.blocks.canFork(numTokens)) {
        follower.copy = this.blocks.fork(leader.id, follower.id, numTokens);
        follower.numComputed = numTokens;
        this.move(follower, 'ready');
      } else {
        this.move(follower, 'waiting');
      }
    }
  }

  /** The leader will not reach the end of the prompt: the next in line computes it. */
  promoteFollower(group: RequestGroup): void {
    const next = group.sequences.find((sequence) => sequence.state === 'following');
    if (!next) return;
    this.#connector?.requestPreempted(group.request.requestId);
    group.leader = next;
    this.move(next, 'waiting');
  }

  countLookup(sequence: Sequence, hits: number): void {
    this.stats.prefixQueries += sequence.length;
    this.stats.prefixHits += hits;
  }

  /** Ends a sequence and frees its blocks, unless its load is still writing: then `endLoad` does. */
  end(sequence: Sequence): void {
    const { group } = sequence;
    if (sequence.state === 'finished' || sequence.silent)
      throw new PdError('INTERNAL', `${sequence.id} ended twice`);
    group.live--;
    if (sequence.state === 'loading') {
      sequence.silent = true;
    } else {
      this.#giveBack(sequence);
      this.#leaveQueue(sequence);
      sequence.state = 'finished';
    }
    if (group.live === 0) this.#connector?.requestFinished(group.request.requestId);
    this.#retire(group);
  }

  /** The load of a sequence that had already ended is over: nothing writes to its blocks any more. */
  endSilently(sequence: Sequence): void {
    this.#giveBack(sequence);
    this.#leaveQueue(sequence);
    sequence.state = 'finished';
    this.#retire(sequence.group);
  }

  /** Ends every sequence of a request that lives, each with an output. */
  endGroup(group: RequestGroup, finishReason: FinishReason, error?: ErrorData): RequestOutput[] {
    const outputs: RequestOutput[] = [];
    for (const sequence of group.sequences) {
      if (sequence.state === 'finished' || sequence.silent) continue;
      outputs.push(endOutput(sequence, finishReason, error));
      this.end(sequence);
    }
    return outputs;
  }

  /** Requests that are over since the last call. */
  takeFinished(): FinishedRequest[] {
    return this.#finished.splice(0);
  }

  /** What is wrong, in words; empty when all is well. */
  checkIntegrity(): string[] {
    const problems = this.blocks.checkIntegrity();
    const owners = new Set(this.blocks.owners());
    const queued = new Map<Sequence, string>();
    const queues = { waiting: this.waiting, ready: this.ready, running: this.running };
    for (const [name, queue] of Object.entries(queues)) {
      for (const sequence of queue) {
        if (queued.has(sequence)) problems.push(`${sequence.id} is in two queues`);
        queued.set(sequence, name);
      }
    }
    for (const sequence of this.loading.values()) queued.set(sequence, 'loading');
    for (const group of this.#groups.values()) {
      const live = group.sequences.filter(({ state, silent }) => state !== 'finished' && !silent).length;
      if (live !== group.live)
        problems.push(`${group.request.requestId} counts ${group.live} live of ${live}`);
      for (const sequence of group.sequences) {
        const { id, state } = sequence;
        const place = queued.get(sequence);
        const unqueued = state === 'finished' || state === 'following';
        if (unqueued ? place !== undefined : place !== state)
          problems.push(`${id} is ${state} but in ${place}`);
        const holds = state === 'loading' || state === 'ready' || state === 'running';
        if (owners.delete(id) !== holds) problems.push(`${id} is ${state}, blocks: ${!holds}`);
        queued.delete(sequence);
      }
    }
    for (const id of owners) problems.push(`${id} holds blocks and is over`);
    for (const sequence of queued.keys()) problems.push(`${sequence.id} is queued and over`);
    return problems;
  }

  #giveBack(sequence: Sequence): void {
    if (sequence.copy) this.blocks.releaseCopy(sequence.copy);
    sequence.copy = undefined;
    this.blocks.free(sequence.id);
    sequence.resetProgress();
  }

  #leaveQueue(sequence: Sequence): void {
    const { state } = sequence;
    if (state === 'waiting' || state === 'ready' || state === 'running') this[state].remove(sequence);
    if (state === 'loading') this.loading.delete(sequence.group.request.requestId);
  }

  #retire(group: RequestGroup): void {
    if (group.live > 0 || group.loading) return;
    const { requestId, transferId } = group.request;
    if (this.#groups.delete(requestId))
      this.#finished.push({ requestId, transferId, aborted: group.aborted });
  }
}
