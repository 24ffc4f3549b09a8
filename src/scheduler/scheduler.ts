/**
 * Continuous batching over paged KV: which tokens of which sequences each step computes. Pure: no I/O, no clock.
 *
 *   schedule() -> (executor runs step.batch) -> update(step, result) | failStep(step, error)
 *
 * Lower priorities first, and within a priority first come, first served. A sequence that needs a block when none is free takes it from the
 * last to come, which recomputes its prompt later. A request whose KV is on its way from a peer waits outside the batch and delays nobody.
 * Between `schedule` and `update` the blocks of the batch belong to the executor: `abort` waits until the step is over. A load may end
 * meanwhile, and say its first token, as it is in no batch.
 */

import type { LoadFailurePolicy } from '../config/worker-config.ts';
import type { FinishedRequest, LoadOutcome, SchedulerConnector } from '../connector/connector.ts';
import { type ErrorData, PdError } from '../errors.ts';
import type { BlockHash } from '../kv/block-hash.ts';
import { BlockManager } from '../kv/block-manager.ts';
import type { EngineRequestId, TransferId } from '../wire/ids.ts';
import { type SchedulerStats, SequencePool } from './pool.ts';
import { endOutput, type Sequence, sampledOutput } from './sequence.ts';
import { type SchedulerStep, StepBuilder } from './step.ts';
import type {
  CacheChange,
  CoreRequest,
  ForwardResult,
  GrammarUse,
  RequestOutput,
  SampledToken,
  SamplingParams,
  TokenHistory,
} from './types.ts';

/** Waiting sequences whose cached blocks are counted; those further back count as uncached. */
const MAX_LOOKED_UP = 64;

interface SequenceLimits {
  readonly numBlocks: number;
  /** Tokens per block. */
  readonly blockSize: number;
  /** Most tokens of one sequence, prompt and output. */
  readonly maxModelLen: number;
}

/** Most tokens a sequence may have: one that could outgrow all blocks would preempt itself forever. */
export function maxSequenceLength({ numBlocks, blockSize, maxModelLen }: SequenceLimits): number {
  return Math.min(maxModelLen, numBlocks * blockSize);
}

/** What came along with a load that ended well. */
type FirstDraw = Extract<LoadOutcome, { readonly ok: true }>['draw'];

export interface SchedulerOptions extends SequenceLimits {
  /** Most sequences of one step. */
  readonly maxNumSeqs: number;
  /** Most tokens of one step, over all sequences. */
  readonly maxNumBatchedTokens: number;
  readonly enablePrefixCaching: boolean;
  /** Keep what `takeCacheChanges` returns. */
  readonly logCacheChanges?: boolean;
  /** Whether nothing can follow `token` after the text of `history`. Must not throw. */
  readonly isLastToken?: (grammar: GrammarUse, history: TokenHistory, token: number) => boolean;
}

export class Scheduler {
  readonly #options: SchedulerOptions;
  readonly #connector: SchedulerConnector | undefined;
  readonly #pool: SequencePool;
  readonly #maxLength: number;
  readonly #cacheChanges: CacheChange[] | undefined;
  #step: SchedulerStep | undefined;
  #missingBlocks = 0;

  constructor(options: SchedulerOptions, connector?: SchedulerConnector) {
    this.#options = options;
    this.#connector = connector;
    const { numBlocks, blockSize, logCacheChanges = false } = options;
    const changes: CacheChange[] | undefined = logCacheChanges ? [] : undefined;
    this.#cacheChanges = changes;
    const onEvicted = changes && ((hash: BlockHash) => changes.push({ type: 'removed', hash }));
    this.#pool = new SequencePool(new BlockManager(numBlocks, blockSize, onEvicted), connector);
    this.#maxLength = maxSequenceLength(options);
  }

  get numRunning(): number {
    return this.#pool.running.length;
  }

  get numWaiting(): number {
    return this.#pool.waiting.length + this.#pool.ready.length;
  }

  get numLoading(): number {
    return this.#pool.loading.size;
  }

