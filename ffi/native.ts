/** koffi, set up once per thread, and tables of functions bound with their TypeScript types. */
import koffi, { type LibraryHandle, type TypeObject } from 'koffi';
import { nativeError } from './errors.ts';
import type { NativePointer } from './pointers.ts';

/** koffi runs calls on stacks of its own, 2 MiB by default; CUDA and NCCL overflow that (SIGSEGV). Bytes. */
const CALL_STACK = 16 * 2 ** 20;
let configured = false;

/** A dlopen'ed library. */
export interface NativeLibrary {
  /** The path or name passed to the loader. */
  readonly path: string;
  readonly handle: LibraryHandle;
}

/** Opens one library; throws koffi's own error. Every thread has its own koffi, so the stack size is set in each. */
export function dlopen(path: string | null): NativeLibrary {
  if (!configured) {
    koffi.config({ sync_stack_size: CALL_STACK });
    configured = true;
  }
  const handle = koffi.load(path);
  if (path !== null) keepLoaded(path);
  return { path: path ?? 'this process', handle };
}

// <dlfcn.h> of Linux: RTLD_NOW, RTLD_NOLOAD (only if already loaded), RTLD_NODELETE
const KEEP = 0x2 | 0x4 | 0x1000;
let pin: ReturnType<LibraryHandle['func']> | undefined;

/**
 * koffi closes its libraries when its thread ends, and the last to close one unmaps it under the threads that the library itself
 * started (NCCL's, the driver's): a SIGSEGV some time later. So a library that was loaded stays for the life of the process.
 */
function keepLoaded(path: string): void {
  if (process.platform !== 'linux') return;
  // void *dlopen(const char *path, int flags)
  pin ??= koffi.load(null).func('dlopen', 'void *', ['const char *', 'int']);
  pin(path, KEEP);
}

/** One row of a table: the types of a C function for koffi, `int(void *, size_t)`, and TypeScript ones for the caller. */
interface Row<Args extends readonly unknown[], Result> {
  readonly signature: string;
  /** Carries the types; never set. */
  readonly call?: (...args: Args) => Result;
}

export function row<Args extends readonly unknown[], Result = number>(signature: string): Row<Args, Result> {
  return { signature };
}

export type Bound<Table> = {
  readonly [Name in keyof Table]: Table[Name] extends Row<infer Args, infer Result>
    ? (...args: Args) => Result
    : never;
};

/** Binds every row of `table`. Throws LIBRARY_TOO_OLD if a symbol is missing. */
export function bind<Table extends Record<string, Row<never, unknown>>>(
  library: NativeLibrary,
  table: Table,
): Bound<Table> {
  const functions: Record<string, unknown> = {};
  for (const [name, { signature }] of Object.entries(table)) {
    const [, result = '', args = ''] = /^(.*?)\((.*)\)$/.exec(signature) ?? [];
    try {
      functions[name] = library.handle.func(name, result, args === '' ? [] : args.split(', '));
    } catch (error) {
      throw nativeError(
        'LIBRARY_TOO_OLD',
        `${library.path} has no function ${name}`,
        { library: library.path, symbol: name },
        { cause: error },
      );
    }
  }
  return functions as Bound<Table>;
}

/** Zeroed memory with a fixed address, for the life of the process unless freed. */
export function allocateNative(bytes: number): NativePointer {
  const pointer = koffi.alloc('uint8_t', bytes) as NativePointer;
  nativeView(pointer, bytes).fill(0);
  return pointer;
}

export function freeNative(pointer: NativePointer): void {
  koffi.free(pointer);
}

/** Zero-copy view of memory at an address; it does not keep that memory alive. */
export function nativeView(pointer: bigint, bytes: number): Uint8Array {
  return new Uint8Array(koffi.view(pointer, bytes));
}

/** A struct of one byte array that is passed by value, such as `ncclUniqueId`. Names are global per thread. */
export function byteArrayStruct(name: string, bytes: number): TypeObject {
  return koffi.struct(name, { internal: koffi.array('uint8_t', bytes, 'Typed') });
}

/** `errno` of this thread's last native call: read it right after the call. */
export function lastErrno(): number {
  return koffi.errno();
}

/** Of koffi itself. */
export function koffiVersion(): string {
  return koffi.version;
}
