/** Kernels compiled on this machine, cached on disk: compiling takes a second, and a worker restarts often. */
import { createHash, randomBytes } from 'node:crypto';
import { mkdirSync, readFileSync, renameSync, unlinkSync, writeFileSync } from 'node:fs';
import { homedir } from 'node:os';
import { join } from 'node:path';

export interface KernelKey {
  /** For instance `sm_90`. */
  readonly arch: string;
  readonly options: readonly string[];
  readonly compiler: string;
  readonly source: string;
}

/** `PD_KERNEL_CACHE`, or the user's cache folder. */
export function kernelCacheFolder(): string {
  const { PD_KERNEL_CACHE, XDG_CACHE_HOME } = process.env;
  return PD_KERNEL_CACHE || join(XDG_CACHE_HOME || join(homedir(), '.cache'), 'pd-worker', 'kernels');
}

function kernelCacheKey(key: KernelKey): string {
  const hash = createHash('sha256');
  for (const part of [key.arch, ...key.options, key.compiler, key.source])
    hash.update(`${part.length}:${part}`);
  return hash.digest('hex');
}

/** What is kept under `key`, or the result of `compile`, which is then kept. A folder that cannot be written to costs only time. */
export function cachedKernel(folder: string, key: KernelKey, compile: () => Uint8Array): Uint8Array {
  const file = join(folder, `${kernelCacheKey(key)}.cubin`);
  try {
    return readFileSync(file);
  } catch {
    // not there yet
  }
  const image = compile();
  // Written aside and renamed: another worker that starts at the same time must never read half a file.
  const aside = `${file}.${process.pid}.${randomBytes(4).toString('hex')}`;
  try {
    mkdirSync(folder, { recursive: true });
    writeFileSync(aside, image);
    renameSync(aside, file);
  } catch {
    discard(aside);
  }
  return image;
}

function discard(file: string): void {
  try {
    unlinkSync(file);
  } catch {
    // it was never written
  }
}
