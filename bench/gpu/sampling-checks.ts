/** Sampling on a GPU against the host's, from the logits of the very step: shapes, draws, log-probabilities, and the same bits in any batch. */
import type { CudaExecutor } from '../../src/model/cuda/executor.ts';
import { uniform } from '../../src/model/random.ts';
import { GREEDY, logprobOf, promptLogprobOf } from '../../src/model/sampler.ts';
import { shaped, shapingOf } from '../../src/model/shaping.ts';
import type {
  SampledToken,
  SampleSpec,
  SamplingParams,
  ScheduledSequence,
} from '../../src/scheduler/types.ts';
import type { TokenLogprob } from '../../src/wire/token-logprob.ts';
import { batch, range, sequence } from './model-rig.ts';
import { row } from './rows.ts';

const random = (below: number) => Math.floor(Math.random() * below);
const pick = <T>(values: readonly T[]): T => values[random(values.length)]!;
const PROMPT = 24;
/** Of float32 sums over a large vocabulary, relative to the total. */
const SLACK = 1e-4;

function anyParams(vocab: number): SamplingParams {
  const some = (count: number) => Array.from({ length: count }, () => random(vocab));
  const chance = <T>(fields: T) => (Math.random() < 0.35 ? fields : undefined);
  return {
    ...GREEDY,
    temperature: pick([0, 0.5, 1, 1.7]),
    topK: pick([0, 0, 1, 40, vocab + 5]),
    topP: pick([1, 1, 0.9, 0.3]),
    seed: random(2 ** 30),
    ...chance({ minP: pick([0.02, 0.3, 1]) }),
    ...chance({ repetitionPenalty: pick([0.7, 1.3]) }),
    ...chance({ presencePenalty: pick([-0.5, 1]) }),
    ...chance({ frequencyPenalty: pick([-0.5, 0.4]) }),
    ...chance({ logitBias: some(5).map((token) => [token, 20 * Math.random() - 10] as const) }),
    ...chance({ allowedTokenIds: some(pick([1, 50, 2_000])) }),
    ...chance({ badWords: [some(1), some(2)] }),
    ...chance({ minTokens: 100, stopTokenIds: some(4) }),
    ...chance({ logprobs: random(21) }),
  };
}

interface Running {
  readonly id: string;
  readonly params: SamplingParams;
  readonly tokens: number[];
  readonly blocks: readonly number[];
  readonly mask: Uint32Array | undefined;
  readonly history: SampleSpec['history'];
}

function start(i: number, vocab: number): Running {
  const tokens = Array.from({ length: PROMPT }, () => random(Math.min(vocab, 60)));
  const mask = Math.random() < 0.25 ? randomMask(vocab) : undefined;
  const history = {
    promptLength: PROMPT,
    get length() {
      return tokens.length;
    },
    tokens: (from: number, to: number) => Int32Array.from(tokens.slice(from, to)),
  };
  return { id: `${i}`, params: anyParams(vocab), tokens, blocks: range(4 * i, 4), mask, history };
}

export function randomMask(vocab: number): Uint32Array {
  return Uint32Array.from({ length: Math.ceil(vocab / 32) }, () => random(2 ** 32));
}

function scheduled({ id, params, tokens, blocks, history }: Running): ScheduledSequence {
  const first = tokens.length === PROMPT ? 0 : tokens.length - 1;
  const spec = { params, outputPosition: tokens.length - PROMPT, index: 0, ...(history && { history }) };
  return { ...sequence(id, tokens.slice(first), first, blocks), sample: spec };
}

/** What is wrong with a token that was drawn from these logits, if anything. */
function wrongToken(logits: Float32Array, spec: SampleSpec, mask: Uint32Array | undefined, token: number) {
  const { temperature, minP = 0, topK, topP, seed } = spec.params;
  const usable = shaped(logits, shapingOf(spec, logits.length, mask));
  let likeliest = 0;
  for (let i = 0; i < usable.length; i++) if (usable[i]! > usable[likeliest]!) likeliest = i;
  if (temperature === 0) return token === likeliest ? undefined : `${token} for ${likeliest}`;
  const weights = Float64Array.from(usable, (logit) => Math.exp((logit - usable[likeliest]!) / temperature));
  const order = Array.from(weights.keys())
    .filter((id) => weights[id]! >= minP && weights[id]! > 0)
    .sort((a, b) => weights[b]! - weights[a]! || a - b);
  // As the kernel has it: tokens as likely as the last one of a cut stay too.
  const asLikely = (ids: readonly number[], last: number) => ids.filter((id) => weights[id]! >= last);
  const left = topK > 0 && topK < order.length ? asLikely(order, weights[order[topK - 1]!]!) : order;
  const total = left.reduce((sum, id) => sum + weights[id]!, 0);
  let count = 0;
  for (let share = 0; count < left.length && (count === 0 || share < topP * total); count++) {
    share += weights[left[count]!]!;
  }
  const least = weights[left[Math.max(0, count - 1)]!]!;
  if (weights[token]! < least * (1 - 1e-3)) return `${token} was cut`;
  const kept = asLikely(left, least);
  const mass = kept.reduce((sum, id) => sum + weights[id]!, 0);
  const target = uniform(seed, 0, spec.outputPosition) * mass;
  const before = kept.reduce((sum, id) => sum + (id < token ? weights[id]! : 0), 0);
  const off = Math.max(before - target, target - before - weights[token]!, 0) / mass;
  return off < SLACK ? undefined : `${token} is off by ${off.toExponential(1)} of the mass`;
}

