import { expect, test } from 'vitest';
import { expectedPath } from '../../../src/transport/direct/path.ts';

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
  expect(gbOf({ sameGpu: true })).toEqual(['same GPU', 1_390]);
});

test('nothing is claimed where nothing is known', () => {
  expect(gbOf({ peerLink: 'nvlink', gpu: 'NVIDIA Z1' })).toEqual(['nvlink', undefined]);
  expect(gbOf({ gpu: 'NVIDIA L4' })).toEqual(['unknown', undefined]);
  expect(gbOf({ sameGpu: true, gpu: 'NVIDIA L4' })).toEqual(['same GPU', undefined]);
});
