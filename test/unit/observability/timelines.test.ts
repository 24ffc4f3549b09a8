import { expect, test } from 'vitest';
import { Timelines } from '../../../src/observability/timelines.ts';

test('the latest requests are remembered, each with its stages as they came', () => {
  const timelines = new Timelines<string>();
  for (let i = 0; i < 100; i++) timelines.begin(String(i), 'received', i);
  timelines.stamp('99', 'read', 99.5);
  timelines.stamp('0', 'read');
  const recent = timelines.recent();
  expect(recent).toHaveLength(64);
  expect(recent.at(-1)).toEqual({
    id: '99',
    stages: [
      { stage: 'received', at: 99 },
      { stage: 'read', at: 99.5 },
    ],
  });
  expect(recent.some(({ id }) => id === '0')).toBe(false);
});

test('what comes again and again crowds nothing else out', () => {
  const timelines = new Timelines<string>();
  timelines.begin('a', 'received', 0);
  for (let i = 1; i <= 1_000; i++) timelines.stamp('a', 'step', i);
  timelines.stamp('a', 'drawn', 1_001);
  const { stages } = timelines.recent()[0]!;
  expect(stages).toHaveLength(65);
  expect(stages.slice(-2)).toEqual([
    { stage: 'step', at: 1_000 },
    { stage: 'drawn', at: 1_001 },
  ]);
});
