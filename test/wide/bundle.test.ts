/** The archive for hosts without Node: made, unpacked elsewhere, and run with nothing but a few tools in PATH. */
import { type ChildProcess, execFileSync, spawn } from 'node:child_process';
import { once } from 'node:events';
import { existsSync, mkdirSync, mkdtempSync, readdirSync, rmSync, symlinkSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterAll, beforeAll, expect, test } from 'vitest';
import { standInEnvironment } from '../stand-ins/build.ts';
import { untilLine } from '../support/process.ts';
import { CAPITAL, complete } from '../support/requests.ts';

const ROOT = fileURLToPath(new URL('../../', import.meta.url));
/** What a host without Node has; the start scripts may use no more. */
const TOOLS = ['sh', 'bash', 'dirname', 'readlink'];

let folder: string;
let bundle: string;
let env: Record<string, string>;
let worker: ChildProcess | undefined;

beforeAll(() => {
  folder = mkdtempSync(join(tmpdir(), 'pd-bundle-'));
  const tsx = join(ROOT, 'node_modules/.bin/tsx');
  // quick rather than small
  execFileSync(tsx, [join(ROOT, 'scripts/bundle.ts'), '--level', '0', '--out', folder], { cwd: folder });
  const archive = readdirSync(folder).find((name) => name.endsWith('.tar.xz'))!;
  execFileSync('tar', ['-C', folder, '-xf', join(folder, archive)]);
  bundle = join(folder, archive.replace('.tar.xz', ''));
  const tools = join(folder, 'tools');
  mkdirSync(tools);
  for (const tool of TOOLS) {
    const path = ['/bin', '/usr/bin'].map((at) => join(at, tool)).find((at) => existsSync(at));
    symlinkSync(path!, join(tools, tool));
  }
  env = { PATH: tools, HOME: folder };
});
afterAll(() => {
  worker?.kill('SIGKILL');
  rmSync(folder, { recursive: true, force: true });
});

const run = (program: string, ...args: string[]) =>
  execFileSync(join(bundle, program), args, { env, encoding: 'utf8', stdio: ['ignore', 'pipe', 'pipe'] });

test('its programs run by the Node inside, from a link too', () => {
  const { version } = JSON.parse(
    execFileSync('cat', [join(bundle, 'package.json')], { encoding: 'utf8' }),
  ) as { version: string };
  expect(run('bin/pd-worker', '--version').trim()).toBe(version);
  const link = join(folder, 'tools', 'pd-proxy');
  symlinkSync(join(bundle, 'bin/pd-proxy'), link);
  expect(execFileSync('pd-proxy', ['--help'], { env, encoding: 'utf8' })).toContain('--discovery-port');
  // native modules load, as far as their glibc allows
  expect(run('bin/pd-doctor')).toMatch(/Node .*\/node\)[\s\S]*koffi .* loads[\s\S]*zeromq: .* loads/);
});

test('a worker in it answers a completion with the bundled model', async () => {
  const args = ['--role', 'both', '--device', 'host', '--host', '127.0.0.1', '--port', '0'];
  worker = spawn(join(bundle, 'bin/pd-worker'), args, {
    env,
    stdio: ['ignore', 'pipe', 'inherit'],
  });
  const [, url] = (await untilLine(worker.stdout!, /Running on (http:[^"\s]+)/)) ?? [];
  const { text } = await complete(url!, CAPITAL);
  expect(text).toContain('Paris');
  worker.kill('SIGTERM');
  expect(await once(worker, 'exit')).toEqual([0, null]);
});

test.each(['host', 'cuda'])(
  'the set-up on two GPUs, where %s computes, passes its own checks, all processes from the archive',
  (executor) => {
    Object.assign(env, standInEnvironment(), { PD_STANDIN_MEMORY_MB: '4096' });
    const script = 'scripts/two-gpu.sh';
    const args = ['--free-ports', '--executor', executor];
    const text = execFileSync(join(bundle, script), args, { env, encoding: 'utf8' });
    expect(text).toMatch(/producer +http.*\n[\s\S]*\n4 passed, 0 failed\n$/);
  },
);
