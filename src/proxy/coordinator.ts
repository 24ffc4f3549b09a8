/**
 * What all requests of a proxy share: who may begin, which pair each goes to, and what becomes of that. One process has it; relay processes
 * (--workers) ask it over their channels (relay-process.ts).
 */
import type { ProxyConfig } from '../config/proxy-config.ts';
import type { Signal } from '../deferred.ts';
import { PdError } from '../errors.ts';
import { plural } from '../observability/bytes.ts';
import type { Admission } from './admission.ts';
import type { PromptFacts, WantedKeys } from './body.ts';
import type { PromptCaches } from './caches.ts';
import type { ProxyMetrics } from './metrics.ts';
import { type Choices, type PromptToPlace, soonerAlone } from './placement.ts';
import type { Instance, InstancePair, InstanceRegistry, InstanceRole, Missing } from './registry.ts';
import type { InstanceTally, Outcome } from './tally.ts';

/** How long other instances are preferred to one that refused a connection. */
const QUARANTINE_MS = 3_000;
/** Retries may be a fifth of the requests. */
const RETRY_SHARE = 0.2;
/** Retries that may be saved up, and that there are at first. */
const MOST_SAVED = 50;
/** Of one request. */
const MOST_RETRIES = 3;
const BACKOFF_MS = 25;

/** What is asked for a request. Plain data. */
export interface Wish {
  /** Whose requests share alike with those of others. */
  readonly key: string;
  /** Lower comes first. */
  readonly priority: number;
  readonly session?: string | undefined;
  readonly prompt: PromptFacts;
}

/** Where a request goes, and what its pair is to do. Plain data. */
export interface Placement {
  readonly pair: InstancePair;
  /** The consumer computes it, and the producer is not asked at all. */
  readonly alone: boolean;
  /** The producer is not busy: its consumer may be asked at once. */
  readonly early: boolean;
  /** Whether each of them takes the ids of a prompt that has been tokenized here. */
  readonly takesIds: Readonly<Record<InstanceRole, boolean>>;
  /** How many tokens of the prompt each of them was thought to have cached; 0 of a producer that is not asked. */
  readonly cachedTokens: Readonly<Record<InstanceRole, number>>;
  /** How the pair was chosen. */
  readonly choices: Choices;
}

/** One request, from its turn to its end. Those that return nothing return at once. */
export interface Visit {
  /** Numbers the requests in the log, from 0. */
  readonly count: number;
  /** For its turn, ms. */
  readonly queuedMs: number;
  readonly placement: Placement;
  /** That placement's producer has no more to do for it; with how long it took where it did it. */
  prefilled(placement: Placement, tookMs?: number): void;
  /**
   * That placement's instance has answered well, or not: an error of the server speaks against it, one of the request does not.
   * `firstEventMs`: of a streamed answer, from the request's arrival to its first event.
   */
  judge(placement: Placement, role: InstanceRole, ok: boolean, firstEventMs?: number): void;
  /** One of the pair has not taken it. Resolves with another pair, after a pause; with undefined where there is none, or no retry left. */
  retry(refused: InstanceRole): Promise<Placement | undefined>;
  /** It is over. Idempotent. */
  end(): void;
}

export interface Coordinator {
  /** What is to be known of prompts. */
  readonly wanted: WantedKeys;
  /** Resolves once it may begin. Throws OVERLOADED, NO_INSTANCE, or the reason of `signal`. End the visit. */
  enter(wish: Wish, signal: Signal): Promise<Visit>;
}

interface CoordinatorParts {
  readonly config: ProxyConfig;
  readonly registry: InstanceRegistry;
  readonly caches: PromptCaches;
  readonly admission: Admission;
  readonly metrics: ProxyMetrics;
}

/** How much of what this proxy does may be trying again, so that instances that fail are not buried under retries. */
export class RetryBudget {
  #left = MOST_SAVED;

  /** A request has come. */
  earn(): void {
    this.#left = Math.min(MOST_SAVED, this.#left + RETRY_SHARE);
  }

  /** False where no retry is left. */
  spend(): boolean {
    if (this.#left < 1) return false;
    this.#left--;
    return true;
  }
}

export class LocalCoordinator implements Coordinator {
  readonly #parts: CoordinatorParts;
  readonly #retries = new RetryBudget();
  #count = 0;

  constructor(parts: CoordinatorParts) {
    this.#parts = parts;
  }

  get wanted(): WantedKeys {
    return this.#parts.caches.wanted;
  }

