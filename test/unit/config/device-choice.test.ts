import { describe, expect, test } from 'vitest';
import {
  chooseDevices,
  type DeviceWish,
  type DriverAnswer,
  type GpuFacts,
  hidesEveryGpu,
  namedDevice,
  withWayOut,
} from '../../../src/config/device-choice.ts';
import { type ErrorCode, PdError } from '../../../src/errors.ts';

const H200 = 'NVIDIA H200';
const gpus = (count: number, problem?: [ErrorCode, string]): DriverAnswer => ({
  kind: 'gpus',
  names: Array.from({ length: count }, () => H200),
  ...(problem && { problem: { code: problem[0], message: problem[1], context: {} } }),
});
const fails = (kind: 'fails' | 'not-loadable', code: ErrorCode, message: string): DriverAnswer => ({
  kind,
  error: { code, message, context: {} },
});
const facts = (driver: DriverAnswer, visibleDevices?: string, deviceFiles: string[] = []): GpuFacts => ({
  visibleDevices,
  deviceFiles,
  driver,
});
const FILE = ['/dev/nvidia0'];
const ONE: DeviceWish = { device: 'auto', workers: ['the worker'] };
const PAIR: DeviceWish = { device: 'auto', workers: ['producer-0', 'consumer-0'] };

describe('--device auto', () => {
  test.each<[string, GpuFacts, RegExp]>([
    ['no device file', facts({ kind: 'not-asked' }), /no NVIDIA device file in \/dev \(--device auto\)$/],
    [
      "no device file, and the runbook's variable",
      facts({ kind: 'not-asked' }, '0'),
      /no NVIDIA device file in \/dev for CUDA_VISIBLE_DEVICES=0 to name/,
    ],
    [
      'all hidden, files or not',
      facts({ kind: 'not-asked' }, '', FILE),
      /CUDA_VISIBLE_DEVICES, empty, hides every GPU/,
    ],
    ['all hidden by -1', facts(gpus(2), '-1', FILE), /CUDA_VISIBLE_DEVICES=-1 hides every GPU/],
    [
      'a named driver library that does not load, and no file',
      facts(fails('not-loadable', 'LIBRARY_NOT_FOUND', 'cannot load libcuda')),
      /no GPU is visible: cannot load libcuda/,
    ],
    ['a driver without GPUs', facts({ kind: 'no-gpu', unhidden: 0 }), /the CUDA driver reports none/],
    [
      'such a driver, and a variable',
      facts({ kind: 'no-gpu', unhidden: 0 }, '0'),
      /the CUDA driver reports none/,
    ],
  ])('is the host: %s', (_, known, line) => {
    const choice = chooseDevices(ONE, known);
    expect(choice).toMatchObject({ devices: ['host'], automaticGpu: false });
    expect(choice.line).toMatch(/^Device: host, as no GPU is visible: /);
    expect(choice.line).toMatch(line);
    // All of a launch alike.
    expect(chooseDevices(PAIR, known)).toEqual({ ...choice, devices: ['host', 'host'] });
  });

  test.each<[string, GpuFacts, string]>([
    ['one', facts(gpus(1), undefined, FILE), 'the only visible GPU (--device auto)'],
    ['the first of two', facts(gpus(2), undefined, FILE), 'the first of 2 visible GPUs (--device auto)'],
    [
      'one of many',
      facts(gpus(1), '3', FILE),
      'the only visible GPU, CUDA_VISIBLE_DEVICES=3 (--device auto)',
    ],
    ['one without a file that we know', facts(gpus(1)), 'the only visible GPU (--device auto)'],
  ])('is the first visible GPU: %s', (_, known, words) => {
    expect(chooseDevices(ONE, known)).toEqual({
      devices: ['cuda:0'],
      line: `Device: cuda:0 (${H200}), ${words}`,
      automaticGpu: true,
    });
  });

  test('gives each of several workers a GPU of its own', () => {
    expect(chooseDevices(PAIR, facts(gpus(3), undefined, FILE))).toEqual({
      devices: ['cuda:0', 'cuda:1'],
      line: `Device: a GPU each, cuda:0 (${H200}) for producer-0, cuda:1 (${H200}) for consumer-0 (--device auto)`,
      automaticGpu: true,
    });
  });

  test.each<[string, DeviceWish, GpuFacts, ErrorCode, RegExp]>([
    [
      'fewer GPUs than workers',
      PAIR,
      facts(gpus(1), '0', FILE),
      'DEVICE_UNAVAILABLE',
      /2 workers want a GPU each, and this process sees 1 GPU \(cuda:0 NVIDIA H200; CUDA_VISIBLE_DEVICES=0\): there is no cuda:1 for consumer-0/,
    ],
    [
      'a library is missing',
      ONE,
      facts(gpus(1, ['LIBRARY_NOT_FOUND', 'cannot load NCCL']), undefined, FILE),
      'LIBRARY_NOT_FOUND',
      /a GPU is visible \(NVIDIA H200\), but cannot be used: cannot load NCCL/,
    ],
    [
      'the driver is too old',
      ONE,
      facts(gpus(1, ['LIBRARY_TOO_OLD', 'runs CUDA 11.4']), undefined, FILE),
      'LIBRARY_TOO_OLD',
      /runs CUDA 11\.4/,
    ],
    [
      'the runtime fails',
      ONE,
      facts(gpus(1, ['CUDA_ERROR', 'cudaGetDeviceCount failed with 35']), undefined, FILE),
      'DEVICE_UNAVAILABLE',
      /cudaGetDeviceCount failed with 35/,
    ],
    [
      'the driver fails, crashes or hangs',
      ONE,
      facts(fails('fails', 'CUDA_ERROR', 'cuInit failed with 999')),
      'DEVICE_UNAVAILABLE',
      /cannot be asked for GPUs: cuInit failed with 999/,
    ],
    [
      'a device file without the driver library',
      ONE,
      facts(fails('not-loadable', 'LIBRARY_NOT_FOUND', 'cannot load libcuda'), '0', FILE),
      'LIBRARY_NOT_FOUND',
      /\/dev\/nvidia0 is here, but cannot load libcuda/,
    ],
    [
      'a device file, and a driver that reports nothing',
      ONE,
      facts({ kind: 'no-gpu', unhidden: 0 }, '0', FILE),
      'DEVICE_UNAVAILABLE',
      /\/dev\/nvidia0 is here, but the CUDA driver reports no GPU/,
    ],
    [
      'a variable that names no GPU of this machine',
      ONE,
      facts({ kind: 'no-gpu', unhidden: 2 }, '7'),
      'DEVICE_UNAVAILABLE',
      /CUDA_VISIBLE_DEVICES=7 names no GPU of this machine, which has 2 GPUs/,
    ],
    [
      'computing on a GPU was asked for, and none is visible',
      { ...ONE, executor: 'cuda' },
      facts({ kind: 'not-asked' }),
      'DEVICE_UNAVAILABLE',
      /--executor cuda needs a GPU, and none is visible: there is no NVIDIA device file/,
    ],
  ])('is an error that names the host: %s', (_, wish, known, code, message) => {
    expect(() => chooseDevices(wish, known)).toThrow(
      expect.objectContaining({ code, message: expect.stringMatching(message) }),
    );
    expect(() => chooseDevices(wish, known)).toThrow(/--device host/);
  });
});

