/** NCCL 2.18 and later: non-blocking communicators of two ranks. No method waits, except `abort`. */

import { type CallContext, nativeError, statusError } from './errors.ts';
import { loadLibrary } from './load.ts';
import {
  allocateNative,
  type Bound,
  bind,
  byteArrayStruct,
  freeNative,
  type NativeLibrary,
  nativeView,
  row,
} from './native.ts';
import type { CudaStreamHandle, NativePointer, NcclCommHandle } from './pointers.ts';

/** NCCL_UNIQUE_ID_BYTES. */
const UNIQUE_ID_BYTES = 128;
byteArrayStruct('ncclUniqueId', UNIQUE_ID_BYTES);

type Exchange = [
  ...[buffer: bigint, count: number, type: number],
  ...[peer: number, comm: NcclCommHandle, stream: CudaStreamHandle],
];

const NCCL = {
  // ncclResult_t ncclGetVersion(int *version)
  ncclGetVersion: row<[version: Int32Array]>('int(void *)'),
  // ncclResult_t ncclGetUniqueId(ncclUniqueId *uniqueId)
  ncclGetUniqueId: row<[id: Uint8Array]>('int(void *)'),
  // ncclResult_t ncclCommInitRankConfig(ncclComm_t *comm, int nranks, ncclUniqueId commId, int rank, ncclConfig_t *config)
  ncclCommInitRankConfig: row<
    [comm: NativePointer, ranks: number, id: { internal: Uint8Array }, rank: number, config: Uint8Array]
  >('int(void *, int, ncclUniqueId, int, void *)'),
  // ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t *asyncError)
  ncclCommGetAsyncError: row<[comm: NcclCommHandle, error: Int32Array]>('int(void *, void *)'),
  // ncclResult_t ncclCommFinalize(ncclComm_t comm)
  ncclCommFinalize: row<[comm: NcclCommHandle]>('int(void *)'),
  // ncclResult_t ncclCommAbort(ncclComm_t comm)
  ncclCommAbort: row<[comm: NcclCommHandle]>('int(void *)'),
  // ncclResult_t ncclGroupStart(void)
  ncclGroupStart: row<[]>('int()'),
  // ncclResult_t ncclGroupEnd(void)
  ncclGroupEnd: row<[]>('int()'),
  // ncclResult_t ncclSend(const void *sendbuff, size_t count, ncclDataType_t datatype, int peer, ncclComm_t comm, cudaStream_t stream)
  ncclSend: row<Exchange>('int(void *, size_t, int, int, void *, void *)'),
  // ncclResult_t ncclRecv(void *recvbuff, size_t count, ncclDataType_t datatype, int peer, ncclComm_t comm, cudaStream_t stream)
  ncclRecv: row<Exchange>('int(void *, size_t, int, int, void *, void *)'),
  // const char *ncclGetErrorString(ncclResult_t result)
  ncclGetErrorString: row<[result: number], string | null>('const char *(int)'),
  // const char *ncclGetLastError(ncclComm_t comm)
  ncclGetLastError: row<[comm: NcclCommHandle | null], string | null>('const char *(void *)'),
} as const;

const SUCCESS = 0;
const IN_PROGRESS = 7;
const REMOTE_ERROR = 6;
/** The peers exchange bytes, whatever the element type. */
const NCCL_UINT8 = 1;

/** 2.18: before that, `blocking = 0` is unreliable. */
const MINIMUM = 21_800;
/** Since 2.27 several communicators may be in progress in one thread. */
const CONCURRENT_SINCE = 22_700;

/**
 * `ncclConfig_t` as it was in 2.17, 40 bytes. It only ever grows at its end, and each release uses defaults for what `size` and
 * `version` leave out; so the oldest one that has what we set works with all.
 */
const CONFIG = { bytes: 40, magic: 0xcafebeef, version: 21_700, undefinedInt: -(2 ** 31) } as const;

export interface CommConfig {
  /** `minCTAs` and `maxCTAs`: the thread blocks, that is the channels, of this communicator. */
  readonly channels: number;
}

export type SettleState = 'settled' | 'in-progress';

/** A region of GPU or page-locked host memory. */
export interface Region {
  readonly pointer: bigint;
  readonly bytes: number;
}

/** A communicator whose init is in progress: NCCL writes its handle at any time, so the memory for it must outlive the call. */
export interface CommSlot {
  readonly handle: () => NcclCommHandle | undefined;
  /** Only after init has settled. */
  readonly release: () => void;
}

export class Libnccl {
  readonly library: NativeLibrary;
  /** 22809 for 2.28.9. */
  readonly version: number;
  readonly #call: Bound<typeof NCCL>;
  readonly #int = new Int32Array(1);

  constructor(library: NativeLibrary) {
    this.library = library;
    this.#call = bind(library, NCCL);
    this.#check(this.#call.ncclGetVersion(this.#int), 'ncclGetVersion');
    this.version = this.#int[0]!;
    if (this.version < MINIMUM) {
      throw nativeError(
        'LIBRARY_TOO_OLD',
        `${library.path} is NCCL ${formatNcclVersion(this.version)}; 2.27 or later is recommended, 2.18 is the minimum`,
        { version: this.version },
      );
    }
  }

  /** Such as `2.28.9`. */
  get versionText(): string {
    return formatNcclVersion(this.version);
  }

  /** False: at most one communicator of this thread may be in progress at any time. */
  get concurrent(): boolean {
    return this.version >= CONCURRENT_SINCE;
  }