  /** Requests not over yet. */
  get numRequests(): number {
    return this.#pool.size;
  }

  get blocks(): { readonly used: number; readonly cached: number; readonly total: number } {
    const { numUsed, numCached, numBlocks } = this.#pool.blocks;
    return { used: numUsed, cached: numCached, total: numBlocks };
  }

  /** Prompt tokens to be computed here before all requests are in decode: what is cached, or comes from a peer, is not among them. */
  get queuedTokens(): number {
    const { running, ready, waiting } = this.#pool;
    let tokens = 0;
    // One token is left of each that decodes.
    for (const queue of [running, ready]) for (const { numRemaining } of queue) tokens += numRemaining - 1;
    let looked = 0;
    for (const sequence of waiting) {
      const local = looked++ < MAX_LOOKED_UP ? this.#lookup(sequence).length * this.#options.blockSize : 0;
      const external = sequence.isLeader
        ? (this.#connector?.getNumNewMatchedTokens(sequence.connectorRequest(), local) ?? 0)
        : 0;
      tokens += sequence.length - local - external;
    }
    return tokens;
  }

  /** Of a request that is not over. */
  samplingOf(requestId: EngineRequestId): SamplingParams | undefined {
    return this.#pool.get(requestId)?.request.sampling;
  }

  /** By which a connector keeps blocks for other processes. */
  get blockManager(): BlockManager {
    return this.#pool.blocks;
  }

  /** Free blocks that the next request in line has lacked in the last `schedule`. */
  get missingBlocks(): number {
    return this.#missingBlocks;
  }

  /** Totals since the start. */
  get stats(): Readonly<SchedulerStats> {
    return this.#pool.stats;
  }

  /** Throws REQUEST_INVALID, or CONTEXT_EXCEEDED where the prompt and one token can never fit. */
  add(request: CoreRequest): void {
    const { requestId, transferId } = request;
    if (this.#pool.get(requestId)) {
      throw new PdError('REQUEST_INVALID', `request ${requestId} is here already`, { requestId });
    }
    // KV that comes for one of the two could be the other's.
    if (this.#connector?.transfersKv(transferId) && this.#pool.groups(transferId).length > 0) {
      const message = `request ${requestId}: another request of the id ${transferId} is under way`;
      throw new PdError('REQUEST_INVALID', message, { requestId, transferId });
    }
    validateRequest(request, this.#options);
    this.#pool.add(request);
  }

  /** Gives up one completion (a stop string), or all of a request (its client has left). Unknown ones have already ended. */
  abort(requestId: EngineRequestId, index?: number): RequestOutput[] {
    this.#assertNoStep('abort');
    const group = this.#pool.get(requestId);
    if (!group) return [];
    if (index === undefined) {
      group.aborted = true;
      return this.#pool.endGroup(group, 'abort');
    }
    const sequence = group.sequences[index];
    if (!sequence || sequence.state === 'finished' || sequence.silent) return [];
    const output = endOutput(sequence, 'abort');
    const loading = sequence.state === 'loading';
    this.#pool.end(sequence);
    // While a load goes on, those that follow wait for it; else one of them takes the lead.
    if (sequence.isLeader && !loading) this.#pool.promoteFollower(group);
    return [output];
  }

  /** The producer is done with the prompt: a load that begins later waits for no prefill. */
  prefilled(transferId: TransferId): void {
    for (const group of this.#pool.groups(transferId)) group.prefilled = true;
  }

  /** The other end of the pair will not decode it: however it ends, its KV is not kept. Also while a step is under way. */
  released(transferId: TransferId): void {
    for (const group of this.#pool.groups(transferId)) group.aborted = true;
  }

  /** Decides the next step. An empty batch means that nothing can run before a request comes or a load ends. */
  schedule(): SchedulerStep {
    this.#assertNoStep('schedule');
    this.#missingBlocks = 0;
    const builder = new StepBuilder(this.#options.maxNumBatchedTokens);
    this.#scheduleRunning(builder);
    if (builder.preempted.length === 0) this.#admitReady(builder);
    if (builder.preempted.length === 0) this.#admitWaiting(builder);
    const step = builder.build(this.#connector?.buildConnectorMeta(builder.scheduled));
    if (step.entries.length > 0) this.#step = step;
    return step;
  }

  /** The step has run: takes its tokens in. Throws INTERNAL, the step still under way, where `result` lacks one. */
  update(step: SchedulerStep, result: ForwardResult): RequestOutput[] {
    const sampled = new Map(result.sampled.map((token) => [token.sequenceId, token]));
    const { failed = new Map<string, ErrorData>() } = result;
    for (const { sequence, sampled: expected } of step.entries) {
      if (expected && !sampled.has(sequence.id) && !failed.has(sequence.id)) {
        throw new PdError('INTERNAL', `the executor sampled no token for ${sequence.id}`);
      }
    }
    this.#closeStep(step);
    const outputs: RequestOutput[] = [];
    for (const { sequence, numTokens, sampled: expected } of step.entries) {
      this.#advance(sequence, sequence.numComputed + numTokens);
      if (sequence.needsPromptLogprobs) {
        sequence.promptLogprobs.push(...(result.promptLogprobs.get(sequence.id) ?? []));
      }
      const token = expected ? sampled.get(sequence.id) : undefined;
      if (token) outputs.push(this.#sampled(sequence, token));
    }
    // After all have been advanced: it ends the others of its request too.
    for (const { sequence } of step.entries) {
      const error = failed.get(sequence.id);
      if (!error) continue;
      // What was asked for leaves no token, at the other end of the pair neither: nobody will decode it.
      sequence.group.aborted = true;
      outputs.push(...this.#pool.endGroup(sequence.group, 'error', error));
    }
    return outputs;
  }

  /** The step could not be run: its requests end with `error`, all others go on. */
  failStep(step: SchedulerStep, error: ErrorData): RequestOutput[] {
    this.#closeStep(step);
    return step.entries.flatMap(({ sequence }) => this.#pool.endGroup(sequence.group, 'error', error));
  }

  /**
   * A load that metadata requested has ended, one way or another. Nothing can write to its blocks any more, unless it says that they
   * are quarantined. With the first token that came along the request is past its prompt; without, it computes the last position itself.
   */
  loadEnded(outcome: LoadOutcome, policy: LoadFailurePolicy): RequestOutput[] {
    const sequence = this.#pool.loading.get(outcome.requestId);
    if (!sequence) return [];
    const { group } = sequence;
    group.loading = false;
    if (outcome.ok) return this.#loaded(sequence, outcome.draw);
    const wanted = group.live > 0;
    const fails = wanted && policy === 'fail';
    sequence.numLoaded = 0;
    if (wanted) this.#connector?.loadFailed(outcome.requestId);
    if (sequence.silent) {
      this.#pool.endSilently(sequence);
      if (!fails) this.#pool.promoteFollower(group);
    } else if (outcome.quarantined) {
      this.#pool.restart(sequence);
    } else {
      this.#pool.move(sequence, 'ready');
    }
    return fails ? this.#pool.endGroup(group, 'error', outcome.error) : [];
  }

  /** Requests that are over since the last call: what the transfer engine holds for them may go. */
  takeFinished(): FinishedRequest[] {
    return this.#pool.takeFinished();
  }

  /** What has entered and left the prefix cache since the last call, in order. */
  takeCacheChanges(): readonly CacheChange[] {
    return this.#cacheChanges?.splice(0) ?? [];
  }

  /** Ends every request, each completion with `error`. */
  endAll(error: ErrorData): RequestOutput[] {
    if (this.#step) this.#closeStep(this.#step);
    return this.#pool.groups().flatMap((group) => this.#pool.endGroup(group, 'error', error));
  }

  /** What is wrong, in words; empty when all is well. Holds between steps. */
  checkIntegrity(): string[] {
    return this.#pool.checkIntegrity();
  }

  #loaded(sequence: Sequence, draw: FirstDraw): RequestOutput[] {
    const { group, promptLength, numCached } = sequence;
    const first = sequence.silent ? undefined : firstToken(sequence, draw);
    // The last position's KV may be there too, and is of no use without what was drawn from it.
    sequence.numLoaded = Math.min(sequence.numLoaded, promptLength - numCached - (first ? 0 : 1));
    this.#advance(sequence, numCached + sequence.numLoaded);
    if (sequence.silent) {
      this.#pool.forkFollowers(sequence);
      this.#pool.endSilently(sequence);
      this.#pool.promoteFollower(group);
      return [];
    }
    this.#pool.move(sequence, 'ready');
    if (first) return [this.#sampled(sequence, first)];
    this.#pool.forkFollowers(sequence);
    return [];
  }

  #sampled(sequence: Sequence, token: SampledToken): RequestOutput {
    const { grammar } = sequence.group.request.sampling;
    const isLast =
      grammar !== undefined && this.#options.isLastToken?.(grammar, sequence, token.token) === true;
    const output = sampledOutput(sequence, token, this.#maxLength, isLast);
    // Before the leader may end: its blocks are what the others share.
    if (sequence.isLeader) this.#pool.forkFollowers(sequence);
    if (output.finishReason) this.#pool.end(sequence);
    return output;
  }

  #scheduleRunning(builder: StepBuilder): void {
    const { running, blocks } = this.#pool;
    for (let i = 0; i < running.length && builder.budget > 0; i++) {
      const sequence = running.at(i)!;
      const numTokens = Math.min(sequence.numRemaining, builder.budget);
      const needed = sequence.numComputed + numTokens;
      while (sequence.state === 'running' && !blocks.canAppend(sequence.id, needed)) {
        this.#preempt(this.#pool.victim() ?? sequence, builder);
      }
      // Only the last to come is preempted, so whoever comes after a preempted one is gone from the queue too.
      if (sequence.state !== 'running') return;
      this.#addToStep(sequence, builder);
    }
  }

  #admitReady(builder: StepBuilder): void {
    const { ready, blocks } = this.#pool;
    while (this.#hasPlace(builder)) {
      const sequence = ready.at(0);
      if (!sequence) return;
      const needed = sequence.numComputed + Math.min(sequence.numRemaining, builder.budget);
      while (!blocks.canAppend(sequence.id, needed)) {
        const victim = ready.last;
        if (!victim || victim === sequence) {
          this.#missingBlocks =
            blocks.blocksFor(needed) - blocks.tableOf(sequence.id).length - blocks.numFree;
          return;
        }
        this.#preempt(victim, builder);
      }
      this.#pool.move(sequence, 'running');
      this.#addToStep(sequence, builder);
    }
  }

  #admitWaiting(builder: StepBuilder): void {
    const { waiting, running, blocks } = this.#pool;
    for (let i = 0; i < waiting.length; ) {
      const hasPlace = this.#hasPlace(builder);
      if (!hasPlace && !this.#connector) return;
      const sequence = waiting.at(i)!;
      const cached = this.#lookup(sequence);
      const numLocal = cached.length * blocks.blockSize;
      const request = sequence.connectorRequest();
      const connector = sequence.isLeader ? this.#connector : undefined;
      const numExternal = connector?.getNumNewMatchedTokens(request, numLocal) ?? 0;
      if (numExternal === 0 && !hasPlace) {
        i++; // no place in the batch, but loads of those behind may start
        continue;
      }
      // One block for each running sequence to grow into: admitting up to the last block would preempt at once.
      const missing = blocks.missing(sequence.length, cached, running.length);
      if (missing > 0) {
        this.#missingBlocks = missing;
        return;
      }
      const table = blocks.allocate(sequence.id, sequence.length, cached);
      connector?.updateStateAfterAlloc(request, table, numLocal, numExternal);
      if (this.#mayUseCache(sequence)) this.#pool.countLookup(sequence, numLocal);
      sequence.numComputed = numLocal;
      sequence.numCached = Math.min(numLocal, sequence.promptLength);
      sequence.numLoaded = numExternal;
      sequence.group.loading ||= numExternal > 0;
      this.#pool.move(sequence, numExternal > 0 ? 'loading' : 'running');
      if (numExternal === 0) this.#addToStep(sequence, builder);
    }
  }

  #hasPlace(builder: StepBuilder): boolean {
    return this.#pool.running.length < this.#options.maxNumSeqs && builder.budget > 0;
  }

  /** Cached blocks of a sequence; its last known token is always computed, for its logits. */
  #lookup(sequence: Sequence): readonly number[] {
    if (!this.#mayUseCache(sequence)) return [];
    return this.#pool.blocks.lookup(sequence.hashes(this.#options.blockSize), sequence.length - 1);
  }

  #mayUseCache(sequence: Sequence): boolean {
    return this.#options.enablePrefixCaching && !sequence.needsPromptLogprobs;
  }

  /** `sequence` is running and its blocks suffice or can be had. */
  #addToStep(sequence: Sequence, builder: StepBuilder): void {
    const { blocks } = this.#pool;
    const numTokens = Math.min(sequence.numRemaining, builder.budget);
    blocks.append(sequence.id, sequence.numComputed + numTokens);
    builder.add(sequence, numTokens, blocks.tableOf(sequence.id));
  }

  #preempt(sequence: Sequence, builder: StepBuilder): void {
    builder.preempted.push(sequence.group.request.requestId);
    this.#pool.preempt(sequence);
  }

  /** The KV of the first `numComputed` tokens is there. */
  #advance(sequence: Sequence, numComputed: number): void {
    sequence.numComputed = numComputed;
    if (!this.#options.enablePrefixCaching) return;
    const { blocks } = this.#pool;
    const { blockSize } = blocks;
    const hashes = sequence.hashes(blockSize);
    for (const { first, end } of blocks.commit(sequence.id, hashes, numComputed)) {
      const parent = hashes[first - 1];
      this.#cacheChanges?.push({
        type: 'stored',
        hashes: hashes.slice(first, end),
        ...(parent !== undefined && { parent }),
        tokens: sequence.tokens(first * blockSize, end * blockSize),
      });
    }
  }

  #closeStep(step: SchedulerStep): void {
    if (this.#step !== step) throw new PdError('INTERNAL', 'this step is not under way');
    this.#step = undefined;
    for (const { sequence } of step.entries) {
      if (sequence.copy) this.#pool.blocks.releaseCopy(sequence.copy);
      sequence.copy = undefined;
    }
  }

  #assertNoStep(what: string): void {
    if (this.#step) throw new PdError('INTERNAL', `${what} while a step is under way`);
  }
}

/** What the producer drew for the first completion, where that is all that its output needs. */
function firstToken(sequence: Sequence, draw: FirstDraw): SampledToken | undefined {
  const token = draw?.tokens[sequence.index];
  const logprob = draw?.logprobs?.[sequence.index];
  if (token === undefined) return undefined;
  if (sequence.group.request.sampling.logprobs === undefined) return { sequenceId: sequence.id, token };
  return logprob && { sequenceId: sequence.id, token, logprob };
}

/** Throws REQUEST_INVALID, or CONTEXT_EXCEEDED where the prompt and one token can never fit. */
function validateRequest(request: CoreRequest, limits: SequenceLimits): void {
  const { requestId, promptTokens, n } = request;
  const invalid = (what: string) =>
    new PdError('REQUEST_INVALID', `request ${requestId} ${what}`, { requestId });
  if (promptTokens.length === 0) throw invalid('has an empty prompt');
  if (!Number.isSafeInteger(n) || n < 1) throw invalid(`asks for ${n} completions`);
  if (promptTokens.length < maxSequenceLength(limits)) return;
  throw new PdError(
    'CONTEXT_EXCEEDED',
    `the prompt has ${promptTokens.length} tokens; with at least one more it must fit the context of ` +
      `${limits.maxModelLen} and the KV cache of ${limits.numBlocks} blocks of ${limits.blockSize}`,
    { requestId },
  );
}
