/**
 * A scheduler driven without a model. The executor writes, for every token it computes, a digest of the whole sequence up to it into the
 * token's slot, and checks that each slot of the context it reads holds the digest it should: a block that was reused too early, shared
 * wrongly or loaded badly shows at once. The "model" is a hash of the context, so what every request must generate is known beforehand.
 */
import type { LoadFailurePolicy } from '../../src/config/worker-config.ts';
import type { LoadOutcome } from '../../src/connector/connector.ts';
import type { ConnectorMetadata, LoadMeta, SaveMeta } from '../../src/connector/metadata.ts';
import { NativeHalf, type NativeParts } from '../../src/connector/native-half.ts';
import { type KvRole, P2pSchedulerConnector } from '../../src/connector/scheduler-connector.ts';
import { type BlockHash, extendHashes } from '../../src/kv/block-hash.ts';
import { Scheduler, type SchedulerOptions } from '../../src/scheduler/scheduler.ts';
import { firstTokens, type SchedulerStep } from '../../src/scheduler/step.ts';
import type {
  CacheChange,
  CoreRequest,
  ForwardResult,
  RequestOutput,
  SampledToken,
  SamplingParams,
} from '../../src/scheduler/types.ts';
import { type EngineRequestId, engineRequestId } from '../../src/wire/ids.ts';
import type { TokenLogprob } from '../../src/wire/token-logprob.ts';

const VOCAB = 50;

const SEED = 0x811c9dc5;

function mix(digest: number, token: number): number {
  return Math.imul(digest ^ (token + 0x9e3779b9), 0x01000193) >>> 0;
}

/** Greedy: the context alone decides; else the seed too. */
function sampleFrom(digest: number, index: number, { temperature, seed }: SamplingParams): number {
  const drawn = mix(mix(digest, index), 7);
  return (temperature === 0 ? drawn : mix(drawn, seed)) % VOCAB;
}

/** What completion `index` of a request must say, stop rules applied. */
export function expectedTokens(request: CoreRequest, index: number, maxModelLen: number): number[] {
  const { maxTokens, minTokens, stopTokenIds } = request.sampling;
  let digest = request.promptTokens.reduce(mix, SEED);
  const tokens: number[] = [];
  while (tokens.length < maxTokens && request.promptTokens.length + tokens.length < maxModelLen) {
    const token = sampleFrom(digest, index, request.sampling);
    tokens.push(token);
    digest = mix(digest, token);
    if (tokens.length > minTokens && stopTokenIds.includes(token)) break;
  }
  return tokens;
}

export function requestId(name: string | number, remote: boolean): EngineRequestId {
  const uuid = String(name).padStart(32, '0');
  return engineRequestId(
    remote ? `cmpl-___prefill_addr_10.0.0.1:8082___decode_addr_10.0.0.2:8084_${uuid}-0` : `cmpl-${uuid}-0`,
    'deadbeef',
  );
}

export interface Told {
  readonly request: CoreRequest;
  readonly tokens: number[];
  last?: RequestOutput;
  ends: number;
  first?: RequestOutput;
}

export class SchedulerWorld {
  readonly scheduler: Scheduler;
  readonly options: SchedulerOptions;
  readonly blockSize: number;
  readonly slots: Uint32Array;
  /** By `requestId/index`. */
  readonly told = new Map<string, Told>();
  readonly loads = new Map<EngineRequestId, LoadMeta>();
  readonly saves: { readonly meta: SaveMeta; readonly step: number }[] = [];
  readonly finished: { readonly requestId: EngineRequestId; readonly aborted: boolean }[] = [];
  readonly steps: SchedulerStep[] = [];
  readonly canceled: EngineRequestId[] = [];
  /** Of requests that take the native hand-over. */
  readonly native: NativeHalf | undefined;
  /** By what the scheduler tells of its prefix cache. */
  readonly cached = new Set<BlockHash>();
  /** Tokens up to each block that was ever stored. */
  readonly #prefixes = new Map<BlockHash, readonly number[]>();
  #outcomes: LoadOutcome[] = [];
  preempted = 0;

