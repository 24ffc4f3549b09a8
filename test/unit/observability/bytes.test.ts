import { expect, it } from 'vitest';
import { bar, binarySize, byteRate, progressLine } from '../../../src/observability/bytes.ts';

it.each([
  [0, '0 bytes'],
  [1_023, '1023 bytes'],
  [1_024, '1.00 KiB'],
  [2_892_912, '2.76 MiB'],
  [340 * 2 ** 20, '340 MiB'],
  [2 ** 30 - 1, '1.00 GiB'],
  [10.7 * 2 ** 30, '10.7 GiB'],
  [140.4 * 2 ** 30, '140 GiB'],
  [5_000 * 2 ** 40, '5000 TiB'],
])('%f bytes are written as %s', (bytes, text) => {
  expect(binarySize(bytes)).toBe(text);
});

it.each([
  [12, '12 B/s'],
  [85e6, '85.0 MB/s'],
  [4.1e9, '4.10 GB/s'],
])('%f bytes a second are written as %s', (rate, text) => {
  expect(byteRate(rate)).toBe(text);
});

it('a bar keeps its length, and is full only when all is done', () => {
  expect([-1, 0, 0.5, 0.999, 1, 2].map((part) => bar(part, 4))).toEqual([
    '░░░░',
    '░░░░',
    '██░░',
    '███░',
    '████',
    '████',
  ]);
});

it('a line of progress says how far, of how much, and how fast', () => {
  expect(progressLine('weights of llama', 67e9, 100e9, 10)).toBe(
    'weights of llama: ████████████████░░░░░░░░ 67 % (62.4 GiB of 93.1 GiB, 6.70 GB/s)',
  );
  expect(progressLine('nothing', 0, 0, 0)).toContain('100 % (0 bytes of 0 bytes)');
});
