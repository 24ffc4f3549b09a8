import { Command } from 'commander';
import { expect, test } from 'vitest';
import { benchOptions, TRANSFER_OPTIONS, tokensOf } from '../../../bench/cli/options.ts';
import { NO_PROGRESS } from '../../../bench/measure/progress.ts';
import { addOptions, resolveOptions } from '../../../src/config/options.ts';

function read(...argv: string[]) {
  const command = addOptions(new Command('pd-bench'), TRANSFER_OPTIONS).exitOverride();
  const values = resolveOptions(TRANSFER_OPTIONS, command.parse(argv, { from: 'user' }), {});
  return { values, options: benchOptions(values, NO_PROGRESS) };
}

test('by default two GPUs, every send type, both sources, 16 to 16,384 tokens, and a buffer that nothing spills from', () => {
  const { values, options } = read();
  expect(options.devices).toEqual(['cuda:0', 'cuda:1']);
  expect(options.kvBufferSize).toBe(2e10);
  expect(options.shape).toMatchObject({
    layers: 32,
    heads: 8,
    headDim: 128,
    dtype: 'bfloat16',
    blockSize: 16,
  });
  expect(values.sendType).toEqual(['PUT', 'PUT_ASYNC', 'GET']);
  expect(values.source).toEqual(['paged', 'flat']);
  expect(tokensOf(values.tokens, options)).toEqual([16, 256, 1_024, 4_096, 16_384]);
});

test('lists, sizes in any order, and other GPUs', () => {
  const { values, options } = read(
    ...['--devices', 'cuda:3,cuda:1', '--tokens', '256,16', '--send-type', 'GET', '--layers', '2'],
  );
  expect(options.devices).toEqual(['cuda:3', 'cuda:1']);
  expect(tokensOf(values.tokens, options)).toEqual([16, 256]);
  expect(values.sendType).toEqual(['GET']);
  expect(options.shape.layers).toBe(2);
  expect(read('--device', 'host').options.devices).toEqual(['host', 'host']);
  const both = ['--devices', 'cuda:1,cuda:1', '--wire', 'native', '--transport', 'direct'];
  expect(read(...both).options.devices).toEqual(['cuda:1', 'cuda:1']);
});

test.each([
  [['--devices', 'cuda:0'], 'is not two devices'],
  [['--devices', 'cuda:1,cuda:1'], 'NCCL refuses to connect two ranks on one GPU'],
  [['--devices', 'host,cuda:0'], 'share no transport'],
  [['--devices', 'host,host', '--device', 'host'], 'give only one of them'],
  [['--tokens', '16,0'], '--tokens'],
  [['--send-type', 'PUT,PUT'], '--send-type'],
  [['--rounds', '2'], '--rounds'],
  [['--shape', 'gpt-2'], 'llama-3-8b'],
])('%j is refused by name', (argv, message) => {
  expect(() => read(...argv)).toThrow(
    expect.objectContaining({ code: 'CONFIG_INVALID', message: expect.stringContaining(message) }),
  );
});
