/** The examples as a reader runs them: scripts that import the package by its name, and end by themselves. */
import { execFile } from 'node:child_process';
import { mkdirSync, mkdtempSync, readdirSync, rmSync, symlinkSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import { afterAll, expect, it } from 'vitest';

const root = fileURLToPath(new URL('../..', import.meta.url));
const tool = (name: string) => join(root, 'node_modules/.bin', name);
const outside = mkdtempSync(join(tmpdir(), 'pd-embedder-'));
afterAll(() => rmSync(outside, { recursive: true, force: true }));

/** What a program that ends with 0 within a minute wrote to stdout. Something left open keeps it from ending. */
async function output(program: string, args: readonly string[], cwd = root): Promise<string> {
  const run = promisify(execFile);
  const { stdout } = await run(program, args, { cwd, timeout: 60_000, killSignal: 'SIGKILL' }).catch(
    (error: Error & { readonly stdout?: string; readonly stderr?: string }) => {
      throw new Error(`${program} ${args.join(' ')}: ${error.message}
${error.stdout}
${error.stderr}`);
    },
  );
  return stdout;
}

const example = (name: string) => output(tool('tsx'), [join('examples', name)]);

it('two engines exchange tensors and paged KV in all modes', async () => {
  const lines = (await example('two-engines.ts')).trim().split('\n');
  expect(lines.filter((line) => line.endsWith('equal'))).toHaveLength(6);
});

it('a foreign runtime loads KV through the connector, and computes what does not come', async () => {
  const text = await example('foreign-runtime.ts');
  expect(text.match(/KV, equal/g)).toHaveLength(12);
  expect(text.match(/as meant: no KV came \(KV_LOAD_TIMEOUT\), the prompt is computed here/g)).toHaveLength(
    4,
  );
});

it('a proxy and two workers live in one process, which ends once they are closed', async () => {
  const text = await example('in-process.ts');
  expect(text).toContain('Paris');
  expect(text.trim().split('\n').at(-1)).toBe('closed');
});

it('the examples are all of these, and their types hold against the built package', async () => {
  const scripts = readdirSync(join(root, 'examples')).filter((name) => name.endsWith('.ts'));
  expect(scripts.sort()).toEqual(['foreign-runtime.ts', 'in-process.ts', 'two-engines.ts']);
  await output(tool('tsc'), ['-p', 'examples/tsconfig.json']);
});

it('a program elsewhere gets types and values from the package, under a strict compiler of its own', async () => {
  mkdirSync(join(outside, 'node_modules'));
  symlinkSync(root, join(outside, 'node_modules/pd-worker'), 'dir');
  writeFileSync(join(outside, 'package.json'), '{ "type": "module" }');
  writeFileSync(
    join(outside, 'main.ts'),
    `import { PdError, type SendType, transferOptions, workerConfig } from 'pd-worker';
const mode: SendType = transferOptions({ sendType: 'GET' }).sendType;
try {
  // @ts-expect-error: a misspelt field
  workerConfig({ rol: 'producer' });
} catch (error) {
  if (error instanceof PdError) console.log(mode, error.code, error.message);
}
`,
  );
  const types = ['--types', 'node', '--typeRoots', join(root, 'node_modules/@types')];
  const strict = ['--strict', '--target', 'es2023', '--module', 'nodenext', '--skipLibCheck', 'false'];
  await output(tool('tsc'), [...strict, ...types, '--noEmitOnError', 'main.ts'], outside);
  const said = await output(process.execPath, ['main.js'], outside);
  expect(said).toMatch(/^GET CONFIG_INVALID worker configuration: .*"rol"/);
});

it('the packed package holds what it needs to run', async () => {
  const packed = await output('npm', ['pack', '--dry-run', '--json', '--ignore-scripts']);
  const [{ files }] = JSON.parse(packed) as [{ files: { path: string }[] }];
  const paths = new Set(files.map(({ path }) => path));
  const needed = [
    'dist/src/index.js',
    'dist/src/index.d.ts',
    'dist/src/transfer/thread.js',
    'dist/src/proxy/body-thread.js',
    'dist/src/worker/core-thread.js',
    'dist/src/worker/request-body-thread.js',
    'dist/bench/cli/main.js',
    'dist/bench/transfer/peer-main.js',
    'bin/pd-worker',
    'bin/pd-proxy',
    'bin/pd-launch',
    'bin/pd-doctor',
    'bin/pd-bench',
    'models/demo/config.json',
    'models/demo/tokenizer.json',
    'docs/embedding.md',
    'LICENSE',
    'CHANGELOG.md',
    'SECURITY.md',
    'examples/two-engines.ts',
  ];
  expect(needed.filter((path) => !paths.has(path))).toEqual([]);
  expect([...paths].filter((path) => path.startsWith('kernels/')).length).toBeGreaterThan(0);
  const others =
    /^(dist\/)?(test|support|scripts)\/|^bench\/|^dist\/bench\/(?!(cli|goodput|measure|serve|transfer)\/)/;
  expect([...paths].filter((path) => others.test(path))).toEqual([]);
});
