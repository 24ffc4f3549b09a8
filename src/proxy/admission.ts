/**
 * Who may begin, who waits and who is turned away, where a proxy has limits on what is under way (docs/routing.md, "Limits"). Pure but for
 * the timer of each that waits.
 *
 *   enter --(room)--> under way --release--> the next in the queue
 *     |                  ^
 *     +--(none)--> queue +    by class, the lowest number first; within it by key, the one served least; within that first come
 *                    |
 *                    +--> OVERLOADED: the queue is full and nobody in it has less claim to a place, or it has waited too long
 */
import type { Signal } from '../deferred.ts';
import { PdError } from '../errors.ts';
import { plural } from '../observability/bytes.ts';

export interface AdmissionLimits {
  /** Requests under way; 0: any number. */
  readonly requests: number;
  /** Prompt tokens of requests under way; 0: any number. One request goes through however long it is. */
  readonly tokens: number;
  /** Requests in the queue. */
  readonly queued: number;
  /** How long one may stand there, ms. */
  readonly waitMs: number;
}

export interface Entrant {
  /** Whose requests share alike with those of others. */
  readonly key: string;
  /** Lower comes first. */
  readonly priority: number;
  readonly tokens: number;
  readonly signal: Signal;
}

interface Waiting extends Entrant {
  readonly resolve: (release: () => void) => void;
  readonly reject: (error: unknown) => void;
  readonly leave: () => void;
}

/** What one key has under way and in the queue, and has been given: the least of `given` is next. */
interface Account {
  /** Tokens, from where the others stood when it came. */
  given: number;
  running: number;
  queued: number;
}

/** By classes in order, and in each by key. */
type Line = Map<number, Map<string, Waiting[]>>;

/** Of the time that requests take, what the latest counts for. */
const LEARNT_SHARE = 0.1;
const LONGEST_RETRY_S = 60;

export class Admission {
  readonly #limits: AdmissionLimits;
  readonly #now: () => number;
  readonly #onTurnedAway: (reason: 'full' | 'displaced' | 'late') => void;
  readonly #line: Line = new Map();
  readonly #accounts = new Map<string, Account>();
  #requests = 0;
  #tokens = 0;
  #queued = 0;
  /** What one takes; undefined until one has ended. */
  #tookMs: number | undefined;

  constructor(
    limits: AdmissionLimits,
    onTurnedAway: (reason: 'full' | 'displaced' | 'late') => void = () => {},
    now: () => number = () => performance.now(),
  ) {
    this.#limits = limits;
    this.#onTurnedAway = onTurnedAway;
    this.#now = now;
  }

  get underWay(): number {
    return this.#requests;
  }

  get queued(): number {
    return this.#queued;
  }

