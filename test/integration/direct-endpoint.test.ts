import { chmodSync, closeSync, existsSync, mkdirSync, symlinkSync, writeFileSync } from 'node:fs';
import { connect as connectNet } from 'node:net';
import { userInfo } from 'node:os';
import { join } from 'node:path';
import { afterEach, describe, expect, test } from 'vitest';
import { connectUnix, createSharedMemory, listenUnix } from '../../ffi/unix.ts';
import type { PdError } from '../../src/errors.ts';
import { claimsOf } from '../../src/transport/direct/claims.ts';
import {
  DirectEndpoint,
  type DirectLink,
  type EndpointOptions,
  type Offer,
  socketFolder,
} from '../../src/transport/direct/endpoint.ts';
import { OwnerPage, WriterPage } from '../../src/transport/direct/page.ts';
import { sharedTempDir, tempDir } from '../support/temp-dir.ts';

const root = sharedTempDir();
const folder = join(root, 'sockets');
const endpoints: DirectEndpoint[] = [];
afterEach(async () => {
  await Promise.all(endpoints.splice(0).map((endpoint) => endpoint.dispose()));
});

const layout = {
  family: 'mla',
  numBlocks: 4,
  blockSize: 16,
  heads: 1,
  headDim: 64,
  dtype: 'bfloat16',
} as const;
const claims = claimsOf(layout, 8_192, [{ name: 'a', offset: 0 }]);

async function listen(nonce: string, options: Partial<EndpointOptions> = {}) {
  const links: DirectLink[] = [];
  const refused: PdError[] = [];
  const endpoint = await DirectEndpoint.listen({
    folder,
    nonce,
    admit: () => ({ offer: undefined }),
    onLink: (link) => links.push(link),
    onRefused: (error) => refused.push(error),
    ...options,
  });
  endpoints.push(endpoint);
  return { endpoint, links, refused };
}
const refusal = (message: string) => ({ code: 'DIRECT_REFUSED', message: expect.stringContaining(message) });

test('an offer and its page cross, each end says what became of it, and the end of one is seen by the other', async () => {
  const made = OwnerPage.create();
  const offer: Offer = { claims, cache: createSharedMemory('pd-test', 8_192), page: made.descriptor };
  const owner = await listen('owner', { admit: (nonce) => (nonce === 'writer' ? { offer } : undefined) });
  const writer = await listen('writer');
  const link = await writer.endpoint.connect({ path: owner.endpoint.path, nonce: 'owner' });
  expect(link.offer?.claims).toEqual(claims);
  const page = new OwnerPage(made.ref);
  const slot = 9;
  page.grant(slot, 5);
  expect(new WriterPage(WriterPage.map(link.offer!.page)).granted(slot, 5)).toBe(true);
  link.tell({ mapped: true });
  expect(await owner.links[0]!.verdict).toEqual({ mapped: true });
  owner.links[0]!.tell({ mapped: false, why: 'too small' });
  expect(await link.verdict).toEqual({ mapped: false, why: 'too small' });
  link.close();
  await owner.links[0]!.ended;
  for (const { cache, page: fd } of [offer, link.offer!]) for (const each of [cache, fd]) closeSync(each);
});

test('an end that never says whether it could map is taken at its silence', async () => {
  const owner = await listen('owner', { verdictTimeoutMs: 1 });
  const writer = await listen('writer');
  await writer.endpoint.connect({ path: owner.endpoint.path, nonce: 'owner' });
  expect(await owner.links[0]!.verdict).toEqual({
    mapped: false,
    why: expect.stringContaining('did not say within'),
  });
});

test('a connection that opens while its endpoint is disposed is closed again', async () => {
  const owner = await listen('owner');
  const writer = await listen('writer');
  const connecting = writer.endpoint.connect({ path: owner.endpoint.path, nonce: 'owner' });
  await Promise.all([
    expect(connecting).rejects.toMatchObject({ code: 'ENGINE_CLOSED' }),
    writer.endpoint.dispose(),
  ]);
  await owner.links[0]?.ended;
});

