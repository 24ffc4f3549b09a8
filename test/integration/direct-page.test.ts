import { closeSync } from 'node:fs';
import { afterAll, describe, expect, test } from 'vitest';
import { nativeView } from '../../ffi/native.ts';
import { createSharedMemory } from '../../ffi/unix.ts';
import {
  flagOf,
  MAX_MARK,
  MAX_SEQ,
  NO_TOKEN,
  OwnerPage,
  PAGE_BYTES,
  SLOTS,
  slotOffsets,
  WriterPage,
} from '../../src/transport/direct/page.ts';

const made = OwnerPage.create();
afterAll(() => closeSync(made.descriptor));
const owner = new OwnerPage(made.ref);
// a mapping of its own, as another process has
const ref = WriterPage.map(made.descriptor);
const writer = new WriterPage(ref);
const bytes = nativeView(ref.address, PAGE_BYTES);
const words = new BigUint64Array(bytes.buffer, bytes.byteOffset, PAGE_BYTES / 8);
/** What a launch does. */
const launch = (slot: number, seq: number, mark: number) => {
  const at = slotOffsets(slot).marks / 8;
  words[at + 1] = 100n;
  words[at + 2] = 250n;
  words[at] = flagOf(seq, mark);
};

describe('a slot', () => {
  test('is granted to one seq; what is said of another is as good as nothing', () => {
    const slot = 1;
    owner.grant(slot, MAX_SEQ);
    expect(writer.granted(slot, MAX_SEQ)).toBe(true);
    expect(writer.granted(slot, 7)).toBe(false);
    launch(slot, 7, 3);
    expect(owner.flag(slot, MAX_SEQ)).toBeUndefined();
    expect(writer.end(slot, 7, 'done', { token: 1 })).toBe(false);
    expect(owner.state(slot, MAX_SEQ)).toBe('none');
    launch(slot, MAX_SEQ, MAX_MARK);
    expect(owner.flag(slot, MAX_SEQ)).toEqual({ mark: MAX_MARK, began: 100n, ended: 250n });
    owner.revoke(slot);
  });

  test('tells state, token and digest of a seq', () => {
    const slot = SLOTS;
    owner.grant(slot, 41);
    writer.progress(slot, 41, 'writing');
    expect(owner.state(slot, 41)).toBe('writing');
    writer.progress(slot, 41, 'last');
    expect(owner.state(slot, 41)).toBe('last');
    const digest = Uint8Array.from({ length: 32 }, (_, i) => i * 7);
    expect(writer.end(slot, 41, 'done', { token: 128_255, digest })).toBe(true);
    expect(owner.result(slot, 41)).toMatchObject({ state: 'done', token: 128_255, digest });
    owner.revoke(slot);
    owner.grant(slot, 42);
    expect(owner.result(slot, 42)).toMatchObject({ state: 'none', token: 0 });
    expect(owner.flag(slot, 42)).toBeUndefined();
    expect(writer.end(slot, 42, 'done')).toBe(true);
    expect(owner.result(slot, 42).token).toBe(NO_TOKEN);
  });

  test('that is revoked takes nothing more', () => {
    const slot = 3;
    owner.grant(slot, 50);
    owner.revoke(slot);
    expect(writer.granted(slot, 50)).toBe(false);
    expect(writer.end(slot, 50, 'done')).toBe(false);
  });
});

test.each([0, SLOTS + 1])('a page has no slot %i', (slot) => {
  expect(() => owner.grant(slot, 1)).toThrow(expect.objectContaining({ code: 'MESSAGE_INVALID' }));
});

test('the writer of a dead owner takes all grants back', () => {
  const slot = 4;
  owner.grant(slot, 60);
  writer.revokeAll();
  expect(writer.granted(slot, 60)).toBe(false);
});

test.each([
  ['of another size', PAGE_BYTES / 2],
  ['that is no page', PAGE_BYTES],
])('memory %s is refused', (_, size) => {
  const descriptor = createSharedMemory('pd-test', size);
  expect(() => WriterPage.map(descriptor)).toThrow(expect.objectContaining({ code: 'MESSAGE_INVALID' }));
  closeSync(descriptor);
});
