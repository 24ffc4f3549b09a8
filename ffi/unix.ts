/**
 * What Linux offers between processes and Node does not: Unix sockets that pass descriptors, and shared memory. Nothing here blocks; a
 * call that would have to returns undefined or throws. Descriptors are plain numbers, which `fs.closeSync` closes.
 */
import { closeSync, fstatSync, ftruncateSync } from 'node:fs';
import { getSystemErrorName } from 'node:util';
import { nativeError } from './errors.ts';
import { allocateNative, type Bound, bind, dlopen, lastErrno, nativeView, row } from './native.ts';
import type { FileDescriptor, SharedPointer } from './pointers.ts';

const UNIX = {
  // int socket(int domain, int type, int protocol)
  socket: row<[domain: number, type: number, protocol: number]>('int(int, int, int)'),
  // int bind(int fd, const struct sockaddr *addr, socklen_t len)
  bind: row<[fd: number, address: Uint8Array, length: number]>('int(int, void *, unsigned int)'),
  // int listen(int fd, int backlog)
  listen: row<[fd: number, backlog: number]>('int(int, int)'),
  // int connect(int fd, const struct sockaddr *addr, socklen_t len)
  connect: row<[fd: number, address: Uint8Array, length: number]>('int(int, void *, unsigned int)'),
  // int accept4(int fd, struct sockaddr *addr, socklen_t *len, int flags)
  accept4: row<[fd: number, address: null, length: null, flags: number]>('int(int, void *, void *, int)'),
  // ssize_t sendmsg(int fd, const struct msghdr *msg, int flags)
  sendmsg: row<[fd: number, message: bigint, flags: number]>('int64_t(int, void *, int)'),
  // ssize_t recvmsg(int fd, struct msghdr *msg, int flags)
  recvmsg: row<[fd: number, message: bigint, flags: number]>('int64_t(int, void *, int)'),
  // int getsockopt(int fd, int level, int name, void *value, socklen_t *len)
  getsockopt: row<[fd: number, level: number, name: number, value: Int32Array, length: Uint32Array]>(
    'int(int, int, int, void *, void *)',
  ),
  // int memfd_create(const char *name, unsigned int flags)
  memfd_create: row<[name: string, flags: number]>('int(const char *, unsigned int)'),
  // int fcntl(int fd, int command, int argument)
  fcntl: row<[fd: number, command: number, argument: number]>('int(int, int, int)'),
  // void *mmap(void *addr, size_t length, int prot, int flags, int fd, off_t offset)
  mmap: row<
    [address: null, bytes: number, protection: number, flags: number, fd: number, offset: number],
    bigint | null
  >('void *(void *, size_t, int, int, int, int64_t)'),
} as const;

// <sys/socket.h>, <linux/memfd.h>, <fcntl.h> and <sys/mman.h> of Linux; test/integration/unix.test.ts compares all of it with a C program
export const CONSTANTS = {
  AF_UNIX: 1,
  SOCK_STREAM: 1,
  SOCK_NONBLOCK: 0o4000,
  SOCK_CLOEXEC: 0o2000000,
  SOL_SOCKET: 1,
  SO_PEERCRED: 17,
  SCM_RIGHTS: 1,
  MSG_DONTWAIT: 0x40,
  MSG_NOSIGNAL: 0x4000,
  MSG_CTRUNC: 0x8,
  MSG_CMSG_CLOEXEC: 0x40000000,
  MFD_CLOEXEC: 1,
  MFD_ALLOW_SEALING: 2,
  F_SETFD: 2,
  FD_CLOEXEC: 1,
  F_ADD_SEALS: 1033,
  F_GET_SEALS: 1034,
  F_SEAL_SEAL: 1,
  F_SEAL_SHRINK: 2,
  F_SEAL_GROW: 4,
  PROT_READ: 1,
  PROT_WRITE: 2,
  MAP_SHARED: 1,
  EAGAIN: 11,
} as const;
const C = CONSTANTS;

