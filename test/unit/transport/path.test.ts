import { expect, test } from 'vitest';
import { expectedPath, rateOfWrite } from '../../../src/transport/direct/path.ts';

const facts = {
  sameGpu: false,
  gpu: 'NVIDIA H200',
  peerLink: undefined,
  pcieGtPerSecond: undefined,
} as const;
const gbOf = (given: Partial<Parameters<typeof expectedPath>[0]>) => {
  const { link, bytesPerSecond } = expectedPath({ ...facts, ...given });
  return [link, bytesPerSecond === undefined ? undefined : Math.round(bytesPerSecond / 1e9)];
};

test('what a path should give goes by the link that CUDA tells, else by the name of the GPU', () => {
  expect(gbOf({ peerLink: 'nvlink' })).toEqual(['nvlink', 369]);
  expect(gbOf({ gpu: 'NVIDIA H100 80GB HBM3' })).toEqual(['nvlink', 369]);
  expect(gbOf({ gpu: 'NVIDIA A100-SXM4-80GB' })).toEqual(['nvlink', 246]);
  expect(gbOf({ gpu: 'NVIDIA H100 PCIe', pcieGtPerSecond: 32 * 16 })).toEqual(['pcie', 50]);
  expect(gbOf({ peerLink: 'pcie', pcieGtPerSecond: 16 * 16 })).toEqual(['pcie', 25]);
  expect(gbOf({ sameGpu: true })).toEqual(['same GPU', 1_980]);
});

test('nothing is claimed where nothing is known', () => {
  expect(gbOf({ peerLink: 'nvlink', gpu: 'NVIDIA Z1' })).toEqual(['nvlink', undefined]);
  expect(gbOf({ gpu: 'NVIDIA L4' })).toEqual(['unknown', undefined]);
  expect(gbOf({ sameGpu: true, gpu: 'NVIDIA L4' })).toEqual(['same GPU', undefined]);
});

test('of a short write the launch takes its share: as was measured on H200s', () => {
  const MIB = 2 ** 20;
  const rate = (given: Partial<Parameters<typeof expectedPath>[0]>, bytes: number) =>
    Math.round(rateOfWrite(expectedPath({ ...facts, ...given }), bytes)! / 1e9);
  const within = { sameGpu: true };
  const between = { peerLink: 'nvlink' } as const;
  // measured: 701, 275, 353 and 371 GB/s
  expect([rate(within, 4 * MIB), rate(between, 4 * MIB)]).toEqual([686, 273]);
  expect([rate(between, 32 * MIB), rate(between, 2_048 * MIB)]).toEqual([353, 369]);
  expect(rateOfWrite({ link: 'unknown' }, MIB)).toBeUndefined();
});