  /** `native`: the hand-over, where there is one, and how long it may not take what is kept for a consumer, ms. */
  constructor(options: SchedulerOptions, role?: KvRole, native?: Omit<NativeParts, 'blocks'>) {
    this.options = options;
    this.blockSize = options.blockSize;
    const { blockSize } = options;
    const connector = role && new P2pSchedulerConnector({ role, blockSize, native: native !== undefined });
    this.scheduler = new Scheduler({ logCacheChanges: true, ...options }, connector);
    this.native =
      native &&
      new NativeHalf(
        { ...native, blocks: this.scheduler.blockManager },
        {
          loadEnded: (outcome) => this.#outcomes.push(outcome),
          freed: () => {},
          ownRankOf: (peer) => peer,
        },
      );
    this.slots = new Uint32Array(options.numBlocks * options.blockSize);
  }

  add(request: CoreRequest): void {
    this.scheduler.add(request);
    for (let index = 0; index < request.n; index++) {
      this.told.set(`${request.requestId}/${index}`, { request, tokens: [], ends: 0 });
    }
  }

  abort(id: EngineRequestId, index?: number): void {
    this.hear(this.scheduler.abort(id, index));
    this.check();
  }

  /**
   * One whole step, or undefined where there was nothing to run. `fail`: the executor throws after it wrote its KV. `meanwhile`: what
   * happens before the executor has written, and after. `failing`: sequences of it for which no token can be drawn.
   */
  step(
    fail = false,
    meanwhile: () => void = () => {},
    failing: (step: SchedulerStep) => readonly string[] = () => [],
  ): SchedulerStep | undefined {
    const step = this.scheduler.schedule();
    this.check();
    this.preempted += step.preempted.length;
    if (step.metadata) this.#takeMetadata(step.metadata);
    const { missingBlocks } = this.scheduler;
    if (step.entries.length === 0) {
      const room = missingBlocks > 0 && this.native?.makeRoom(missingBlocks) === true;
      return room || step.preempted.length > 0 ? this.step(fail, meanwhile, failing) : undefined;
    }
    this.steps.push(step);
    meanwhile();
    const result = withFailures(this.#forward(step), failing(step));
    this.native?.layer(0);
    meanwhile();
    void this.native?.stepEnded();
    const error = { code: 'INTERNAL', message: 'the executor broke', context: {} } as const;
    if (!fail) this.native?.promptsDrawn(firstTokens(step, result));
    this.hear(fail ? this.scheduler.failStep(step, error) : this.scheduler.update(step, result));
    this.check();
    return step;
  }

  /** Tells the scheduler of native loads that have ended; answers with them. */
  takeOutcomes(policy: LoadFailurePolicy): readonly LoadOutcome[] {
    const outcomes = this.#outcomes;
    this.#outcomes = [];
    for (const outcome of outcomes) this.hear(this.scheduler.loadEnded(outcome, policy));
    this.check();
    return outcomes;
  }

  /** Ends a load: its blocks are written (all of them, junk after the last token), or half of them with rubbish. */
  endLoad(id: EngineRequestId, ok: boolean, policy: 'recompute' | 'fail' = 'recompute'): void {
    const load = this.loads.get(id);
    if (!load) throw new Error(`no load of ${id}`);
    this.loads.delete(id);
    const request = [...this.told.values()].find((told) => told.request.requestId === id)!.request;
    this.#fill(load, request.promptTokens, ok);
    const error = { code: 'KV_LOAD_TIMEOUT', message: 'never came', context: {} } as const;
    const outcome: LoadOutcome = ok
      ? { requestId: id, ok, bytes: 1, milliseconds: 1 }
      : { requestId: id, ok, error, quarantined: false };
    this.hear(this.scheduler.loadEnded(outcome, policy));
    this.check();
  }

  /** Steps, and ends loads, until nothing is left. */
  drain(): void {
    for (let round = 0; this.scheduler.numRequests > 0; round++) {
      if (round > 20_000) throw new Error(`stuck: ${JSON.stringify(this.counts())}`);
      const ran = this.step();
      if (ran) continue;
      const [id] = this.loads.keys();
      if (id) this.endLoad(id, true);
      else if (this.scheduler.numRequests > 0) throw new Error(`stalled: ${JSON.stringify(this.counts())}`);
    }
    this.finished.push(...this.scheduler.takeFinished());
  }

  counts(): object {
    const { numRunning, numWaiting, numLoading, numRequests, blocks } = this.scheduler;
    return { numRunning, numWaiting, numLoading, numRequests, blocks };
  }

  hear(outputs: readonly RequestOutput[]): void {
    for (const output of outputs) {
      const told = this.told.get(`${output.requestId}/${output.index}`);
      if (!told) throw new Error(`output for ${output.requestId}/${output.index}, which nobody asked for`);
      if (told.ends > 0) throw new Error(`${output.requestId}/${output.index} spoke after its end`);
      told.tokens.push(...output.tokens);
      const wanted = told.request.sampling.logprobs !== undefined ? output.tokens : [];
      const said = (output.logprobs ?? []).map(({ token }) => token);
      if (`${said}` !== `${wanted}`) throw new Error(`${output.requestId} has log-probabilities of ${said}`);
      told.first ??= output;
      if (output.finishReason) {
        told.ends++;
        told.last = output;
      }
    }
    for (const finished of this.scheduler.takeFinished()) {
      this.finished.push(finished);
      this.native?.requestFinished(finished);
    }
  }

  check(): void {
    const problems = this.scheduler.checkIntegrity();
    if (problems.length > 0) throw new Error(problems.join('; '));
    // where the test does not look at them itself
    if (this.options.logCacheChanges !== undefined) return;
    for (const change of this.scheduler.takeCacheChanges()) this.#replay(change);
  }

  /** Whoever follows the prefix cache by what it is told knows each block once, behind its parent, of the tokens that it stands for. */
  #replay(change: CacheChange): void {
    if (change.type === 'removed') {
      if (!this.cached.delete(change.hash)) throw new Error(`${change.hash} is removed and was not stored`);
      return;
    }
    const { hashes, parent, tokens } = change;
    if (tokens.length !== hashes.length * this.blockSize) throw new Error('stored blocks are not full');
    const told: BlockHash[] = [];
    const before = parent === undefined ? [] : this.#prefixes.get(parent);
    if (!before) throw new Error(`${parent} is a parent that was never stored`);
    const known = [...before, ...tokens];
    extendHashes(told, Int32Array.from(known), this.blockSize);
    for (const [i, hash] of hashes.entries()) {
      const end = before.length + (i + 1) * this.blockSize;
      if (told[end / this.blockSize - 1] !== hash) throw new Error(`${hash} is not of its tokens`);
      if (this.cached.has(hash)) throw new Error(`${hash} is stored twice`);
      this.cached.add(hash);
      this.#prefixes.set(hash, known.slice(0, end));
    }
  }

