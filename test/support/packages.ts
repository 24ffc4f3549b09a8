/** Packages that tests in test/wide depend on and the project does not, as test/wide/<name> pins them. */
import { execFileSync } from 'node:child_process';
import { copyFileSync, existsSync, mkdirSync, readFileSync, rmSync } from 'node:fs';
import { homedir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';

const WIDE = fileURLToPath(new URL('../wide', import.meta.url));
const CACHE = process.env['XDG_CACHE_HOME'] ?? join(homedir(), '.cache');

/** Their node_modules, from the npm registry, kept in a cache until the lock file changes. `drop`: folders in there that nobody reads. */
export function packagesOf(name: 'schemas' | 'vocabularies', drop: readonly string[] = []): string {
  const from = join(WIDE, name);
  const folder = join(CACHE, 'pd-worker', name);
  const modules = join(folder, 'node_modules');
  const lock = readFileSync(join(from, 'package-lock.json'));
  // Written last: what an install that broke off has left is not taken for whole.
  const done = join(folder, 'installed.json');
  if (existsSync(done) && readFileSync(done).equals(lock)) return modules;
  mkdirSync(folder, { recursive: true });
  for (const file of ['package.json', 'package-lock.json'])
    copyFileSync(join(from, file), join(folder, file));
  rmSync(done, { force: true });
  execFileSync('npm', ['ci', '--ignore-scripts', '--no-audit', '--no-fund'], { cwd: folder });
  for (const part of drop) rmSync(join(modules, part), { recursive: true });
  copyFileSync(join(from, 'package-lock.json'), done);
  return modules;
}