  /**
   * Resolves, once it may begin, with what is to be called when it is over. Throws OVERLOADED, or the signal's reason where that fires
   * while it waits.
   */
  enter(entrant: Entrant): Promise<() => void> {
    if (this.#queued === 0 && this.#fits(entrant)) return Promise.resolve(this.#begin(entrant));
    if (this.#queued >= this.#limits.queued && !this.#displaceFor(entrant)) {
      this.#onTurnedAway('full');
      return Promise.reject(this.#overloaded('the queue is full'));
    }
    return new Promise((resolve, reject) => this.#wait(entrant, resolve, reject));
  }

  #fits({ tokens }: Entrant): boolean {
    const { requests: most, tokens: mostTokens } = this.#limits;
    if (this.#requests === 0) return true;
    return (most === 0 || this.#requests < most) && (mostTokens === 0 || this.#tokens + tokens <= mostTokens);
  }

  #begin({ key, tokens }: Entrant): () => void {
    const account = this.#accountOf(key);
    const beganMs = this.#now();
    account.running++;
    // A short request takes a place, too.
    account.given += tokens + 1;
    this.#requests++;
    this.#tokens += tokens;
    let over = false;
    return () => {
      if (over) return;
      over = true;
      account.running--;
      this.#close(key, account);
      this.#requests--;
      this.#tokens -= tokens;
      this.#learn(this.#now() - beganMs);
      this.#admit();
    };
  }

  #wait(entrant: Entrant, resolve: Waiting['resolve'], reject: Waiting['reject']): void {
    const { key, priority, signal } = entrant;
    const give = (error: unknown) => {
      this.#remove(waiting);
      reject(error);
    };
    const onAbort = () => give(signal.reason);
    const timer = setTimeout(() => {
      this.#onTurnedAway('late');
      give(this.#overloaded(`this one has waited ${this.#limits.waitMs} ms in the queue`));
    }, this.#limits.waitMs);
    const leave = () => {
      clearTimeout(timer);
      signal.removeEventListener('abort', onAbort);
    };
    const waiting: Waiting = { ...entrant, resolve, reject, leave };
    const keys = this.#line.get(priority) ?? new Map<string, Waiting[]>();
    this.#line.set(priority, keys);
    const own = keys.get(key) ?? [];
    keys.set(key, own);
    own.push(waiting);
    this.#accountOf(key).queued++;
    this.#queued++;
    if (signal.aborted) onAbort();
    else signal.addEventListener('abort', onAbort, { once: true });
  }

  /** Makes room in the queue at the cost of the last of whoever has most there, in the last class; false where that is the newcomer. */
  #displaceFor({ key, priority }: Entrant): boolean {
    const last = Math.max(...this.#line.keys());
    if (this.#queued === 0 || priority > last) return false;
    let most: Waiting[] = [];
    for (const own of this.#line.get(last)!.values()) if (own.length > most.length) most = own;
    const own = this.#line.get(last)!.get(key)?.length ?? 0;
    if (priority === last && own + 1 >= most.length) return false;
    const displaced = most.at(-1)!;
    this.#remove(displaced);
    this.#onTurnedAway('displaced');
    displaced.reject(this.#overloaded('a request with precedence took its place in the queue'));
    return true;
  }

  #admit(): void {
    while (this.#queued > 0) {
      const next = this.#next();
      if (!this.#fits(next)) return;
      // In this order, so that its account goes on.
      const release = this.#begin(next);
      this.#remove(next);
      next.resolve(release);
    }
  }

  /** There is one. Whoever is first keeps the place though others would fit before: a long prompt comes through. */
  #next(): Waiting {
    const first = this.#line.get(Math.min(...this.#line.keys()))!;
    let next: Waiting[] | undefined;
    let least = Number.POSITIVE_INFINITY;
    for (const [key, own] of first) {
      const { given } = this.#accountOf(key);
      if (given >= least) continue;
      least = given;
      next = own;
    }
    return next![0]!;
  }

  #remove(waiting: Waiting): void {
    const { key, priority } = waiting;
    const keys = this.#line.get(priority)!;
    const own = keys.get(key)!;
    own.splice(own.indexOf(waiting), 1);
    if (own.length === 0) keys.delete(key);
    if (keys.size === 0) this.#line.delete(priority);
    waiting.leave();
    this.#queued--;
    const account = this.#accountOf(key);
    account.queued--;
    this.#close(key, account);
  }

  /** Who comes anew begins where those stand that are here: what it did not use before does not let it pass them for long. */
  #accountOf(key: string): Account {
    const known = this.#accounts.get(key);
    if (known) return known;
    let given = Number.POSITIVE_INFINITY;
    for (const account of this.#accounts.values()) given = Math.min(given, account.given);
    const account: Account = { given: Number.isFinite(given) ? given : 0, running: 0, queued: 0 };
    this.#accounts.set(key, account);
    return account;
  }

  #close(key: string, { running, queued }: Account): void {
    if (running === 0 && queued === 0) this.#accounts.delete(key);
  }

  #learn(tookMs: number): void {
    this.#tookMs ??= tookMs;
    this.#tookMs += (tookMs - this.#tookMs) * LEARNT_SHARE;
  }

  /** With when the queue will have been served, as far as can be told. */
  #overloaded(why: string): PdError {
    const { requests, tokens } = this.#limits;
    const limits = [
      requests > 0 && plural(requests, 'request'),
      tokens > 0 && plural(tokens, 'prompt token'),
    ];
    const most = limits.filter(Boolean).join(' or ');
    const turns = (this.#queued + 1) / Math.max(1, this.#requests);
    const seconds = Math.ceil(((this.#tookMs ?? 0) * turns) / 1_000);
    const retryAfter = Math.min(LONGEST_RETRY_S, Math.max(1, seconds));
    return new PdError('OVERLOADED', `the limit is ${most} at a time, and ${why}`, { retryAfter });
  }
}