test('many at once are each answered', async () => {
  const owner = await listen('owner');
  const writers = await Promise.all(Array.from({ length: 8 }, (_, i) => listen(`writer ${i}`)));
  await Promise.all(
    writers.map(({ endpoint }) => endpoint.connect({ path: owner.endpoint.path, nonce: 'owner' })),
  );
  expect(owner.links.map(({ peer }) => peer).sort()).toEqual(writers.map((_, i) => `writer ${i}`));
});

describe('refused, at both ends and by name', () => {
  test('a process whose hello is unknown', async () => {
    const owner = await listen('owner', { admit: () => undefined });
    const writer = await listen('writer');
    await expect(
      writer.endpoint.connect({ path: owner.endpoint.path, nonce: 'owner' }),
    ).rejects.toMatchObject(refusal('no hello of that process'));
    expect(owner.refused[0]).toMatchObject({ context: { nonce: 'writer' } });
  });

  test('another process on the path than its hello said', async () => {
    const owner = await listen('restarted');
    const writer = await listen('writer');
    await expect(
      writer.endpoint.connect({ path: owner.endpoint.path, nonce: 'owner' }),
    ).rejects.toMatchObject(refusal('another process'));
    expect(owner.links).toEqual([]);
  });

  test('another user', async () => {
    const owner = await listen('owner', { uid: userInfo().uid + 1 });
    const writer = await listen('writer');
    await expect(
      writer.endpoint.connect({ path: owner.endpoint.path, nonce: 'owner' }),
    ).rejects.toMatchObject(refusal(`belongs to user ${userInfo().uid}`));
  });

  test('nobody there, and somebody who never answers', async () => {
    const writer = await listen('writer');
    await expect(writer.endpoint.connect({ path: join(folder, 'none'), nonce: 'x' })).rejects.toMatchObject(
      refusal('ENOENT'),
    );
    const silent = join(folder, 'silent');
    const fds = [listenUnix(silent), listenUnix(`${silent}.bell`)];
    await expect(writer.endpoint.connect({ path: silent, nonce: 'x', timeoutMs: 20 })).rejects.toMatchObject(
      refusal('no answer within 20 ms'),
    );
    for (const fd of fds) closeSync(fd);
  });

  test('a connection that says nothing', async () => {
    const owner = await listen('owner');
    const fd = connectUnix(owner.endpoint.path)!;
    const bell = connectNet(`${owner.endpoint.path}.bell`);
    await new Promise((resolve) => bell.once('data', resolve));
    expect(owner.refused[0]).toMatchObject({ code: 'MESSAGE_INVALID', message: 'a frame that is cut short' });
    bell.destroy();
    closeSync(fd);
  });
});

describe('the folder', () => {
  test('is made for this user alone; another mode, a link or a file is refused', async () => {
    const dir = await tempDir();
    expect(socketFolder(join(dir, 'new'))).toBe(join(dir, 'new'));
    chmodSync(join(dir, 'new'), 0o750);
    expect(() => socketFolder(join(dir, 'new'))).toThrow('its mode is 750, not 700');
    mkdirSync(join(dir, 'real'), { mode: 0o700 });
    symlinkSync(join(dir, 'real'), join(dir, 'link'));
    expect(() => socketFolder(join(dir, 'link'))).toThrow('it is no folder');
    writeFileSync(join(dir, 'file'), '');
    expect(() => socketFolder(join(dir, 'file'))).toThrow(
      expect.objectContaining({ code: 'DIRECT_REFUSED' }),
    );
  });

  test('loses the names of workers that were killed, and keeps those that live', async () => {
    const alive = await listen('alive');
    const dead = join(folder, '0123456789abcdef');
    closeSync(listenUnix(dead));
    const other = await listen('other');
    expect([existsSync(dead), existsSync(alive.endpoint.path)]).toEqual([false, true]);
    expect(other.endpoint.path).not.toBe(alive.endpoint.path);
    await alive.endpoint.dispose();
    expect(existsSync(alive.endpoint.path)).toBe(false);
  });
});
