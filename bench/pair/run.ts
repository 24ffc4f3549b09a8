/** All checks of one model: in each mode an undivided worker, and a pair for each send type. Failures are results, too. */
import { kvBlockBytes, readConfig, readKvShape } from '../../support/kv-shape.ts';
import { readEnvironment, readMachine } from '../measure/machine.ts';
import { answersOf, checkLoad, measureNoise } from './checks.ts';
import { BLOCK_SIZE, type Load, type LoadLimits, limitsOf, makeLoads } from './loads.ts';
import type { Mode, PairCheck, PairResult } from './result.ts';
import { type SystemOptions, startPair, startUndivided, type Undivided } from './systems.ts';
import { type FirstTokenTimes, timeFirstTokens } from './times.ts';

export interface RunOptions {
  /** Checkpoint directory, and its name in the report. */
  readonly model: string;
  readonly name: string;
  readonly device: 'host' | 'cuda';
  readonly sendTypes: readonly string[];
  readonly modes: readonly Mode[];
  readonly times: boolean;
  readonly small: boolean;
  readonly onLine?: (line: string) => void;
  readonly say: (text: string) => void;
}

interface Sizes {
  readonly kvBuffer: string;
  readonly timedTokens: number;
  readonly warmUp: number;
  readonly rounds: number;
  /** Requests of each of two loads from which the noise is measured: log-probabilities cost the host 2 ms per token. */
  readonly noiseRequests: number;
}

const FULL: Sizes = { kvBuffer: '4e9', timedTokens: 2_048, warmUp: 20, rounds: 20, noiseRequests: 64 };
const SMALL: Sizes = { kvBuffer: '64e6', timedTokens: 64, warmUp: 2, rounds: 2, noiseRequests: 2 };
/** Positions left for the answer to a timed prompt. */
const TIMED_OUTPUT = 32;

/** What the checks need to know about a checkpoint. */
interface CheckpointShape {
  readonly vocab: number;
  /** The longest sequence, tokens. */
  readonly positions: number;
  /** Bytes of KV of one block, over all layers, as it is transferred. */
  readonly blockBytes: number;
}

export class PairRun {
  readonly #options: RunOptions;
  readonly #shape: CheckpointShape;
  readonly #limits: LoadLimits;
  readonly #sizes: Sizes;
  readonly #checks: PairCheck[] = [];
  readonly #times: FirstTokenTimes[] = [];
  readonly #errors: string[] = [];
  #noise: PairResult['noise'];

  constructor(options: RunOptions) {
    this.#options = options;
    this.#shape = readShape(options.model, options.device === 'host' ? 4 : 2);
    this.#limits = limitsOf(options.small);
    this.#sizes = options.small ? SMALL : FULL;
  }