/** Sizes and offsets of the structs that are read and written here (64-bit Linux). */
export const LAYOUTS = {
  sockaddr_un: { size: 110, sun_family: 0, sun_path: 2 },
  iovec: { size: 16, iov_base: 0, iov_len: 8 },
  msghdr: {
    size: 56,
    msg_name: 0,
    msg_namelen: 8,
    msg_iov: 16,
    msg_iovlen: 24,
    msg_control: 32,
    msg_controllen: 40,
    msg_flags: 48,
  },
  cmsghdr: { size: 16, cmsg_len: 0, cmsg_level: 8, cmsg_type: 12 },
  ucred: { size: 12, pid: 0, uid: 4, gid: 8 },
} as const;

/** Longest path of a Unix socket, in bytes, not counting the final zero. */
export const MAX_SOCKET_PATH = LAYOUTS.sockaddr_un.size - LAYOUTS.sockaddr_un.sun_path - 1;
/** Bytes of one message. */
export const MAX_MESSAGE = 64 * 2 ** 10;
/** Descriptors of one message. */
export const MAX_DESCRIPTORS = 8;

// one block of native memory for a call's structs, which the call has read when it returns
const CONTROL_BYTES = LAYOUTS.cmsghdr.size + 4 * MAX_DESCRIPTORS;
const IOV = LAYOUTS.msghdr.size + 8;
const CONTROL = IOV + LAYOUTS.iovec.size;
const DATA = 256;

interface Scratch {
  readonly address: bigint;
  readonly view: DataView;
  readonly data: Uint8Array;
}
let bound: Bound<typeof UNIX> | undefined;
let scratch: Scratch | undefined;

function libc(): Bound<typeof UNIX> {
  bound ??= bind(dlopen('libc.so.6'), UNIX);
  return bound;
}

function message(): Scratch {
  if (!scratch) {
    const address = allocateNative(DATA + MAX_MESSAGE);
    const bytes = nativeView(address, DATA + MAX_MESSAGE);
    scratch = {
      address,
      view: new DataView(bytes.buffer, bytes.byteOffset, DATA),
      data: bytes.subarray(DATA),
    };
  }
  return scratch;
}

function failed(call: string, what: string): Error {
  const errno = lastErrno();
  const name = errno > 0 ? getSystemErrorName(-errno) : 'no errno';
  return nativeError('SYSTEM_CALL_FAILED', `${what}: ${call} failed with ${name}`, { call, errno: name });
}

function checked(result: number, call: string, what: string): number {
  if (result < 0) throw failed(call, what);
  return result;
}

/** The result of the call, or undefined if it would block. */
function unlessBusy(result: number, call: string, what: string): number | undefined {
  if (result >= 0) return result;
  if (lastErrno() === C.EAGAIN) return undefined;
  throw failed(call, what);
}

function socketAddress(path: string): Uint8Array {
  const bytes = Buffer.from(path);
  if (bytes.length > MAX_SOCKET_PATH)
    throw nativeError(
      'SYSTEM_CALL_FAILED',
      `the path ${path} is longer than the ${MAX_SOCKET_PATH} bytes allowed for a Unix socket`,
      { path },
    );
  const address = new Uint8Array(LAYOUTS.sockaddr_un.size);
  new DataView(address.buffer).setUint16(LAYOUTS.sockaddr_un.sun_family, C.AF_UNIX, true);
  address.set(bytes, LAYOUTS.sockaddr_un.sun_path);
  return address;
}

function unixSocket(what: string): FileDescriptor {
  const type = C.SOCK_STREAM | C.SOCK_NONBLOCK | C.SOCK_CLOEXEC;
  return checked(libc().socket(C.AF_UNIX, type, 0), 'socket', what) as FileDescriptor;
}

/** A listening socket at `path`, which must not exist. Throws SYSTEM_CALL_FAILED. */
export function listenUnix(path: string): FileDescriptor {
  const what = `listening at ${path}`;
  const address = socketAddress(path);
  const fd = unixSocket(what);
  try {
    checked(libc().bind(fd, address, address.length), 'bind', what);
    checked(libc().listen(fd, 128), 'listen', what);
  } catch (error) {
    closeSync(fd);
    throw error;
  }
  return fd;
}

/** The next connection pending at a listening socket, if any. */
export function acceptUnix(listener: FileDescriptor): FileDescriptor | undefined {
  const flags = C.SOCK_NONBLOCK | C.SOCK_CLOEXEC;
  return unlessBusy(libc().accept4(listener, null, null, flags), 'accept4', 'a Unix socket') as
    | FileDescriptor
    | undefined;
}

