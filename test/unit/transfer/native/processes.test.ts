/** What is remembered of processes that have said hello, whatever they say and however many they are. */
import { expect, it } from 'vitest';
import type { Nonce } from '../../../../src/transfer/native/messages.ts';
import { Process, Processes } from '../../../../src/transfer/native/processes.ts';

const nonceOf = (n: number) => n.toString(16).padStart(32, '0') as Nonce;

it('forgets the oldest that nothing is open with, and none that something is', () => {
  const processes = new Processes<string>(nonceOf(0));
  processes.introduce('busy', nonceOf(1), 8).process?.books.set(1, 'a want');
  for (let i = 2; i < 10_000; i++) processes.introduce(`peer ${i}`, nonceOf(i), 8);
  expect([...processes.all()]).toHaveLength(8_192);
  expect(processes.find('busy', nonceOf(1))).toBeDefined();
  expect(processes.find('peer 2', nonceOf(2))).toBeUndefined();
  expect(processes.find('peer 9999', nonceOf(9_999))).toBeDefined();
  // and takes it for a new one when it says hello again
  expect(processes.introduce('peer 2', nonceOf(2), 8).process).toBeDefined();
});

it('remembers that a seq is over in bounded memory, where the floor never moves', () => {
  const process = new Process<string>('peer', nonceOf(1), 8);
  for (let seq = 2; seq < 200_000; seq++) process.settle(seq);
  expect(process.numSettled).toBeLessThanOrEqual(65_536);
  expect([2, 100_000, 199_999].every((seq) => process.isSettled(seq))).toBe(true);
  expect(process.isSettled(200_000)).toBe(false);
});
