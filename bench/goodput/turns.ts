/**
 * Conversations: so many at a time, each of several turns, whose prompt is the conversation up to then (answers included) and something
 * new. Prompts are token ids, so that an answer is in the next prompt as it was generated.
 */
import { inParallel } from '../measure/parallel.ts';
import { meanOf, type Spread, sumOf } from '../measure/statistics.ts';
import type { RequestRecord } from '../serve/record.ts';
import { type FailureCount, failuresOf } from '../serve/summary.ts';
import { spreads } from './rate.ts';
import type { Subject } from './subject.ts';

export interface TurnsShape {
  readonly conversations: number;
  /** At a time. */
  readonly width: number;
  readonly turns: number;
  /** Tokens of the first prompt; each further one has `more` more than the one before. */
  readonly first: number;
  readonly more: number;
  readonly outputTokens: number;
}

/** The load that pegainfer publishes. */
export const PUBLISHED_TURNS: TurnsShape = {
  conversations: 20,
  width: 10,
  turns: 5,
  first: 4_096,
  more: 1_024,
  outputTokens: 128,
};

export interface TurnsResult extends TurnsShape {
  readonly seconds: number;
  readonly answered: number;
  readonly ttftMs?: Spread;
  readonly itlMs?: Spread;
  readonly tpotMs?: Spread;
  /** Means, by turn. */
  readonly ttftByTurnMs: readonly number[];
  /** Of prompts (cached ones too) and answers. */
  readonly tokensPerSecond: number;
  readonly failures: readonly FailureCount[];
}

const ANSWER_MS = 30_000;
/** More than is needed, of which the last are taken: the first token of a text may be a special one. */
const SPARE = 16;

/** The server must tokenize and give the ids of its answers (`return_token_ids`). A conversation that fails ends. */
export async function measureTurns(
  subject: Subject,
  shape: TurnsShape,
  textSeed: number,
  signal: AbortSignal,
): Promise<TurnsResult> {
  const { conversations, width, turns, first, more, outputTokens } = shape;
  const ids = async (count: number, index: number) => {
    const text = await subject.prompt(count + SPARE, textSeed, index);
    return (await subject.target.tokenize(text, signal)).slice(-count);
  };
  const all = Array.from({ length: conversations }, (_, i) => i);
  const said = await inParallel(all, width, async (i) => {
    const parts: (readonly number[])[] = [];
    for (let turn = 0; turn < turns; turn++)
      parts.push(await ids(turn === 0 ? first : more, i * turns + turn));
    return parts;
  });
  const send = subject.sender(ANSWER_MS);
  const began = performance.now();
  const byTurn: RequestRecord[][] = Array.from({ length: turns }, () => []);
  await inParallel(all, width, async (i) => {
    let prompt: readonly number[] = [];
    let answer: readonly number[] = [];
    for (let turn = 0; turn < turns && !signal.aborted; turn++) {
      const length = first + turn * more;
      const fresh = said[i]![turn]!;
      prompt = [...prompt, ...answer, ...fresh].slice(0, length);
      const request = { index: i * turns + turn, prompt, promptTokens: prompt.length, outputTokens };
      const record = await send(request, began, signal);
      byTurn[turn]!.push(record);
      if (record.outcome !== 'done') return;
      answer = (record.ids ?? []).flat();
    }
  });
  signal.throwIfAborted();
  const seconds = (performance.now() - began) / 1_000;
  const records = byTurn.flat();
  const done = records.filter(({ outcome }) => outcome === 'done');
  const tokens = sumOf(done.map((record) => (record.promptTokens ?? 0) + record.outputTokens));
  return {
    ...shape,
    seconds,
    answered: done.length,
    ...spreads(done),
    ttftByTurnMs: byTurn.map((turn) => {
      const times = turn.flatMap(({ firstTokenMs }) => firstTokenMs ?? []);
      return times.length === 0 ? 0 : meanOf(times);
    }),
    tokensPerSecond: tokens / seconds,
    failures: failuresOf(records),
  };
}
