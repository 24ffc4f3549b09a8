import { expect, test } from 'vitest';
import { Timelines } from '../../../src/observability/timelines.ts';

test('the latest requests are remembered, each with its stages as they came', () => {
  const timelines = new Timelines<string>();
  for (let i = 0; i < 300; i++) timelines.begin(String(i), 'received', i);
  timelines.stamp('299', 'read', 299.5);
  timelines.stamp('0', 'read');
  const recent = timelines.recent();
  expect(recent).toHaveLength(256);
  expect(recent.at(-1)).toEqual({
    id: '299',
    stages: [
      { stage: 'received', at: 299 },
      { stage: 'read', at: 299.5 },
    ],
  });
  expect(recent.some(({ id }) => id === '0')).toBe(false);
});

test('what comes again and again crowds nothing else out', () => {
  const timelines = new Timelines<string>();
  timelines.begin('a', 'received', 0);
  for (let i = 1; i <= 1_000; i++) timelines.stamp('a', 'step', i, 16);
  timelines.stamp('a', 'drawn', 1_001);
  const { stages } = timelines.recent()[0]!;
  expect(stages).toHaveLength(65);
  expect(stages.slice(-2)).toEqual([
    { stage: 'step', at: 1_000, tokens: 16 },
    { stage: 'drawn', at: 1_001 },
  ]);
});

test('what is noted of a request goes with its stages', () => {
  const timelines = new Timelines<string>();
  timelines.begin('a', 'received', 0);
  timelines.note('a', { bytes: 1, transport: 'host' });
  timelines.note('a', { bytes: 2 });
  timelines.note('b', { bytes: 3 });
  const stages = [{ stage: 'received', at: 0 }];
  expect(timelines.get('a')).toEqual({ id: 'a', stages, facts: { bytes: 2, transport: 'host' } });
  expect(timelines.get('b')).toBeUndefined();
});
