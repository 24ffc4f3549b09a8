/** From logits to a token. Pure: the same logits and the same spec give the same token, on any instance and in any batch. */
import { PdError } from '../errors.ts';
import type { SampleSpec, SamplingParams } from '../scheduler/types.ts';
import type { TokenLogprob } from '../wire/token-logprob.ts';
import { uniform } from './random.ts';
import { isShaped, shaped, shapingOf } from './shaping.ts';

/** The most likely token each time, without log-probabilities: the starting point of checks and measurements. */
export const GREEDY: SamplingParams = {
  temperature: 0,
  topP: 1,
  topK: 0,
  seed: 0,
  maxTokens: 8,
  minTokens: 0,
  stopTokenIds: [],
};

export interface Sampled {
  readonly token: number;
  readonly logprob?: TokenLogprob;
}

/**
 * `logits` [vocab] is left as it is. Greedy at temperature 0; ties go to the lowest id. Log-probabilities are those of the raw logits,
 * before masks, biases, penalties, temperature and cuts. Undefined where what the request asks for bans every token. Throws INTERNAL
 * where logits are not finite, which is a defect of the model.
 */
export function sample(logits: Float32Array, spec: SampleSpec, grammar?: Uint32Array): Sampled | undefined {
  const { params } = spec;
  let usable = logits;
  if (grammar || isShaped(spec)) {
    maximum(logits);
    usable = shaped(logits, shapingOf(spec, logits.length, grammar));
    if (usable.every((logit) => logit === Number.NEGATIVE_INFINITY)) return undefined;
  }
  const token = params.temperature === 0 ? argmax(usable) : draw(usable, spec);
  return params.logprobs === undefined
    ? { token }
    : { token, logprob: logprobOf(logits, token, params.logprobs) };
}

/** For logits from which no token can be sampled: a defect of the model. */
export function noDistribution(what: string): PdError {
  return new PdError('INTERNAL', `${what}: the model computed no usable distribution`);
}

/** Log-probability of `token` and of the `count` most likely tokens, the likeliest first. */
export function logprobOf(logits: Float32Array, token: number, count: number): TokenLogprob {
  const highest = maximum(logits);
  let total = 0;
  for (let i = 0; i < logits.length; i++) total += Math.exp(logits[i]! - highest);
  const norm = highest + Math.log(total);
  const top = highestIds(logits, count).map((id) => ({ token: id, logprob: logits[id]! - norm }));
  return { token, logprob: logits[token]! - norm, top };
}

/** The same for a token of a prompt, with its rank. */
export function promptLogprobOf(logits: Float32Array, token: number, count: number): TokenLogprob {
  const own = logits[token]!;
  let rank = 0;
  for (let i = 0; i < logits.length; i++) if (logits[i]! >= own) rank++;
  return { ...logprobOf(logits, token, count), rank };
}

function maximum(logits: Float32Array): number {
  let highest = Number.NEGATIVE_INFINITY;
  for (let i = 0; i < logits.length; i++) {
    const logit = logits[i]!;
    if (logit <= highest) continue;
    highest = logit;
    // NaN is neither below nor above, and would be lost under the next number.
    if (Number.isNaN(logit)) break;
  }
  if (!Number.isFinite(highest)) {
    throw noDistribution(`the highest of ${logits.length} logits is ${highest}`);
  }
  return highest;
}

function argmax(logits: Float32Array): number {
  return logits.indexOf(maximum(logits));
}

function draw(logits: Float32Array, { params, index, outputPosition }: SampleSpec): number {
  const highest = maximum(logits);
  // Relative to the likeliest, whose weight is 1.
  const { minP = 0 } = params;
  const weights = Float64Array.from(logits, (logit) => {
    const weight = Math.exp((logit - highest) / params.temperature);
    return weight >= minP ? weight : 0;
  });
  const ids = candidates(weights, params);
  let mass = 0;
  for (const id of ids) mass += weights[id]!;
  const target = uniform(params.seed, index, outputPosition) * mass;
  let passed = 0;
  let last = ids[0]!;
  for (const id of ids) {
    if (weights[id] === 0) continue;
    passed += weights[id]!;
    last = id;
    if (passed > target) break;
  }
  return last;
}

/** Ids to draw from, in their order, as on the GPU; of those that min-p has left top-k first, then the smallest set of the likeliest whose share of what is left reaches top-p. */
function candidates(weights: Float64Array, { topK, topP }: SamplingParams): readonly number[] {
  const cutK = topK > 0 && topK < weights.length;
  if (!cutK && topP >= 1) return Array.from(weights.keys());
  if (topP >= 1) return ascending(highestIds(weights, topK));
  const sorted = cutK ? highestIds(weights, topK) : nucleusCandidates(weights, topP);
  let total = 0;
  if (cutK) for (const id of sorted) total += weights[id]!;
  else for (const weight of weights) total += weight;
  let share = 0;
  for (let i = 0; i < sorted.length; i++) {
    share += weights[sorted[i]!]!;
    if (share >= topP * total) return ascending(sorted.slice(0, i + 1));
  }
  return ascending(sorted);
}

function ascending(ids: number[]): number[] {
  return ids.sort((a, b) => a - b);
}

/**
 * The likeliest first, without those that no nucleus reaches: each below (1 - topP) / vocabulary of the total, so that all of them
 * together fall short of what top-p leaves out. Spares sorting a large vocabulary. The total is at least 1.
 */
function nucleusCandidates(weights: Float64Array, topP: number): number[] {
  const floor = (1 - topP) / weights.length;
  const ids: number[] = [];
  for (let id = 0; id < weights.length; id++) if (weights[id]! >= floor) ids.push(id);
  return ids.sort((a, b) => weights[b]! - weights[a]! || a - b);
}

/** Ids of the `count` highest values, the highest first, ties by the lowest id. */
function highestIds(values: Float32Array | Float64Array, count: number): number[] {
  const ids: number[] = [];
  if (count <= 0) return ids;
  for (let id = 0; id < values.length; id++) {
    const value = values[id]!;
    if (ids.length === count && value <= values[ids[count - 1]!]!) continue;
    let at = ids.length;
    while (at > 0 && values[ids[at - 1]!]! < value) at--;
    ids.splice(at, 0, id);
    if (ids.length > count) ids.pop();
  }
  return ids;
}