function wrongLogprob(got: TokenLogprob, wanted: TokenLogprob): string | undefined {
  if (got.top.map(({ token }) => token).join() !== wanted.top.map(({ token }) => token).join())
    return 'other likeliest';
  if (got.rank !== wanted.rank) return `rank ${got.rank} for ${wanted.rank}`;
  const off = (a: number, b: number) => Math.abs(a - b) > 1e-3;
  const wrong =
    off(got.logprob, wanted.logprob) ||
    got.top.some(({ logprob }, i) => off(logprob, wanted.top[i]!.logprob));
  return wrong ? `${got.logprob} for ${wanted.logprob}` : undefined;
}

/** `count` sequences through a prompt and `steps` steps, everything that they sample checked. */
export async function checkSampling(
  name: string,
  executor: CudaExecutor,
  count: number,
  steps: number,
): Promise<void> {
  const { vocabSize: vocab } = executor;
  const running = range(0, count).map((i) => start(i, vocab));
  const problems: string[] = [];
  let checked = 0;
  for (let step = 0; step < steps; step++) {
    const logits = new Map<string, Float32Array>();
    const { sampled } = await executor.forward(batch(...running.map(scheduled)), {
      sampling: ({ sequenceId }, of) => logits.set(sequenceId, of.slice()),
      mask: ({ sequenceId }) => running.find(({ id }) => id === sequenceId)?.mask,
    });
    const tokens = new Map(sampled.map((token) => [token.sequenceId, token]));
    for (const each of running) {
      const { sample: spec } = scheduled(each);
      const got = tokens.get(each.id);
      const own = logits.get(each.id)!;
      const wrong = got ? wrongSample(own, spec!, each.mask, got) : wrongFailure(own, spec!, each.mask);
      if (wrong) problems.push(`${wrong} ${JSON.stringify(each.params)}`);
      checked++;
      each.tokens.push(got?.token ?? 0);
    }
  }
  row(
    `${name}: sampled as the host would`,
    `${checked - problems.length} of ${checked}`,
    problems.length === 0,
  );
  for (const problem of problems.slice(0, 5)) row('', problem.slice(0, 300), false);
}

function wrongSample(
  logits: Float32Array,
  spec: SampleSpec,
  mask: Uint32Array | undefined,
  got: SampledToken,
) {
  const wrong = wrongToken(logits, spec, mask, got.token);
  if (wrong || !got.logprob) return wrong;
  return wrongLogprob(got.logprob, logprobOf(logits, got.token, spec.params.logprobs ?? 0));
}

function wrongFailure(
  logits: Float32Array,
  spec: SampleSpec,
  mask: Uint32Array | undefined,
): string | undefined {
  const usable = shaped(logits, shapingOf(spec, logits.length, mask));
  return usable.every((logit) => logit === Number.NEGATIVE_INFINITY) ? undefined : 'no token';
}

/** A prompt's own log-probabilities, against the logits of its prefixes. Only with `--batch-invariant` those have the same bits. */
export async function checkPromptLogprobs(name: string, executor: CudaExecutor): Promise<void> {
  const tokens = Array.from({ length: 12 }, () => random(executor.vocabSize));
  const targets = Int32Array.from(tokens.slice(1));
  const one = { ...sequence('p', tokens, 0, [0]), promptLogprobs: { count: 20, targets } };
  const { promptLogprobs } = await executor.forward(batch(one), {});
  let right = 0;
  for (let i = 0; i < targets.length; i++) {
    const logits = await executor.logits(batch(sequence('q', tokens.slice(0, i + 1), 0, [1])));
    if (!wrongLogprob(promptLogprobs.get('p')![i]!, promptLogprobOf(logits, targets[i]!, 20))) right++;
  }
  row(`${name}: log-probabilities of a prompt`, `${right} of ${targets.length}`, right === targets.length);
}

/** Each sequence alone and all together: equal tokens and log-probabilities, to the bit. */
export async function checkInvariance(name: string, executor: CudaExecutor, count: number): Promise<void> {
  const running = range(0, count).map((i) => start(i, executor.vocabSize));
  const mask = ({ sequenceId }: ScheduledSequence) => running.find(({ id }) => id === sequenceId)?.mask;
  let same = 0;
  for (let step = 0; step < 3; step++) {
    const together = await executor.forward(batch(...running.map(scheduled)), { mask });
    for (const each of running) {
      const alone = await executor.forward(batch(scheduled(each)), { mask });
      const of = ({ sampled }: typeof alone) => sampled.find(({ sequenceId }) => sequenceId === each.id);
      if (JSON.stringify(of(alone)) === JSON.stringify(of(together))) same++;
    }
    for (const each of running) {
      each.tokens.push(together.sampled.find(({ sequenceId }) => sequenceId === each.id)?.token ?? 0);
    }
  }
  row(`${name}: the same alone and together`, `${same} of ${3 * count}`, same === 3 * count);
}