describe('--device cuda', () => {
  const wish: DeviceWish = { ...PAIR, device: 'cuda' };

  test('gives GPUs as auto does', () => {
    const { devices, line, automaticGpu } = chooseDevices(wish, facts(gpus(2)));
    expect(devices).toEqual(['cuda:0', 'cuda:1']);
    expect(line).toMatch(/\(--device cuda\)$/);
    expect(automaticGpu).toBe(false);
  });

  test.each<[GpuFacts, ErrorCode]>([
    [facts({ kind: 'no-gpu', unhidden: 0 }), 'DEVICE_UNAVAILABLE'],
    [facts({ kind: 'not-asked' }, ''), 'DEVICE_UNAVAILABLE'],
    [facts(fails('not-loadable', 'LIBRARY_NOT_FOUND', 'cannot load libcuda')), 'LIBRARY_NOT_FOUND'],
    [facts(gpus(1)), 'DEVICE_UNAVAILABLE'],
  ])('is an error where auto would be the host, and where there are too few: %j', (known, code) => {
    expect(() => chooseDevices(wish, known)).toThrow(
      expect.objectContaining({ code, message: expect.stringMatching(/^--device cuda: .*--device host/) }),
    );
  });
});

test.each([
  ['', true],
  [' ', true],
  ['-1', true],
  ['NoDevFiles', true],
  ['none', true],
  ['void', true],
  ['0', false],
  ['1,-1', false],
  ['GPU-8932f937', false],
  [undefined, false],
])('CUDA_VISIBLE_DEVICES=%s hides every GPU: %s', (value, hides) => {
  expect(hidesEveryGpu(value)).toBe(hides);
});

describe('a start that fails on a GPU', () => {
  const chosen = chooseDevices(ONE, facts(gpus(1)));
  const full = new PdError('OUT_OF_DEVICE_MEMORY', 'the model does not fit', { bytes: 1 });

  test('that nobody named says how to do without, and stays the error that it is', () => {
    expect(withWayOut(full, chosen)).toMatchObject({
      code: 'OUT_OF_DEVICE_MEMORY',
      message: 'the model does not fit\n  --device auto chose cuda:0; to serve without a GPU: --device host',
      context: { bytes: 1 },
      cause: full,
    });
  });

  test('that was named says nothing more, nor does an error that has nothing to do with it', () => {
    expect(withWayOut(full, namedDevice('cuda:0'))).toBe(full);
    const port = new PdError('PORT_IN_USE', 'port 8081');
    expect(withWayOut(port, chosen)).toBe(port);
  });

  test('in a program that was launched says so too', () => {
    const both = chooseDevices(PAIR, facts(gpus(2)));
    const failed = (code: string) =>
      new PdError(
        'PROGRAM_FAILED',
        `producer-0 did not start: exit status 1\n  producer-0 | pd-worker: ${code}: words`,
      );
    expect(withWayOut(failed('CUDA_ERROR'), both).message).toMatch(
      /auto chose cuda:0 and cuda:1;.*--device host$/,
    );
    expect(withWayOut(failed('PORT_IN_USE'), both).message).not.toContain('--device host');
  });
});
