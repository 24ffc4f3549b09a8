import { afterEach, expect, test, vi } from 'vitest';
import { nativeEnvironment, setNativeDefault, setNativeDefaults } from '../../../ffi/libc.ts';
import { ncclEnvironment } from '../../../src/device/native-env.ts';

afterEach(() => vi.unstubAllEnvs());

test('a default reaches the C library, and never replaces what the user has set', () => {
  setNativeDefault('PD_TEST_DEFAULT', 'ours');
  expect(nativeEnvironment('PD_TEST_DEFAULT')).toBe('ours');
  setNativeDefault('PD_TEST_DEFAULT', 'later');
  expect(nativeEnvironment('PD_TEST_DEFAULT')).toBe('ours');
  expect(process.env['PD_TEST_DEFAULT']).toBe('ours');
});

test("what NCCL's bootstrap is to take reaches the C library", () => {
  setNativeDefaults(ncclEnvironment('127.0.0.1', '127.0.0.1'));
  expect(nativeEnvironment('NCCL_SOCKET_IFNAME')).toBe('=lo');
  expect(nativeEnvironment('NCCL_SOCKET_FAMILY')).toBe('AF_INET');
});