  /** 128 bytes. */
  uniqueId(): Uint8Array {
    const id = new Uint8Array(UNIQUE_ID_BYTES);
    this.#check(this.#call.ncclGetUniqueId(id), 'ncclGetUniqueId', { what: 'making an id for a new pair' });
    return id;
  }

  /** Starts a non-blocking init on the current device; poll `state` until it settles. */
  initRank(id: Uint8Array, rank: 0 | 1, config: CommConfig, what: string): CommSlot {
    // koffi would silently pad a short array with zeros
    if (id.length !== UNIQUE_ID_BYTES) {
      throw nativeError(
        'MESSAGE_INVALID',
        `${what}: the unique id has ${id.length} bytes, not ${UNIQUE_ID_BYTES}`,
      );
    }
    const place = allocateNative(8);
    const view = nativeView(place, 8);
    const words = new BigUint64Array(view.buffer, view.byteOffset, 1);
    let released = false;
    const status = this.#call.ncclCommInitRankConfig(place, 2, { internal: id }, rank, configBytes(config));
    if (status !== IN_PROGRESS && status !== SUCCESS) {
      freeNative(place);
      this.#check(status, 'ncclCommInitRankConfig', { what });
    }
    return {
      handle: () => (released || words[0] === 0n ? undefined : (words[0] as NcclCommHandle)),
      release: () => {
        if (!released) freeNative(place);
        released = true;
      },
    };
  }

  /** Whether the last call on `comm` has completed. Throws PEER_LOST or NCCL_ERROR if it failed. */
  state(comm: NcclCommHandle, what: string): SettleState {
    this.#check(this.#call.ncclCommGetAsyncError(comm, this.#int), 'ncclCommGetAsyncError', { what });
    const status = this.#int[0]!;
    if (status === IN_PROGRESS) return 'in-progress';
    this.#check(status, 'asynchronous work', { what }, comm);
    return 'settled';
  }

  /** Enqueues all regions as one group. The call may still be in progress when this returns: poll `state` before the next one. */
  exchange(
    direction: 'send' | 'receive',
    regions: readonly Region[],
    comm: NcclCommHandle,
    peer: 0 | 1,
    stream: CudaStreamHandle,
    what: string,
  ): void {
    const operation = direction === 'send' ? this.#call.ncclSend : this.#call.ncclRecv;
    const name = direction === 'send' ? 'ncclSend' : 'ncclRecv';
    this.#check(this.#call.ncclGroupStart(), 'ncclGroupStart', { what });
    let failed: Error | undefined;
    for (const { pointer, bytes } of regions) {
      const status = operation(pointer, bytes, NCCL_UINT8, peer, comm, stream);
      if (status === SUCCESS || status === IN_PROGRESS) continue;
      failed = this.#error(status, name, { what }, comm);
      break;
    }
    // a group must be ended, or every later call of this thread joins it
    const status = this.#call.ncclGroupEnd();
    if (failed) throw failed;
    if (status !== IN_PROGRESS) this.#check(status, 'ncclGroupEnd', { what }, comm);
  }

  /** Begins to close it; settles once the peer has done the same. */
  finalize(comm: NcclCommHandle, what: string): void {
    const status = this.#call.ncclCommFinalize(comm);
    if (status !== IN_PROGRESS) this.#check(status, 'ncclCommFinalize', { what }, comm);
  }

  /** Blocks on the whole device, indefinitely: to be called on a throwaway thread only. */
  abort(comm: NcclCommHandle): void {
    this.#check(this.#call.ncclCommAbort(comm), 'ncclCommAbort');
  }

  #check(status: number, call: string, context: CallContext = {}, comm: NcclCommHandle | null = null): void {
    if (status !== SUCCESS) throw this.#error(status, call, context, comm);
  }

  #error(status: number, call: string, context: CallContext, comm: NcclCommHandle | null): Error {
    const last = this.#call.ncclGetLastError(comm)?.trim();
    const text = `${this.#call.ncclGetErrorString(status) ?? 'unknown'}${last ? ` (${last})` : ''}`;
    return statusError(status === REMOTE_ERROR ? 'PEER_LOST' : 'NCCL_ERROR', call, status, text, context);
  }
}

function configBytes(config: CommConfig): Uint8Array {
  const bytes = new Uint8Array(CONFIG.bytes);
  const view = new DataView(bytes.buffer);
  view.setBigUint64(0, BigInt(CONFIG.bytes), true); // size
  view.setUint32(8, CONFIG.magic, true); // magic
  view.setUint32(12, CONFIG.version, true); // version
  view.setInt32(16, 0, true); // blocking
  view.setInt32(20, CONFIG.undefinedInt, true); // cgaClusterSize
  view.setInt32(24, config.channels, true); // minCTAs
  view.setInt32(28, config.channels, true); // maxCTAs
  view.setBigUint64(32, 0n, true); // netName
  return bytes;
}

/** 22809 as `2.28.9`. */
export function formatNcclVersion(version: number): string {
  return `${Math.trunc(version / 10_000)}.${Math.trunc(version / 100) % 100}.${version % 100}`;
}

let nccl: Libnccl | undefined;

/** This thread's NCCL. Throws LIBRARY_NOT_FOUND or LIBRARY_TOO_OLD. */
export function loadLibnccl(): Libnccl {
  nccl ??= new Libnccl(loadLibrary('nccl'));
  return nccl;
}
