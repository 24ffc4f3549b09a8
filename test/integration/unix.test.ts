import { execFileSync } from 'node:child_process';
import {
  closeSync,
  fstatSync,
  ftruncateSync,
  openSync,
  readFileSync,
  readlinkSync,
  writeFileSync,
  writeSync,
} from 'node:fs';
import { userInfo } from 'node:os';
import { join } from 'node:path';
import { expect, test } from 'vitest';
import { nativeView } from '../../ffi/native.ts';
import type { FileDescriptor } from '../../ffi/pointers.ts';
import {
  acceptUnix,
  CONSTANTS,
  connectUnix,
  createSharedMemory,
  LAYOUTS,
  listenUnix,
  MAX_DESCRIPTORS,
  mapSharedMemory,
  peerCredentials,
  receiveDescriptors,
  sendDescriptors,
} from '../../ffi/unix.ts';
import { tempDir } from '../support/temp-dir.ts';

test('constants and offsets are those of a C program', async () => {
  const folder = await tempDir();
  const rows = Object.entries(CONSTANTS).map(([name]) => `ROW("${name}", (long)${name})`);
  for (const [struct, { size: _, ...fields }] of Object.entries(LAYOUTS)) {
    rows.push(`ROW("${struct}", sizeof(struct ${struct}))`);
    for (const field of Object.keys(fields))
      rows.push(`ROW("${struct}.${field}", offsetof(struct ${struct}, ${field}))`);
  }
  const source = join(folder, 'layouts.c');
  writeFileSync(
    source,
    `#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/un.h>
#define ROW(name, value) printf("%s %ld\\n", name, (long)(value));
int main(void) { ${rows.join('\n')} }`,
  );
  execFileSync('gcc', ['-o', join(folder, 'layouts'), source]);
  const there = execFileSync(join(folder, 'layouts'), { encoding: 'utf8' }).trim().split('\n');
  const here: string[] = Object.entries(CONSTANTS).map(([name, value]) => `${name} ${value}`);
  for (const [struct, { size, ...fields }] of Object.entries(LAYOUTS)) {
    here.push(`${struct} ${size}`);
    for (const [field, offset] of Object.entries(fields)) here.push(`${struct}.${field} ${offset}`);
  }
  expect(here).toEqual(there);
});

async function connected() {
  const path = join(await tempDir(), 'socket');
  const listener = listenUnix(path);
  expect(acceptUnix(listener)).toBeUndefined();
  const client = connectUnix(path)!;
  const server = acceptUnix(listener)!;
  closeSync(listener);
  return { client, server };
}

test('a descriptor crosses a Unix socket with its bytes, and is the same file there', async () => {
  const { client, server } = await connected();
  expect(receiveDescriptors(server, 10)).toBeUndefined();
  const file = join(await tempDir(), 'file');
  const fd = openSync(file, 'w') as FileDescriptor;
  sendDescriptors(client, Buffer.from('12345'), [fd]);
  const received = receiveDescriptors(server, 2)!;
  expect(Buffer.from(received.bytes).toString()).toBe('12');
  expect(received.descriptors).toHaveLength(1);
  expect(Buffer.from(receiveDescriptors(server, 10)!.bytes).toString()).toBe('345');
  writeSync(received.descriptors[0]!, 'through it');
  expect(readFileSync(file, 'utf8')).toBe('through it');
  expect(peerCredentials(server)).toMatchObject({ pid: process.pid, uid: userInfo().uid });
  closeSync(client);
  expect(receiveDescriptors(server, 10)!.bytes).toHaveLength(0);
  for (const each of [fd, server, ...received.descriptors]) closeSync(each);
});

test('more descriptors than are taken: refused', async () => {
  const { client, server } = await connected();
  const fd = createSharedMemory('pd-test', 8);
  const many = Array.from({ length: MAX_DESCRIPTORS + 1 }, () => fd);
  expect(() => sendDescriptors(client, Buffer.from('x'), many)).toThrow('too long');
  for (const each of [fd, client, server]) closeSync(each);
});

test('nobody listening is an error with its name, a long path too', async () => {
  const folder = await tempDir();
  expect(() => connectUnix(join(folder, 'none'))).toThrow(
    expect.objectContaining({
      code: 'SYSTEM_CALL_FAILED',
      context: expect.objectContaining({ errno: 'ENOENT' }),
    }),
  );
  expect(() => listenUnix(join(folder, 'x'.repeat(108)))).toThrow('longer than the 107 bytes');
});

test('shared memory: both mappings are one, nobody changes its size, and what is not sealed is refused', async () => {
  const fd = createSharedMemory('pd-test', 4_096);
  const [a, b] = [mapSharedMemory(fd, 4_096, 'a test'), mapSharedMemory(fd, 4_096, 'a test')];
  nativeView(a, 4_096)[17] = 99;
  expect(nativeView(b, 4_096)[17]).toBe(99);
  expect(() => ftruncateSync(fd, 1)).toThrow('EPERM');
  expect(() => ftruncateSync(fd, 8_192)).toThrow('EPERM');
  expect(fstatSync(fd).size).toBe(4_096);
  expect(readlinkSync(`/proc/self/fd/${fd}`)).toContain('memfd:pd-test');
  expect(() => mapSharedMemory(fd, 4_095, 'a test')).toThrow('has 4096 bytes, not 4095');
  closeSync(fd);
  const file = openSync(join(await tempDir(), 'file'), 'w+') as FileDescriptor;
  ftruncateSync(file, 4_096);
  expect(() => mapSharedMemory(file, 4_096, 'a test')).toThrow('not sealed');
  closeSync(file);
});
