/**
 * Systems one after another, under the same load, as many as there is time for. First the pair; then undivided workers with each chunk size, at
 * the coarse rates; then those with the best chunk, at more rates; then the pair with other chunk sizes.
 */

import { basename } from 'node:path';
import { bestOf, type GoodputResult, rateLine, type SystemResult } from '../goodput/page.ts';
import type { RateOptions, RateResult } from '../goodput/rate.ts';
import { Subject } from '../goodput/subject.ts';
import { sweep } from '../goodput/sweep.ts';
import { measureTurns, PUBLISHED_TURNS, type TurnsShape } from '../goodput/turns.ts';
import type { Phases } from '../goodput/window.ts';
import { readEnvironment, readMachine } from '../measure/machine.ts';
import { newTextSeed } from '../serve/plan.ts';
import { NATIVE, type SystemOptions, startPair, startTwoUndivided } from './systems.ts';

export const PARTS = ['pair', 'undivided', 'turns'] as const;
type Part = (typeof PARTS)[number];

export interface RunOptions {
  readonly model: string;
  readonly name?: string;
  readonly device: 'host' | 'cuda';
  readonly seconds: number;
  readonly only: readonly Part[];
  readonly chunks?: readonly number[];
  readonly pairChunks?: readonly number[];
  readonly bypasses?: readonly Bypass[];
  readonly rates?: readonly number[];
  readonly runs?: number;
  readonly moreRuns?: number;
  readonly ttft?: number;
  readonly itl?: readonly number[];
  readonly small?: true;
  readonly verbose?: true;
}

/** A pair whose consumer computes what its producer would have too late (`--bypass-wait`). */
export interface Bypass {
  /** Of the producer. */
  readonly chunk: number;
  readonly waitMs: number;
  readonly consumerChunk: number;
}

/** A system to be measured. */
interface Wanted {
  readonly kind: 'pair' | 'undivided';
  readonly chunk: number;
  readonly bypass?: Bypass;
}

/** What a run does, but for what its command line says otherwise. */
interface Sizes {
  readonly load: Omit<RateOptions, 'textSeed'>;
  /** The pair's first rates; undivided workers are first asked the coarse ones. */
  readonly rates: readonly number[];
  readonly coarse: { readonly rates: readonly number[]; readonly phases: Phases };
  /** Rates of the pair, and further ones of the best undivided workers. */
  readonly runs: number;
  readonly moreRuns: number;
  readonly chunks: readonly number[];
  readonly pairChunks: readonly number[];
  readonly bypasses: readonly Bypass[];
  readonly turns: TurnsShape;
  /** Chunk of the undivided workers that have the conversations. */
  readonly turnsChunk: number;
  readonly flags: readonly string[];
}

const FULL: Sizes = {
  load: {
    bounds: { ttftMs: 400, itlMs: [12, 10] },
    phases: { leadMs: 3_000, windowMs: 12_000, drainMs: 5_000 },
    promptTokens: 2_000,
    outputTokens: 200,
    seed: 0,
  },
  rates: [14],
  coarse: { rates: [14, 9], phases: { leadMs: 2_000, windowMs: 7_000, drainMs: 4_000 } },
  runs: 5,
  moreRuns: 3,
  chunks: [512, 1_024, 256, 2_048, 8_192, 4_096],
  pairChunks: [8_192, 2_048],
  bypasses: [{ chunk: 2_048, waitMs: 150, consumerChunk: 512 }],
  turns: PUBLISHED_TURNS,
  turnsChunk: 1_024,
  flags: ['--max-model-len', '8704', '--kv-buffer-size', '1e9'],
};
const SMALL: Sizes = {
  load: {
    bounds: { ttftMs: 2_000, itlMs: [500, 5] },
    phases: { leadMs: 300, windowMs: 1_500, drainMs: 5_000 },
    promptTokens: 48,
    outputTokens: 8,
    seed: 0,
  },
  rates: [6],
  coarse: { rates: [6], phases: { leadMs: 300, windowMs: 1_500, drainMs: 5_000 } },
  runs: 2,
  moreRuns: 1,
  chunks: [64, 128],
  pairChunks: [512],
  bypasses: [{ chunk: 512, waitMs: 1, consumerChunk: 64 }],
  turns: { conversations: 3, width: 2, turns: 2, first: 64, more: 32, outputTokens: 8 },
  turnsChunk: 64,
  flags: ['--num-blocks', '512', '--kv-buffer-size', '64e6'],
};

/** Until a worker with a large checkpoint serves, seconds: what is reckoned with before one has been seen to. */
const USUAL_START_S = 15;
const LONGEST_START_MS = 150_000;
/** Of a system that is to be measured at all: its first rate, its end. */
const STOP_S = 8;

