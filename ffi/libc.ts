/** The few calls of the C library that Node has no equivalent of. */
import { type Bound, bind, dlopen, row } from './native.ts';

const LIBC = {
  // char *getenv(const char *name)
  getenv: row<[name: string], string | null>('const char *(const char *)'),
  // int setenv(const char *name, const char *value, int overwrite)
  setenv: row<[name: string, value: string, overwrite: number]>('int(const char *, const char *, int)'),
  // unsigned int alarm(unsigned int seconds)
  alarm: row<[seconds: number]>('unsigned int(unsigned int)'),
  // void _exit(int status)
  _exit: row<[status: number], void>('void(int)'),
} as const;

let bound: Bound<typeof LIBC> | undefined;

function libc(): Bound<typeof LIBC> {
  bound ??= bind(dlopen('libc.so.6'), LIBC);
  return bound;
}

/**
 * Sets an environment variable where native libraries look for it, unless the user has set it. `process.env` in a worker thread is a
 * copy that the C library never sees, so this calls the C library itself. To be called before the library that reads it is loaded.
 */
export function setNativeDefault(name: string, value: string): void {
  if (libc().getenv(name) === null) libc().setenv(name, value, 0);
  process.env[name] ??= value;
}

/** `setNativeDefault` for each. */
export function setNativeDefaults(variables: Readonly<Record<string, string>>): void {
  for (const [name, value] of Object.entries(variables)) setNativeDefault(name, value);
}

export function nativeEnvironment(name: string): string | undefined {
  return libc().getenv(name) ?? undefined;
}

/**
 * Has the kernel end this process (SIGALRM) after `seconds`, whatever its threads do: a thread in a blocking native call, such as an
 * abort that never returns, blocks `process.exit()` forever. 0 cancels it.
 */
export function killAfter(seconds: number): void {
  libc().alarm(seconds);
}

/**
 * Ends the process immediately. `process.exit()` tears down the other threads first, which can crash a native library in one of them.
 */
export function exitNow(status: number): void {
  libc()._exit(status);
}