  async run(): Promise<PairResult> {
    const { modes, times, name, device, small } = this.#options;
    const start = performance.now();
    const startedAt = new Date().toISOString();
    for (const mode of modes) await this.#attempt(mode, () => this.#checkMode(mode));
    if (times) await this.#attempt('times', () => this.#measureTimes());
    return {
      startedAt,
      seconds: Math.round((performance.now() - start) / 100) / 10,
      model: name,
      device,
      small,
      machine: await readMachine(),
      environment: await readEnvironment(device),
      flags: { 'batch-invariant': this.#flags('batch-invariant'), usual: this.#flags('usual') },
      ...(this.#noise && { noise: this.#noise }),
      checks: this.#checks,
      times: this.#times,
      errors: this.#errors,
    };
  }

  async #checkMode(mode: Mode): Promise<void> {
    const { small, sendTypes, say } = this.#options;
    const exact = this.#isExact(mode);
    const { vocab, blockBytes } = this.#shape;
    const growTo = small ? 192 : blockBytes < 2 ** 20 ? 640 : 160;
    const loads = makeLoads({ vocab, sampled: exact, small, growTo });
    const system = this.#system(this.#flags(mode));
    const undivided = await startUndivided(system);
    try {
      const expected: (readonly (readonly number[])[])[] = [];
      for (const load of loads) expected.push(await answersOf(undivided.client, load));
      if (!exact) {
        const requests = loads
          .slice(0, 2)
          .flatMap((load) => load.requests.slice(0, this.#sizes.noiseRequests));
        this.#noise = await measureNoise(undivided.client, requests, this.#limits.maxNumSeqs);
        say(`${mode}: noise ${this.#noise.noise.toFixed(4)} at ${this.#noise.positions} positions`);
      }
      for (const sendType of sendTypes) {
        await this.#attempt(`${mode}, ${sendType}`, () =>
          this.#checkPair({ mode, sendType, loads, expected, system, undivided }),
        );
      }
    } finally {
      await undivided.stop();
    }
  }

  async #checkPair(about: {
    readonly mode: Mode;
    readonly sendType: string;
    readonly loads: readonly Load[];
    readonly expected: readonly (readonly (readonly number[])[])[];
    readonly system: SystemOptions;
    readonly undivided: Undivided;
  }): Promise<void> {
    const { mode, sendType, loads, expected, system, undivided } = about;
    const { blockBytes } = this.#shape;
    const noise = this.#isExact(mode) ? undefined : this.#noise?.noise;
    const pair = await startPair(system, sendType);
    try {
      for (const [i, load] of loads.entries()) {
        const checked = { load, expected: expected[i]!, undivided, pair, way: sendType, blockBytes, noise };
        const found = await checkLoad(checked);
        this.#checks.push({ mode, sendType, ...found });
        const { problems, same, requests, effect } = found;
        const text = [`${same} of ${requests} the same`, effect, ...problems.slice(0, 3)].filter(Boolean);
        this.#options.say(
          `${problems.length === 0 ? 'ok    ' : 'FAILED'} ${mode}, ${sendType}, ${load.name}: ${text.join('; ')}`,
        );
      }
    } finally {
      await pair.stop();
    }
  }

  async #measureTimes(): Promise<void> {
    const { vocab, positions } = this.#shape;
    const { timedTokens, warmUp, rounds } = this.#sizes;
    const promptTokens = Math.min(timedTokens, positions - TIMED_OUTPUT);
    const length = promptTokens + TIMED_OUTPUT;
    // Room for all of them, so that full caches do not distort the times.
    const blocks = Math.ceil(length / BLOCK_SIZE) * (warmUp + rounds + 4);
    const system = this.#system(['--max-model-len', String(length), '--num-blocks', String(blocks)]);
    const undivided = await startUndivided(system);
    try {
      for (const [i, sendType] of this.#options.sendTypes.entries()) {
        const pair = await startPair(system, sendType);
        try {
          const clients = { undivided: undivided.client, pair: pair.client };
          const firstPrompt = i * (warmUp + rounds);
          const found = await timeFirstTokens({
            ...{ sendType, vocab, promptTokens, warmUp, rounds, firstPrompt },
            ...clients,
          });
          this.#times.push(found);
          const [alone, both, step] = [found.undividedMs, found.pairMs, found.stepMs].map((ms) =>
            ms.toFixed(2),
          );
          this.#options.say(
            `${sendType}: first token after ${alone} ms undivided, ${both} ms as a pair; a step takes ${step} ms`,
          );
        } finally {
          await pair.stop();
        }
      }
    } finally {
      await undivided.stop();
    }
  }

  /** On the host sums always have the same order. */
  #isExact(mode: Mode): boolean {
    return mode === 'batch-invariant' || this.#options.device === 'host';
  }

  #system(flags: readonly string[]): SystemOptions {
    const { device, model, onLine } = this.#options;
    const common = ['--block-size', String(BLOCK_SIZE), '--kv-buffer-size', this.#sizes.kvBuffer];
    return { device, model, flags: [...flags, ...common, '--log-format', 'json'], ...(onLine && { onLine }) };
  }

  #flags(mode: Mode): string[] {
    const { maxModelLen, numBlocks, maxNumSeqs, maxNumBatchedTokens } = this.#limits;
    return [
      ...(mode === 'batch-invariant' ? ['--batch-invariant'] : []),
      ...['--max-model-len', String(maxModelLen), '--num-blocks', String(numBlocks)],
      ...['--max-num-seqs', String(maxNumSeqs), '--max-num-batched-tokens', String(maxNumBatchedTokens)],
    ];
  }

  async #attempt(what: string, work: () => Promise<void>): Promise<void> {
    try {
      await work();
    } catch (error) {
      this.#errors.push(`${what}: ${(error as Error).message}`);
      this.#options.say(`FAILED ${what}: ${(error as Error).message}`);
    }
  }
}

/** `elementBytes`: of the cache. */
function readShape(dir: string, elementBytes: number): CheckpointShape {
  const config = readConfig(dir);
  return {
    vocab: config['vocab_size'] ?? 0,
    positions: config['max_position_embeddings'] ?? 0,
    blockBytes: kvBlockBytes(readKvShape(dir, elementBytes, BLOCK_SIZE)),
  };
}