/** A connection to `path`; undefined if its backlog is full. Throws SYSTEM_CALL_FAILED if nothing listens there. */
export function connectUnix(path: string): FileDescriptor | undefined {
  const what = `connecting to ${path}`;
  const address = socketAddress(path);
  const fd = unixSocket(what);
  try {
    if (unlessBusy(libc().connect(fd, address, address.length), 'connect', what) !== undefined) return fd;
  } catch (error) {
    closeSync(fd);
    throw error;
  }
  closeSync(fd);
  return undefined;
}

export interface PeerCredentials {
  /** 0 if the peer is in a PID namespace that this process cannot see. */
  readonly pid: number;
  readonly uid: number;
}

/** SO_PEERCRED: the process that created the other end, according to the kernel. */
export function peerCredentials(fd: FileDescriptor): PeerCredentials {
  const value = new Int32Array(LAYOUTS.ucred.size / 4);
  const length = Uint32Array.of(LAYOUTS.ucred.size);
  checked(libc().getsockopt(fd, C.SOL_SOCKET, C.SO_PEERCRED, value, length), 'getsockopt', 'SO_PEERCRED');
  return { pid: value[LAYOUTS.ucred.pid / 4]!, uid: value[LAYOUTS.ucred.uid / 4]! >>> 0 };
}

function prepare(bytes: number, controlBytes: number): Scratch {
  const block = message();
  const { view, address } = block;
  new Uint8Array(view.buffer, view.byteOffset, DATA).fill(0);
  view.setBigUint64(LAYOUTS.msghdr.msg_iov, address + BigInt(IOV), true);
  view.setBigUint64(LAYOUTS.msghdr.msg_iovlen, 1n, true);
  view.setBigUint64(IOV + LAYOUTS.iovec.iov_base, address + BigInt(DATA), true);
  view.setBigUint64(IOV + LAYOUTS.iovec.iov_len, BigInt(bytes), true);
  if (controlBytes > 0) {
    view.setBigUint64(LAYOUTS.msghdr.msg_control, address + BigInt(CONTROL), true);
    view.setBigUint64(LAYOUTS.msghdr.msg_controllen, BigInt(controlBytes), true);
  }
  return block;
}

/** Sends all of `bytes` with copies of the descriptors. Throws SYSTEM_CALL_FAILED, also if the socket's buffer has no room for it. */
export function sendDescriptors(
  fd: FileDescriptor,
  bytes: Uint8Array,
  descriptors: readonly FileDescriptor[],
): void {
  if (bytes.length > MAX_MESSAGE || descriptors.length > MAX_DESCRIPTORS)
    throw nativeError(
      'SYSTEM_CALL_FAILED',
      `a message of ${bytes.length} bytes and ${descriptors.length} descriptors is too long`,
    );
  const length = LAYOUTS.cmsghdr.size + 4 * descriptors.length;
  // CMSG_SPACE: a multiple of 8
  const { view, address, data } = prepare(
    bytes.length,
    descriptors.length === 0 ? 0 : Math.ceil(length / 8) * 8,
  );
  data.set(bytes);
  if (descriptors.length > 0) {
    view.setBigUint64(CONTROL + LAYOUTS.cmsghdr.cmsg_len, BigInt(length), true);
    view.setInt32(CONTROL + LAYOUTS.cmsghdr.cmsg_level, C.SOL_SOCKET, true);
    view.setInt32(CONTROL + LAYOUTS.cmsghdr.cmsg_type, C.SCM_RIGHTS, true);
    for (const [i, descriptor] of descriptors.entries())
      view.setInt32(CONTROL + LAYOUTS.cmsghdr.size + 4 * i, descriptor, true);
  }
  const sent = checked(
    libc().sendmsg(fd, address, C.MSG_DONTWAIT | C.MSG_NOSIGNAL),
    'sendmsg',
    'a Unix socket',
  );
  if (sent !== bytes.length)
    throw nativeError('SYSTEM_CALL_FAILED', `a Unix socket took ${sent} of ${bytes.length} bytes`);
}