  async enter(wish: Wish, signal: Signal): Promise<Visit> {
    const { admission, metrics } = this.#parts;
    const { key, priority, prompt } = wish;
    const cameMs = performance.now();
    const release = await admission.enter({ key, priority, tokens: prompt.tokens, signal });
    const queuedMs = performance.now() - cameMs;
    metrics.queueSeconds.observe(queuedMs / 1_000);
    this.#retries.earn();
    try {
      const turn = { count: this.#count++, queuedMs, release };
      return new LocalVisit(this.#parts, this.#retries, wish, turn);
    } catch (error) {
      release();
      throw error;
    }
  }
}

interface Turn extends Pick<Visit, 'count' | 'queuedMs'> {
  /** Lets the next one in. */
  readonly release: () => void;
}

class LocalVisit implements Visit {
  readonly count: number;
  readonly queuedMs: number;
  placement: Placement;
  readonly #parts: CoordinatorParts;
  readonly #retries: RetryBudget;
  readonly #wish: Wish;
  readonly #release: () => void;
  /** HTTP addresses of instances that did not take it. */
  readonly #exclude = new Set<string>();
  #leaveProducer: (() => void) | undefined;
  #leaveConsumer: (() => void) | undefined;
  /** The prompt has been computed there, or will not be. */
  #computed: (() => void)[] = [];
  /** Tokens that the producer had to compute before and for it. */
  #ahead = 0;
  #over = false;
  #choices: Choices = {};

  /** Throws NO_INSTANCE. */
  constructor(parts: CoordinatorParts, retries: RetryBudget, wish: Wish, turn: Turn) {
    const { count, queuedMs, release } = turn;
    this.count = count;
    this.queuedMs = queuedMs;
    this.#parts = parts;
    this.#retries = retries;
    this.#wish = wish;
    this.#release = release;
    const pair = this.#pair();
    if (typeof pair === 'string') throw noPair(pair, parts.registry);
    this.placement = this.#place(pair);
  }

  prefilled(placement: Placement, tookMs?: number): void {
    if (!this.#leaveProducer || placement !== this.placement) return;
    this.#leaveProducer();
    this.#leaveProducer = undefined;
    if (tookMs === undefined) return;
    const { registry } = this.#parts;
    const { producer } = placement.pair;
    registry.learn(producer, this.#ahead, tookMs);
    registry.standing(producer)?.tally.prefill.observe(tookMs / 1_000);
    this.judge(placement, 'producer', true);
  }

  judge({ pair }: Placement, role: InstanceRole, ok: boolean, firstEventMs?: number): void {
    const tally = this.#judge(pair[role], ok, ok ? 'success' : 'failure');
    if (firstEventMs !== undefined) tally?.firstEvent.observe(firstEventMs / 1_000);
  }

  async retry(refused: InstanceRole): Promise<Placement | undefined> {
    const { registry, metrics } = this.#parts;
    const instance = this.placement.pair[refused];
    const { httpAddress } = instance;
    const tally = this.#judge(instance, false, 'refused');
    this.#leave();
    registry.quarantine(httpAddress, QUARANTINE_MS);
    this.#exclude.add(httpAddress);
    if (this.#exclude.size > MOST_RETRIES) return undefined;
    if (!this.#retries.spend()) {
      metrics.retries.inc({ result: 'over_budget' });
      return undefined;
    }
    metrics.retries.inc({ result: 'tried' });
    metrics.replaced.inc();
    if (tally) tally.retries++;
    await pause(backoffMs(this.#exclude.size));
    if (this.#over) return undefined;
    const pair = this.#pair();
    if (typeof pair === 'string') return undefined;
    this.placement = this.#place(pair);
    return this.placement;
  }

  end(): void {
    if (this.#over) return;
    this.#over = true;
    this.#leave();
    this.#release();
  }

  #judge(instance: Instance, ok: boolean, outcome: Outcome): InstanceTally | undefined {
    const standing = this.#parts.registry.standing(instance);
    if (!standing) return undefined;
    const { breaker, tally } = standing;
    if (ok) breaker.succeeded();
    else breaker.failed();
    tally.outcomes[outcome]++;
    return tally;
  }

  #leave(): void {
    this.#leaveProducer?.();
    this.#leaveConsumer?.();
    this.#leaveProducer = this.#leaveConsumer = undefined;
    for (const computed of this.#computed.splice(0)) computed();
  }

  #pair(): InstancePair | Missing {
    const { registry, caches } = this.#parts;
    const { session, prompt: facts } = this.#wish;
    const prompt: PromptToPlace = {
      tokens: facts.tokens,
      session,
      cached: (address) => caches.cached(address, facts),
    };
    this.#choices = {};
    return registry.pair({ model: facts.model, exclude: this.#exclude, prompt, choices: this.#choices });
  }

  /** Notes what the pair is given, and decides whether its consumer needs the producer. */
  #place(pair: InstancePair): Placement {
    const { config, registry, metrics, caches } = this.#parts;
    const { producer, consumer } = pair;
    const takesIds = { producer: caches.takesIds(producer), consumer: caches.takesIds(consumer) };
    const { prompt } = this.#wish;
    const left = this.#uncached(consumer);
    const uncached = this.#uncached(producer);
    const bypass = this.#bypass(pair, { producer: uncached, consumer: left });
    const alone = bypass !== undefined;
    const { tokens } = prompt;
    const why = { takesIds, choices: this.#choices };
    this.#tally(consumer, left);
    const decode = registry.standing(consumer);
    decode?.breaker.chosen();
    this.#leaveConsumer = decode?.work.begin(alone ? left : 0);
    if (alone) {
      metrics.bypassed.inc({ reason: bypass });
      this.#computed.push(caches.sent(consumer, prompt));
      const cachedTokens = { producer: 0, consumer: tokens - left };
      return { pair, alone, early: false, cachedTokens, ...why };
    }
    this.#tally(producer, uncached);
    this.#computed.push(caches.sent(consumer, prompt), caches.sent(producer, prompt));
    const prefill = registry.standing(producer);
    prefill?.breaker.chosen();
    const early = (prefill?.work.own ?? 0) < config.overlap;
    this.#leaveProducer = prefill?.work.begin(uncached);
    this.#ahead = prefill?.work.queuedTokens ?? 0;
    const cachedTokens = { producer: tokens - uncached, consumer: tokens - left };
    return { pair, alone, early, cachedTokens, ...why };
  }

  /** Why the consumer does without the producer: there is little to compute, or the producer would be late. */
  #bypass(
    { producer, consumer }: InstancePair,
    uncached: Readonly<Record<InstanceRole, number>>,
  ): 'little' | 'wait' | undefined {
    const { config, registry } = this.#parts;
    if (this.#wish.prompt.prompts !== 1 || consumer.fingerprint === undefined) return undefined;
    if (config.bypassTokens > 0 && uncached.consumer <= config.bypassTokens) return 'little';
    const [prefill, decode] = [registry.standing(producer), registry.standing(consumer)];
    if (config.bypassWaitMs === 0 || !prefill || !decode) return undefined;
    return soonerAlone(config.bypassWaitMs, prefill.work, decode.work, uncached) ? 'wait' : undefined;
  }

  #uncached({ httpAddress }: Instance): number {
    const { prompt } = this.#wish;
    return prompt.tokens - this.#parts.caches.cached(httpAddress, prompt);
  }

  #tally(instance: Instance, uncached: number): void {
    const { metrics, registry } = this.#parts;
    const placed = metrics.placedTokens[instance.role];
    const cached = this.#wish.prompt.tokens - uncached;
    if (cached > 0) placed.inc('yes', cached);
    placed.inc('no', uncached);
    const there = registry.standing(instance)?.tally.placed;
    if (!there) return;
    there.requests++;
    there.cached += cached;
    there.uncached += uncached;
  }
}

/** Before the retry of that number, from 1: none before the first, then at random up to 25, 50, 100 ms. `random`: 0 to 1. */
export function backoffMs(retry: number, random: number = Math.random()): number {
  return retry <= 1 ? 0 : random * BACKOFF_MS * 2 ** (retry - 2);
}

function pause(ms: number): Promise<void> | undefined {
  return ms > 0 ? new Promise((resolve) => setTimeout(resolve, ms)) : undefined;
}

function noPair(missing: Missing, registry: InstanceRegistry): PdError {
  const counts = `known now: ${plural(registry.list('producer').length, 'producer')}, ${plural(registry.list('consumer').length, 'consumer')}`;
  if (missing === 'match') {
    return new PdError(
      'NO_INSTANCE',
      `no producer fits a consumer: their fingerprints, model names or send types differ (${counts}); GET /health lists them`,
    );
  }
  const phase = missing === 'producer' ? 'prefill' : 'decode';
  if (registry.list(missing).length > 0)
    return new PdError(
      'NO_INSTANCE',
      `each ${missing} (${phase} instance) that could take the request is being drained (${counts}); POST /admin/drain with "drain": false undoes it`,
    );
  return new PdError('NO_INSTANCE', `no ${missing} (${phase} instance) pings this proxy (${counts})`);
}
