/** A caller's mistakes are named before anything leaves for a peer. */
import { expect, it } from 'vitest';
import type { MemoryRef, PagedLayer } from '../../../src/device/device.ts';
import { cudaMemory, hostMemory, pinnedMemory } from '../../../src/device/memory.ts';
import { PdError } from '../../../src/errors.ts';
import { layerBytes, type PagedLayout } from '../../../src/kv/layout.ts';
import { checkLoad, checkSend } from '../../../src/transfer/check-request.ts';
import type { SendRequest } from '../../../src/transfer/types.ts';
import { tensorIdOf, transferIdOf } from '../../../src/wire/ids.ts';

const layout: PagedLayout = {
  family: 'kv-first',
  numBlocks: 4,
  blockSize: 2,
  heads: 1,
  headDim: 2,
  dtype: 'float32',
};
const layer = (memory: MemoryRef = hostMemory(layerBytes(layout))): PagedLayer => ({ memory, layout });

const flat = (memory: MemoryRef, fields: object = {}): SendRequest => ({
  tensorId: tensorIdOf(transferIdOf('r-0'), 'l'),
  shape: [8],
  dtype: 'uint8',
  source: { kind: 'flat', memory },
  ...fields,
});
const blocks = (target: PagedLayer, ids: readonly number[]): SendRequest =>
  flat(target.memory, { source: { kind: 'blocks', layer: target, blockIds: Int32Array.from(ids) } });

const load = (fields: object = {}) => ({
  requestId: 'r-0',
  transferId: transferIdOf('r-0'),
  peer: { host: '127.0.0.1', port: 1 },
  layers: [{ name: 'l', target: layer() }],
  blockIds: Int32Array.of(0, 3),
  skipBlocks: 0,
  ...fields,
});

function problem(check: () => void): string {
  try {
    check();
  } catch (error) {
    if (error instanceof PdError) return `${error.code} ${error.message}`;
    throw error;
  }
  return 'fine';
}

it('takes what each device reaches', () => {
  const bytes = layerBytes(layout);
  expect(problem(() => checkSend(flat(hostMemory(8)), 'host'))).toBe('fine');
  expect(problem(() => checkSend(flat(hostMemory(8)), 'cuda:1'))).toBe('fine');
  expect(problem(() => checkSend(flat(pinnedMemory(1n, 8)), 'cuda:1'))).toBe('fine');
  expect(problem(() => checkSend(blocks(layer(), [3, 0]), 'host'))).toBe('fine');
  expect(problem(() => checkSend(blocks(layer(cudaMemory(1, 1n, bytes)), [1]), 'cuda:1'))).toBe('fine');
  expect(problem(() => checkLoad(load(), 'host'))).toBe('fine');
});

it('names memory that the device does not reach', () => {
  const bytes = layerBytes(layout);
  const unreached = (memory: string, device: string) =>
    `REQUEST_INVALID r-0#l: its memory is of kind ${memory}, which an engine on ${device} does not reach`;
  expect(problem(() => checkSend(flat(cudaMemory(0, 1n, 8)), 'host'))).toBe(unreached('cuda:0', 'host'));
  expect(problem(() => checkSend(flat(pinnedMemory(1n, 8)), 'host'))).toBe(unreached('pinned', 'host'));
  expect(problem(() => checkSend(blocks(layer(), [0]), 'cuda:1'))).toBe(unreached('host', 'cuda:1'));
  const other = layer(cudaMemory(0, 1n, bytes));
  expect(problem(() => checkSend(blocks(other, [0]), 'cuda:1'))).toBe(unreached('cuda:0', 'cuda:1'));
});

it('names blocks, layers, shapes and types that cannot be', () => {
  expect(problem(() => checkSend(blocks(layer(), [4]), 'host'))).toMatch(/block 4 is outside of .* 4 blocks/);
  expect(problem(() => checkSend(blocks(layer(hostMemory(8)), [0]), 'host'))).toMatch(
    /take 128 bytes.* has 8/,
  );
  expect(problem(() => checkSend(flat(hostMemory(8), { shape: [2, -4] }), 'host'))).toMatch(
    /shape \[2, -4\]/,
  );
  expect(problem(() => checkSend(flat(hostMemory(8), { dtype: 'uint9' }), 'host'))).toMatch(/"uint9"/);
  expect(problem(() => checkLoad(load({ blockIds: Int32Array.of(-1) }), 'host'))).toMatch(/r-0: l: block -1/);
  expect(problem(() => checkLoad(load({ skipBlocks: 3 }), 'host'))).toMatch(/skipBlocks is 3, there are 2/);
  expect(problem(() => checkLoad(load({ layers: [] }), 'host'))).toMatch(/no layers/);
});
