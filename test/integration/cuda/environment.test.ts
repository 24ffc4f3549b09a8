import { afterEach, expect, test, vi } from 'vitest';
import { interfaceOf, prepareNcclEnvironment } from '../../../ffi/environment.ts';
import { nativeEnvironment, setNativeDefault } from '../../../ffi/libc.ts';

afterEach(() => vi.unstubAllEnvs());

test('a default reaches the C library, and never replaces what the user has set', () => {
  setNativeDefault('PD_TEST_DEFAULT', 'ours');
  expect(nativeEnvironment('PD_TEST_DEFAULT')).toBe('ours');
  setNativeDefault('PD_TEST_DEFAULT', 'later');
  expect(nativeEnvironment('PD_TEST_DEFAULT')).toBe('ours');
  expect(process.env['PD_TEST_DEFAULT']).toBe('ours');
});

test("NCCL's bootstrap takes the interface and family of the KV address", () => {
  prepareNcclEnvironment('127.0.0.1');
  expect(nativeEnvironment('NCCL_SOCKET_IFNAME')).toBe(`=${interfaceOf('127.0.0.1')}`);
  expect(nativeEnvironment('NCCL_SOCKET_FAMILY')).toBe('AF_INET');
  expect(interfaceOf('192.0.2.200')).toBeUndefined();
});