export interface Received {
  /** Empty at the end of the stream. */
  readonly bytes: Uint8Array;
  /** Open in this process now: the caller closes each. */
  readonly descriptors: readonly FileDescriptor[];
}

/**
 * At most `most` of the bytes that have arrived, with their descriptors; undefined if nothing has. More than MAX_DESCRIPTORS descriptors
 * are refused, and all of them closed. Throws SYSTEM_CALL_FAILED.
 */
export function receiveDescriptors(fd: FileDescriptor, most: number): Received | undefined {
  const { view, address, data } = prepare(Math.min(most, MAX_MESSAGE), CONTROL_BYTES);
  const flags = C.MSG_DONTWAIT | C.MSG_CMSG_CLOEXEC;
  const got = unlessBusy(libc().recvmsg(fd, address, flags), 'recvmsg', 'a Unix socket');
  if (got === undefined) return undefined;
  const descriptors: FileDescriptor[] = [];
  const controlBytes = Number(view.getBigUint64(LAYOUTS.msghdr.msg_controllen, true));
  if (controlBytes >= LAYOUTS.cmsghdr.size) {
    const length = Number(view.getBigUint64(CONTROL + LAYOUTS.cmsghdr.cmsg_len, true));
    const rights =
      view.getInt32(CONTROL + LAYOUTS.cmsghdr.cmsg_level, true) === C.SOL_SOCKET &&
      view.getInt32(CONTROL + LAYOUTS.cmsghdr.cmsg_type, true) === C.SCM_RIGHTS;
    for (let at = LAYOUTS.cmsghdr.size; rights && at + 4 <= length; at += 4)
      descriptors.push(view.getInt32(CONTROL + at, true) as FileDescriptor);
  }
  if ((view.getInt32(LAYOUTS.msghdr.msg_flags, true) & C.MSG_CTRUNC) !== 0) {
    for (const descriptor of descriptors) closeSync(descriptor);
    throw nativeError('SYSTEM_CALL_FAILED', `more than ${MAX_DESCRIPTORS} descriptors came in one message`);
  }
  return { bytes: data.slice(0, got), descriptors };
}

/** Keeps a descriptor from being inherited by programs that this process starts. */
export function closeOnExec(fd: FileDescriptor): void {
  checked(libc().fcntl(fd, C.F_SETFD, C.FD_CLOEXEC), 'fcntl(F_SETFD)', 'a descriptor');
}

/** A descriptor of `bytes` zeroed bytes of memory, sealed in size. */
export function createSharedMemory(name: string, bytes: number): FileDescriptor {
  const flags = C.MFD_CLOEXEC | C.MFD_ALLOW_SEALING;
  const fd = checked(libc().memfd_create(name, flags), 'memfd_create', name) as FileDescriptor;
  try {
    ftruncateSync(fd, bytes);
    const seals = C.F_SEAL_SHRINK | C.F_SEAL_GROW | C.F_SEAL_SEAL;
    checked(libc().fcntl(fd, C.F_ADD_SEALS, seals), 'fcntl(F_ADD_SEALS)', name);
  } catch (error) {
    closeSync(fd);
    throw error;
  }
  return fd;
}

/**
 * Maps all of a descriptor's memory, for reading and writing. Throws SYSTEM_CALL_FAILED, and MESSAGE_INVALID if it is not `bytes` long or
 * not sealed in size: it could then shrink, and the next access would kill the process.
 */
export function mapSharedMemory(fd: FileDescriptor, bytes: number, what: string): SharedPointer {
  const size = fstatSync(fd).size;
  if (size !== bytes)
    throw nativeError('MESSAGE_INVALID', `${what} has ${size} bytes, not ${bytes}`, { what });
  // fails if the descriptor is not of memory that can be sealed
  const seals = libc().fcntl(fd, C.F_GET_SEALS, 0);
  if (seals < 0 || (seals & C.F_SEAL_SHRINK) === 0)
    throw nativeError('MESSAGE_INVALID', `${what} is not sealed in size`, { what });
  const address = libc().mmap(null, bytes, C.PROT_READ | C.PROT_WRITE, C.MAP_SHARED, fd, 0);
  if (address === null || address === 0xffff_ffff_ffff_ffffn) throw failed('mmap', what);
  return address as SharedPointer;
}