export class GoodputRun {
  readonly #options: RunOptions;
  readonly #sizes: Sizes;
  readonly #signal: AbortSignal;
  readonly #began = performance.now();
  readonly #startedAt = new Date().toISOString();
  readonly #textSeed = newTextSeed();
  readonly #systems = new Map<string, SystemResult>();
  readonly #problems: string[] = [];
  readonly #leftOut: string[] = [];
  /** The longest start so far, seconds. */
  #startSeconds: number | undefined;

  constructor(options: RunOptions, signal: AbortSignal) {
    const { rates, runs, moreRuns, chunks, pairChunks, bypasses, ttft, itl } = options;
    const sizes = options.small ? SMALL : FULL;
    const { bounds } = sizes.load;
    this.#options = options;
    this.#signal = signal;
    this.#sizes = {
      ...sizes,
      load: {
        ...sizes.load,
        bounds: { ttftMs: ttft ?? bounds.ttftMs, itlMs: itl ?? bounds.itlMs },
      },
      ...(rates && { rates }),
      ...(runs !== undefined && { runs }),
      ...(moreRuns !== undefined && { moreRuns }),
      ...(chunks && { chunks }),
      ...(pairChunks && { pairChunks }),
      ...(bypasses && { bypasses }),
    };
  }

  async run(): Promise<void> {
    const { only } = this.#options;
    const { pairChunks, bypasses, chunks, turnsChunk } = this.#sizes;
    const [first, ...others] = pairChunks;
    const turns = only.includes('turns');
    const pair = (chunk: number) => ({ kind: 'pair', chunk }) as const;
    if (first !== undefined && (turns || only.includes('pair'))) await this.#pair(pair(first), turns);
    if (only.includes('pair'))
      for (const bypass of bypasses) await this.#pair({ ...pair(bypass.chunk), bypass }, false);
    const withTurns = chunks.includes(turnsChunk) ? turnsChunk : chunks[0];
    for (const chunk of chunks) {
      const itsTurns = turns && chunk === withTurns;
      if (only.includes('undivided') || itsTurns) await this.#coarse(chunk, itsTurns);
    }
    if (only.includes('undivided')) for (const chunk of this.#bestChunks()) await this.#refine(chunk);
    if (only.includes('pair')) for (const chunk of others) await this.#pair(pair(chunk), false);
  }

  async result(): Promise<GoodputResult> {
    const { device, name, model } = this.#options;
    return {
      startedAt: this.#startedAt,
      seconds: (performance.now() - this.#began) / 1_000,
      model: name ?? basename(model),
      device,
      machine: await readMachine(),
      environment: await readEnvironment(device),
      load: this.#sizes.load,
      systems: [...this.#systems.values()],
      problems: this.#problems,
      leftOut: this.#leftOut,
    };
  }

  #pair(wanted: Wanted, turns: boolean): Promise<void> {
    const { rates, runs, load } = this.#sizes;
    return this.#system({ ...wanted, phases: load.phases }, async (subject, name) => {
      const measured = this.#options.only.includes('pair')
        ? await this.#sweep(subject, name, { rates, runs, phases: load.phases })
        : [];
      this.#add(name, measured);
      if (turns) await this.#turns(subject, name);
    });
  }

  #coarse(chunk: number, turns: boolean): Promise<void> {
    const { rates, phases } = this.#sizes.coarse;
    return this.#system({ kind: 'undivided', chunk, phases }, async (subject, name) => {
      const measured = this.#options.only.includes('undivided')
        ? await this.#sweep(subject, name, { rates, runs: rates.length, phases })
        : [];
      this.#add(name, measured);
      if (turns) await this.#turns(subject, name);
    });
  }

  /** Around what its coarse rates have shown. */
  #refine(chunk: number): Promise<void> {
    const { moreRuns, load } = this.#sizes;
    return this.#system({ kind: 'undivided', chunk, phases: load.phases }, async (subject, name) => {
      const before = this.#systems.get(name)?.rates ?? [];
      const more = { rates: [], runs: moreRuns, phases: load.phases, before };
      this.#add(name, await this.#sweep(subject, name, more));
    });
  }

  /** By each bound. */
  #bestChunks(): readonly number[] {
    const undivided = [...this.#systems.values()].filter(({ kind }) => kind === 'undivided');
    const names = this.#sizes.load.bounds.itlMs.flatMap((_, i) => {
      const best = bestOf(undivided, i);
      return best && best.perSecond > 0 ? [best.system.name] : [];
    });
    return this.#sizes.chunks.filter((chunk) => names.includes(nameOf({ kind: 'undivided', chunk })));
  }

  #sweep(
    subject: Subject,
    name: string,
    how: {
      readonly rates: readonly number[];
      readonly runs: number;
      readonly phases: Phases;
      readonly before?: readonly RateResult[];
    },
  ): Promise<RateResult[]> {
    const options = {
      ...this.#sizes.load,
      textSeed: this.#textSeed,
      ...how,
      until: this.#until() - STOP_S * 1_000,
      onRate: (result: RateResult) => console.error(rateLine(name, result)),
    };
    return sweep(subject, options, this.#signal);
  }

  async #turns(subject: Subject, name: string): Promise<void> {
    const shape = this.#sizes.turns;
    const turns = await measureTurns(subject, shape, this.#textSeed + 1, this.#signal);
    this.#systems.set(name, { ...this.#systems.get(name)!, turns });
    const ttft = turns.ttftMs?.mean.toFixed(0);
    const tpot = turns.tpotMs?.p99.toFixed(1);
    console.error(
      `${name}: conversations, TTFT mean ${ttft} ms, per token p99 ${tpot} ms, ${turns.tokensPerSecond.toFixed(0)} tokens/s`,
    );
  }

  #add(name: string, rates: readonly RateResult[]): void {
    const system = this.#systems.get(name)!;
    this.#systems.set(name, { ...system, rates: [...system.rates, ...rates] });
  }

  /** Started, used and stopped. What goes wrong is a problem of the page, and the next one is measured anyway. */
  async #system(
    wanted: Wanted & { readonly phases: Phases },
    use: (subject: Subject, name: string) => Promise<void>,
  ): Promise<void> {
    const { kind, chunk, phases } = wanted;
    const name = nameOf(wanted);
    const leftS = (this.#until() - performance.now()) / 1_000;
    const neededS = (this.#startSeconds ?? (this.#options.small ? 1 : USUAL_START_S)) + STOP_S;
    const windowS = (phases.leadMs + phases.windowMs + phases.drainMs) / 1_000;
    if (this.#signal.aborted || leftS < neededS + windowS) {
      this.#leftOut.push(this.#systems.has(name) ? `more rates of ${name}` : name);
      return;
    }
    console.error(`${name}: starting, ${leftS.toFixed(0)} s are left`);
    try {
      const began = performance.now();
      const system = await this.#start(wanted, (leftS - STOP_S) * 1_000);
      const startSeconds = (performance.now() - began) / 1_000;
      this.#startSeconds = Math.max(this.#startSeconds ?? 0, startSeconds);
      try {
        const about = [...this.#flags(chunk)].join(' ');
        const known = this.#systems.get(name);
        this.#systems.set(name, known ?? { name, kind, about, rates: [], startSeconds });
        await this.#use(system, (subject) => use(subject, name));
      } finally {
        await system.stop();
      }
    } catch (error) {
      const cut = this.#signal.aborted;
      if (cut) this.#leftOut.push(`the rest of ${name}`);
      else this.#problems.push(`${name}: ${(error as Error).message}`);
    }
  }

  async #start(
    { kind, chunk, bypass }: Wanted,
    leftMs: number,
  ): Promise<{ readonly url: string; readonly workerUrl: string; stop(): Promise<void> }> {
    const { device, model, verbose } = this.#options;
    const options: SystemOptions = {
      device,
      model,
      flags: this.#flags(chunk),
      ...(bypass && {
        proxyFlags: `--bypass-wait ${bypass.waitMs}ms`,
        consumerFlags: `--max-num-batched-tokens ${bypass.consumerChunk}`,
      }),
      startMs: Math.min(LONGEST_START_MS, leftMs),
      ...(verbose && { onLine: (line: string) => console.error(line) }),
    };
    if (kind === 'undivided') return await startTwoUndivided(options);
    const { client, consumerUrl, stop } = await startPair(options, NATIVE);
    return { url: client.url, workerUrl: consumerUrl, stop };
  }

  async #use(
    { url, workerUrl }: { readonly url: string; readonly workerUrl: string },
    use: (subject: Subject) => Promise<void>,
  ): Promise<void> {
    const target = {
      ...({ url, tokenizeUrl: workerUrl, endpoint: 'completions', temperature: 0, ignoreEos: true } as const),
      extraBody: { return_token_ids: true },
    };
    const subject = await Subject.open(target, this.#signal);
    try {
      await subject.warmUp(this.#sizes.load.promptTokens, this.#signal);
      await use(subject);
    } finally {
      await subject.close();
    }
  }

  #flags(chunk: number): readonly string[] {
    return ['--max-num-batched-tokens', String(chunk), ...this.#sizes.flags];
  }

  #until(): number {
    return this.#began + this.#options.seconds * 1_000;
  }
}

function nameOf({ kind, chunk, bypass }: Wanted): string {
  const name = `${kind === 'pair' ? 'pair' : 'two undivided'}, chunk ${chunk.toLocaleString('en')}`;
  return bypass
    ? `${name}, bypass after ${bypass.waitMs} ms with chunk ${bypass.consumerChunk.toLocaleString('en')}`
    : name;
}
