/** What a load generator (load.ts) is told, and what it tells. */
/** Beginnings of prompts: always the same, never, half and half, or the first three quarters the same. */
export const PREFIXES = ['hot', 'cold', 'mixed', 'shared'] as const;

export interface LoadPlan {
  readonly port: number;
  readonly connections: number;
  /** Not counted. */
  readonly warmUpMs: number;
  readonly ms: number;
  /** Of a request. */
  readonly bodyBytes: number;
  readonly prefixes: (typeof PREFIXES)[number];
  /** `paced`: streams whose events carry their time, for as long as the load lasts. */
  readonly answers: 'whole' | 'streamed' | 'paced';
  /** Between two events of a paced stream. */
  readonly paceMs?: number;
  readonly headers?: Readonly<Record<string, string>>;
  /** Told apart from other load at the same time: where its prompts begin to count. */
  readonly seed: number;
}

export interface LoadResult {
  /** Of each answer, or of the way of each event. */
  readonly latenciesMs: readonly number[];
  readonly failed: number;
  /** Answers, or events, with those of the warm-up. */
  readonly all: number;
  readonly perSecond: number;
}
