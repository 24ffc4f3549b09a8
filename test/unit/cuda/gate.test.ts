import { expect, test } from 'vitest';
import { ProgressGate } from '../../../src/transport/nccl/gate.ts';

test('before NCCL 2.27 one communicator is in progress at a time, in the order of asking', () => {
  const gate = new ProgressGate(false);
  const [first, second, third] = [{}, {}, {}];
  expect(gate.enter(first)).toBe(true);
  expect(gate.enter(first)).toBe(true);
  expect(gate.enter(second)).toBe(false);
  expect(gate.enter(third)).toBe(false);
  gate.leave(first);
  expect(gate.enter(third)).toBe(false);
  // one that gives up does not hold up the others
  gate.leave(second);
  expect(gate.enter(third)).toBe(true);
});

test('from 2.27 on nobody waits', () => {
  const gate = new ProgressGate(true);
  expect([{}, {}].map((who) => gate.enter(who))).toEqual([true, true]);
});
