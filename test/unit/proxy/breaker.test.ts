import { expect, test } from 'vitest';
import { Breaker } from '../../../src/proxy/breaker.ts';
import { backoffMs, RetryBudget } from '../../../src/proxy/coordinator.ts';

function breaker() {
  const clock = { now: 0 };
  return { clock, one: new Breaker(() => clock.now) };
}

test('opens at the third failure in a row, and lets one request try when its time is over', () => {
  const { clock, one } = breaker();
  one.failed();
  one.failed();
  one.succeeded();
  one.failed();
  one.failed();
  expect(one.state).toBe('closed');
  one.failed();
  expect(one.state).toBe('open');
  one.succeeded(); // asked before it opened
  expect(one.state).toBe('open');
  clock.now += 1_000;
  expect(one.state).toBe('half-open');
  one.chosen();
  expect(one.state).toBe('open');
  one.succeeded();
  expect(one.state).toBe('closed');
});

test('stays open twice as long each time that its trial fails, at most 30 s', () => {
  const { clock, one } = breaker();
  one.open();
  const times: number[] = [];
  for (let i = 0; i < 7; i++) {
    const since = clock.now;
    while (one.state === 'open') clock.now += 500;
    times.push(clock.now - since);
    one.chosen();
    one.failed();
  }
  expect(times).toEqual([1_000, 2_000, 4_000, 8_000, 16_000, 30_000, 30_000]);
});

test('may be tried before its time is over where there is reason to', () => {
  const { clock, one } = breaker();
  one.open(20_000);
  clock.now += 10;
  one.mayTry();
  expect(one.state).toBe('half-open');
  one.chosen();
  one.succeeded();
  expect(one.state).toBe('closed');
  one.mayTry();
  expect(one.state).toBe('closed');
});

test('a trial of which nothing is heard is not the last', () => {
  const { clock, one } = breaker();
  one.open();
  clock.now += 1_000;
  one.chosen();
  clock.now += 30_000;
  expect(one.state).toBe('half-open');
});

test('retries are a fifth of the requests, and what was saved up', () => {
  const budget = new RetryBudget();
  let spent = 0;
  while (budget.spend()) spent++;
  expect(spent).toBe(50);
  for (let i = 0; i < 100; i++) {
    budget.earn();
    if (budget.spend()) spent++;
  }
  expect(Math.abs(spent - 70)).toBeLessThanOrEqual(1);
  expect([1, 2, 3].map((retry) => backoffMs(retry, 1))).toEqual([0, 25, 50]);
});
