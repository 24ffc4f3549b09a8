import { mkdtempSync, rmSync } from 'node:fs';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, onTestFinished } from 'vitest';

const PREFIX = join(tmpdir(), 'pd-worker-');

/** A new directory that goes when the test ends. */
export async function tempDir(): Promise<string> {
  const dir = await mkdtemp(PREFIX);
  onTestFinished(() => rm(dir, { recursive: true, force: true }));
  return dir;
}

/** A new directory for all tests of a file (or of the `describe` that asks), gone when they have ended. */
export function sharedTempDir(): string {
  const dir = mkdtempSync(PREFIX);
  afterAll(() => rmSync(dir, { recursive: true, force: true }));
  return dir;
}
