/** The rules of CONTRIBUTING that a machine keeps: one violation of each is planted in a small tree, and the check must name it. */
import { execFile } from 'node:child_process';
import { copyFileSync, mkdirSync, mkdtempSync, readFileSync, symlinkSync, writeFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { describe, expect, it } from 'vitest';
import { LAYERS, layersTable, violations } from '../../scripts/layers.ts';
import { sharedTempDir } from '../support/temp-dir.ts';

const ROOT = fileURLToPath(new URL('../../', import.meta.url));
const temp = sharedTempDir();

/** A tree that keeps every rule, but for `planted`: text by path. */
function tree(planted: Readonly<Record<string, string>>): string {
  const root = mkdtempSync(join(temp, 'tree-'));
  for (const name of ['biome.json', 'knip.jsonc', 'package.json', 'tsconfig.json', '.gitignore']) {
    copyFileSync(join(ROOT, name), join(root, name));
  }
  symlinkSync(join(ROOT, 'node_modules'), join(root, 'node_modules'));
  const files = {
    'src/index.ts': "export { one } from './errors.ts';\n",
    'src/errors.ts': 'export const one = 1;\n',
    ...planted,
  };
  for (const [path, text] of Object.entries(files)) {
    mkdirSync(dirname(join(root, path)), { recursive: true });
    writeFileSync(join(root, path), text);
  }
  return root;
}

/** What a program of node_modules says of `root`, and how it ends. */
function check(root: string, program: string, ...args: string[]): Promise<{ code: number; said: string }> {
  return new Promise((resolve) => {
    const path = join(ROOT, 'node_modules/.bin', program);
    execFile(path, args, { cwd: root }, (error, stdout, stderr) => {
      resolve({ code: error ? Number(error.code) : 0, said: stdout + stderr });
    });
  });
}

const biome = (root: string) => check(root, 'biome', 'lint', '--error-on-warnings', 'src');
const knip = (root: string) =>
  check(root, 'knip', '--no-progress', '--no-config-hints', '--include', 'files,exports,types');

describe('layers', () => {
  it('lets a tree through that keeps the table', () => {
    expect(violations(tree({}))).toEqual([]);
  });

  it.each([
    [
      'an import upward',
      'src/wire/a.ts',
      "import '../worker/worker.ts';",
      /src\/wire may not import src\/worker/,
    ],
    [
      'one of types alone',
      'src/kv/a.ts',
      "import type { D } from '../device/device.ts';",
      /src\/kv may not import/,
    ],
    [
      'one in a type',
      'src/kv/a.ts',
      "export type D = import('../device/device.ts').D;",
      /src\/kv may not import/,
    ],
    ['one that waits', 'src/kv/a.ts', "await import('../device/device.ts');", /src\/kv may not import/],
    ['an export of it', 'src/kv/a.ts', "export { D } from '../device/device.ts';", /src\/kv may not import/],
    ['ffi importing src', 'ffi/a.ts', "import '../src/errors.ts';", /ffi may not import src\/errors.ts/],
    ['koffi outside of ffi', 'src/device/a.ts', "import koffi from 'koffi';", /koffi is for ffi\/ alone/],
    ['I/O in a pure layer', 'src/wire/a.ts', "import { readFile } from 'node:fs';", /is pure.*node:fs/],
    ['I/O through another file', 'src/wire/a.ts', "import '../net/a.ts';", /src\/net\/a.ts -> node:dns/],
    [
      'an example that looks inside',
      'examples/a.ts',
      "import '../src/kv/a.ts';",
      /examples may not import src\/kv/,
    ],
    ['a folder without a row', 'src/new/a.ts', '', /is of no layer/],
  ])('names %s', (_what, path, text, told) => {
    const found = violations(tree({ 'src/net/a.ts': "import 'node:dns';\n", [path]: text }));
    expect(found).toEqual([expect.stringMatching(told)]);
    expect(found[0]).toContain(`${path}: `);
  });

  it('form no cycle: a row names only rows above it', () => {
    const above = new Set<string>();
    for (const { name, may } of LAYERS) {
      for (const one of may)
        expect([...above].some((row) => row === one || row.startsWith(`${one}/`))).toBe(true);
      above.add(name);
    }
  });

  it('are told in docs/architecture.md as they are', () => {
    expect(readFileSync(join(ROOT, 'docs/architecture.md'), 'utf8')).toContain(layersTable());
  });
});

describe('biome', () => {
  it.each([
    [
      'an import cycle, of types too',
      'noImportCycles',
      {
        'src/kv/a.ts': "import type { B } from './b.ts';\nexport type A = B[];\n",
        'src/kv/b.ts': "import type { A } from './a.ts';\nexport type B = A | 1;\n",
      },
    ],
    [
      'a floating promise',
      'noFloatingPromises',
      { 'src/kv/a.ts': 'async function work(): Promise<void> {}\nwork();\n' },
    ],
  ])('refuses %s', async (_what, rule, planted) => {
    expect((await biome(tree({}))).code).toBe(0);
    const { code, said } = await biome(tree(planted));
    expect(said).toContain(rule);
    expect(code).toBe(1);
  });
});

describe('knip', () => {
  it('refuses an export that nobody imports', async () => {
    const planted = { 'src/errors.ts': 'export const one = 1;\nexport const spare = 2;\n' };
    const [kept, broken] = await Promise.all([knip(tree({})), knip(tree(planted))]);
    expect(kept).toEqual({ code: 0, said: '' });
    expect(broken.said).toContain('spare');
    expect(broken.code).toBe(1);
  });
});
