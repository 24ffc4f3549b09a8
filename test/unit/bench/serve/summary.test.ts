import { describe, expect, it } from 'vitest';
import type { RequestRecord } from '../../../../bench/serve/record.ts';
import { renderServe } from '../../../../bench/serve/render.ts';
import { isGood, summarize, tpotOf } from '../../../../bench/serve/summary.ts';

/** 5 tokens in 5 events, the first after 100 ms, then one every 10 ms. */
const RECORD: RequestRecord = {
  index: 0,
  outcome: 'done',
  sentMs: 0,
  endToEndMs: 145,
  firstTokenMs: 100,
  textMs: 40,
  gapsMs: [10, 10, 10, 10],
  promptTokens: 20,
  outputTokens: 5,
  countedBy: 'usage',
  asked: { promptTokens: 20, outputTokens: 5 },
};
const slower: RequestRecord = {
  ...RECORD,
  firstTokenMs: 300,
  textMs: 80,
  gapsMs: [20, 20, 20, 20],
  endToEndMs: 385,
};
const failed = (code: string, message = code): RequestRecord => ({
  ...RECORD,
  outcome: 'failed',
  failure: { code, message },
});
const load = (records: readonly RequestRecord[], durationMs = 2_000) => ({
  records,
  durationMs,
  lateMs: [],
  mostRunning: 3,
});

describe('a summary', () => {
  it('counts times, tokens and throughput of what was answered in full, and nothing else', () => {
    const interrupted: RequestRecord = { ...RECORD, outcome: 'interrupted' };
    const summary = summarize(load([RECORD, slower, failed('TIMEOUT'), interrupted]), 10);
    expect(summary.requests).toEqual({ planned: 10, done: 2, failed: 1, interrupted: 1 });
    expect(summary.ttftMs).toMatchObject({ count: 2, mean: 200, p50: 200, max: 300 });
    expect(summary.itlMs).toMatchObject({ count: 8, mean: 15, p50: 15 });
    expect(summary.tpotMs).toMatchObject({ count: 2, mean: 15 });
    expect(summary.e2eMs).toMatchObject({ mean: 265 });
    expect(summary.requestsPerSecond).toBe(1);
    expect(summary.outputTokensPerSecond).toBe(5);
    expect(summary.totalTokensPerSecond).toBe(25);
    expect(summary.goodput).toBeUndefined();
  });

  it('names failures by code, the most frequent first', () => {
    const records = [failed('503 NO_INSTANCE', 'no consumer'), failed('TIMEOUT'), failed('TIMEOUT')];
    const summary = summarize(load(records), 3);
    expect(summary.failures).toEqual([
      { code: 'TIMEOUT', message: 'TIMEOUT', count: 2 },
      { code: '503 NO_INSTANCE', message: 'no consumer', count: 1 },
    ]);
    expect(summary.ttftMs).toBeUndefined();
    const text = renderServe({
      ...{ url: '', model: '', sizedBy: 'tokenizer', interrupted: false, records: [] },
      summary,
    });
    expect(text).toContain('0 of 3 requests answered in 2.00 s');
    expect(text).toContain('failed  1 x 503 NO_INSTANCE: no consumer');
  });

  it('counts as good what keeps every objective', () => {
    const records = [RECORD, slower, failed('TIMEOUT')];
    const good = (objectives: { ttftMs?: number; itlMs?: number }) =>
      summarize(load(records), 3, objectives).goodput;
    expect(good({ ttftMs: 100 })).toMatchObject({ good: 1, requestsPerSecond: 0.5 });
    expect(good({ ttftMs: 300 })).toMatchObject({ good: 2 });
    expect(good({ itlMs: 10 })).toMatchObject({ good: 1 });
    expect(good({ ttftMs: 300, itlMs: 9 })).toMatchObject({ good: 0 });
  });

  it('takes time per token by the request, over its tokens and not its events', () => {
    expect(tpotOf({ ...RECORD, gapsMs: [40], outputTokens: 9 })).toBe(5);
    expect(tpotOf({ ...RECORD, gapsMs: [], textMs: 0, outputTokens: 1 })).toBeUndefined();
    expect(isGood({ ...RECORD, gapsMs: [], textMs: 0, outputTokens: 1 }, { itlMs: 1 })).toBe(true);
  });

  it('gives an answer without text no time to first token, and does not call it good', () => {
    const { firstTokenMs: _, ...rest } = RECORD;
    const silent: RequestRecord = { ...rest, gapsMs: [], textMs: 0 };
    const summary = summarize(load([silent, RECORD]), 2, { itlMs: 1_000 });
    expect(summary.withoutText).toBe(1);
    expect(summary.ttftMs?.count).toBe(1);
    expect(summary.tokensPerEvent).toBe(1);
    expect(summary.goodput?.good).toBe(1);
  });

  it('notices lengths other than asked for', () => {
    const short: RequestRecord = { ...RECORD, outputTokens: 3, promptTokens: 19 };
    const summary = summarize(load([short, RECORD]), 2);
    expect(summary.otherOutputLength).toBe(1);
    expect(summary.otherPromptLength).toBe(1);
  });
});