  #takeMetadata(metadata: ConnectorMetadata): void {
    for (const load of metadata.loads) {
      if (this.loads.has(load.requestId)) throw new Error(`${load.requestId} is loaded twice`);
      this.loads.set(load.requestId, load);
    }
    this.canceled.push(...metadata.cancels);
    this.native?.start(metadata);
    for (const meta of metadata.saves) this.saves.push({ meta, step: this.steps.length });
  }

  #fill(load: LoadMeta, prompt: Int32Array, ok: boolean): void {
    let digest = SEED;
    for (let position = 0; position < load.blockIds.length * this.blockSize; position++) {
      digest = mix(digest, prompt[position] ?? 0);
      const block = Math.floor(position / this.blockSize);
      if (block < load.skipBlocks) continue;
      const slot = load.blockIds[block]! * this.blockSize + (position % this.blockSize);
      if (ok) this.slots[slot] = position < prompt.length ? digest : 0xdead;
      else if (position % 2 === 0) this.slots[slot] = 0xbad;
    }
  }

  #forward(step: SchedulerStep): ForwardResult {
    const { blockSize, slots } = this;
    const sampled: SampledToken[] = [];
    const promptLogprobs = new Map<string, TokenLogprob[]>();
    let tokens = 0;
    for (const { source, target } of step.batch.blockCopies) {
      slots.copyWithin(target * blockSize, source * blockSize, (source + 1) * blockSize);
    }
    const seen = new Set<string>();
    // All writes of the step first: a sequence that reads what another of the same step overwrites must be caught.
    for (const { sequenceId, tokens: input, start, blockTable } of step.batch.sequences) {
      if (seen.has(sequenceId)) throw new Error(`${sequenceId} is in the step twice`);
      seen.add(sequenceId);
      if (input.length === 0) throw new Error(`${sequenceId} is in the step with nothing to compute`);
      tokens += input.length;
      let digest = start === 0 ? SEED : slots[slotOf(blockTable, start - 1, blockSize)]!;
      input.forEach((token, i) => {
        digest = mix(digest, token);
        slots[slotOf(blockTable, start + i, blockSize)] = digest;
      });
    }
    for (const sequence of step.batch.sequences) {
      const { sequenceId, requestId: id, start, blockTable, sample } = sequence;
      const index = sequenceId === id ? 0 : Number(sequenceId.slice(id.length + 1));
      const told = this.told.get(`${id}/${index}`)!;
      const known = [...told.request.promptTokens, ...told.tokens];
      const end = start + sequence.tokens.length;
      let digest = SEED;
      for (let position = 0; position < end; position++) {
        digest = mix(digest, known[position]!);
        if (slots[slotOf(blockTable, position, blockSize)] !== digest) {
          throw new Error(`${sequenceId} reads wrong KV at position ${position} of ${end}`);
        }
      }
      if ((sample !== undefined) !== (end === known.length)) throw new Error(`${sequenceId} samples midway`);
      if (sample && sample.outputPosition !== told.tokens.length) throw new Error(`${sequenceId} lost count`);
      if (sample) {
        const token = sampleFrom(digest, index, sample.params);
        const logprob = sample.params.logprobs !== undefined && { token, logprob: -token, top: [] };
        sampled.push({ sequenceId, token, ...(logprob && { logprob }) });
      }
      const { promptLogprobs: wanted } = sequence;
      if (wanted) {
        wanted.targets.forEach((token, i) => {
          if (known[start + i + 1] !== token) throw new Error(`${sequenceId} has a wrong logprob target`);
        });
        promptLogprobs.set(
          sequenceId,
          Array.from(wanted.targets, (token) => ({ token, logprob: -1, top: [] })),
        );
      }
    }
    const { maxNumBatchedTokens, maxNumSeqs } = this.options;
    if (tokens > maxNumBatchedTokens) throw new Error(`${tokens} tokens in one step`);
    if (seen.size > maxNumSeqs) throw new Error(`${seen.size} sequences in one step`);
    return { sampled, promptLogprobs };
  }
}

function withFailures(result: ForwardResult, ids: readonly string[]): ForwardResult {
  const error = { code: 'REQUEST_INVALID', message: 'no token may be drawn', context: {} } as const;
  const failed = new Map(
    result.sampled.flatMap(({ sequenceId }) => (ids.includes(sequenceId) ? [[sequenceId, error]] : [])),
  );
  const sampled = result.sampled.filter(({ sequenceId }) => !failed.has(sequenceId));
  return { ...result, sampled, failed };
}

function slotOf(blockTable: Int32Array, position: number, blockSize: number): number {
  const block = blockTable[Math.floor(position / blockSize)];
  if (block === undefined) throw new Error(`position ${position} is outside of the block table`);
  return block * blockSize + (position % blockSize);
}
