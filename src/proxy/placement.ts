/**
 * Which of several instances is the best place for a prompt (docs/routing.md). Pure: what is known of each comes in, one of them goes out.
 *
 *   round-robin    the one picked least recently
 *   least-loaded   the one that would be done first, whatever it has cached
 *   session        of one session always the same, as long as it is there; without a session as least-loaded
 *   kv-aware       the one that would be done first, what it has cached taken into account
 *   auto           kv-aware where all of them are pd-workers, which say what they have to do; else round-robin
 *
 * "Done first" is an estimate in milliseconds, and where two are equal the one picked least recently is taken. For a producer it is what
 * it has to compute before and for this prompt; for a consumer what its batch costs, and fetching what it does not have.
 */
import { hash } from 'node:crypto';
import type { Policy } from '../config/proxy-config.ts';
import type { InstanceWork } from './work.ts';

/** What a request to a producer costs beside its prompt (HTTP, its share of a step), in tokens. */
const REQUEST_TOKENS = 64;
/** What a prompt token takes where no instance has been seen to compute any: 8,192 in a second. */
const UNKNOWN_MS = 1_000 / 8_192;
/** Instances that differ by less than this factor from the others on average count as equally fast: it may be chance. */
const DIFFERS = 1.5;
/**
 * What a request pays for each other one in its batch: a step of an 8B is 0.030 (H200) to 0.039 ms (H100) longer for each sequence, measured
 * from batch 1 to 64, and an answer takes some 256 to 330 steps.
 */
const BATCH_MS = 10;
/**
 * Of a token's KV on its way, as of a model of 8B: 128 KiB at 25 GB/s, a link of 200 Gb/s between hosts. On one host it is a tenth of that
 * (measured: 0.4 to 0.8 microseconds), and much of it passes while the prompt is computed: so it decides between consumers that are about
 * equally busy, and no more.
 */
const FETCH_MS = 0.005;
/**
 * What a prompt token takes longer at a consumer, which generates beside it: a step of 512 tokens of an 8B took 17 ms beside some 30 answers, and
 * 11.5 ms alone (H200).
 */
const BESIDE_DECODING = 1.5;
/** A cache filled beyond this soon preempts, which costs seconds. */
const FULL = 0.9;
const FULL_MS = 20_000;

export interface Candidate {
  readonly address: string;
  readonly work: InstanceWork;
  /** A pd-worker. */
  readonly ours: boolean;
  /** Number of the pick it was last taken in: the smallest is next. */
  readonly picked: number;
}

export interface PromptToPlace {
  /** About how many tokens it has. */
  readonly tokens: number;
  /** What requests of one session have in common. */
  readonly session?: string | undefined;
  /** How many tokens, from the first, an instance is thought to have cached. */
  readonly cached: (address: string) => number;
}

/** Why one was chosen: what it was compared with. Plain data. */
export interface Choice {
  /** By which it was. */
  readonly policy: Exclude<Policy, 'auto'>;
  /** How many there were to choose from. */
  readonly considered: number;
  /** The first of them, the chosen one among them or behind. */
  readonly candidates: readonly Compared[];
}

export interface Compared {
  /** Of its HTTP server. */
  readonly address: string;
  /** The smaller was taken; absent where the policy does not go by that. */
  readonly costMs?: number;
  /** Tokens of the prompt that it was thought to have; absent where the policy does not ask. */
  readonly cachedTokens?: number;
}

/** Where `choose` says why. */
export type Choices = Partial<Record<'producer' | 'consumer', Choice>>;

/** That are told of. */
const MOST_COMPARED = 16;

/** `candidates` is not empty. */
export function choose<C extends Candidate>(
  wish: Policy,
  role: 'producer' | 'consumer',
  candidates: readonly C[],
  prompt: PromptToPlace | undefined,
  choices: Choices = {},
): C {
  const auto = candidates.every(({ ours }) => ours) ? 'kv-aware' : 'round-robin';
  const asked = wish === 'auto' ? auto : wish;
  const session = prompt?.session;
  const policy = asked === 'session' && session === undefined ? 'least-loaded' : asked;
  const compared: Compared[] = [];
  const tokens = prompt?.tokens ?? 0;
  const estimates = policy !== 'session' && policy !== 'round-robin';
  const usual = estimates ? usualMs(candidates) : 0;
  const estimate = role === 'producer' ? prefillMs : decodeMs;
  const chosen = least(candidates, ({ address, work }) => {
    if (!estimates) {
      compared.push({ address });
      return policy === 'session' ? -weight(session!, address) : 0;
    }
    const { msPerToken: own = usual } = work;
    const differs = own > usual * DIFFERS || own * DIFFERS < usual;
    const cachedTokens = policy === 'kv-aware' && prompt ? prompt.cached(address) : undefined;
    const costMs = estimate(work, Math.max(0, tokens - (cachedTokens ?? 0)), differs ? own : usual);
    compared.push(cachedTokens === undefined ? { address, costMs } : { address, costMs, cachedTokens });
    return costMs;
  });
  const [own] = compared.splice(MOST_COMPARED).filter(({ address }) => address === chosen.address);
  if (own) compared.push(own);
  choices[role] = { policy, considered: candidates.length, candidates: compared };
  return chosen;
}

/** What a token takes where it is not known: as the others on average, so that one nobody knows is neither sought nor shunned. */
function usualMs(candidates: readonly Candidate[]): number {
  let sum = 0;
  let known = 0;
  for (const { work } of candidates) {
    if (work.msPerToken === undefined) continue;
    sum += work.msPerToken;
    known++;
  }
  return known > 0 ? sum / known : UNKNOWN_MS;
}

function prefillMs(work: InstanceWork, tokens: number, msPerToken: number): number {
  return (work.queuedTokens + work.requests * REQUEST_TOKENS + tokens) * msPerToken;
}

function decodeMs(work: InstanceWork, tokens: number, msPerToken: number): number {
  const full = Math.max(0, work.kvUse - FULL) * FULL_MS;
  return work.requests * BATCH_MS + work.queuedTokens * msPerToken + tokens * FETCH_MS + full;
}

/**
 * Whether `consumer` would have a prompt sooner than `producer`, which would compute others for more than `waitMs` first. `uncached`: tokens of the
 * prompt that are to be computed at either. False as long as nobody has seen how fast the producer is: nothing is known to be late then.
 */
export function soonerAlone(
  waitMs: number,
  producer: InstanceWork,
  consumer: InstanceWork,
  uncached: { readonly producer: number; readonly consumer: number },
): boolean {
  const { msPerToken } = producer;
  if (msPerToken === undefined) return false;
  const wait = prefillMs(producer, 0, msPerToken);
  if (wait <= waitMs) return false;
  const alone = (consumer.queuedTokens + uncached.consumer) * msPerToken * BESIDE_DECODING;
  return alone < wait + uncached.producer * msPerToken;
}

function least<C extends Candidate>(candidates: readonly C[], costOf: (candidate: C) => number): C {
  let best: C | undefined;
  let cost = Number.POSITIVE_INFINITY;
  for (const candidate of candidates) {
    const own = costOf(candidate);
    if (best && (own > cost || (own === cost && candidate.picked >= best.picked))) continue;
    best = candidate;
    cost = own;
  }
  return best!;
}

/** Highest random weight: where an instance goes, only its own sessions move. */
function weight(session: string, address: string): number {
  return Number.parseInt(hash('sha256', `${session}\n${address}`, 'hex').slice(0, 12), 16);
}
