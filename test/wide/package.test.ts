/**
 * The package as its users get it: packed, installed from the archive into an empty folder, its programs run by npx and its API imported
 * under a compiler of theirs. Needs the npm registry.
 */
import { type ChildProcess, execFile, spawn } from 'node:child_process';
import { once } from 'node:events';
import { existsSync, readdirSync, readFileSync } from 'node:fs';
import { copyFile, mkdir, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import { afterEach, beforeAll, describe, expect, test } from 'vitest';
import { untilLine } from '../support/process.ts';
import { CAPITAL, complete } from '../support/requests.ts';
import { sharedTempDir } from '../support/temp-dir.ts';

const ROOT = fileURLToPath(new URL('../../', import.meta.url));
/** Not dependencies of ours: npx keeps them in npm's cache. */
const PUBLINT = 'publint@0.3.25';
const ATTW = '@arethetypeswrong/cli@0.18.5';

const temp = sharedTempDir();
const folder = join(temp, 'empty');
let archive: string;

/** What a program that ends with 0 within four minutes wrote to stdout. */
async function output(cwd: string, program: string, ...args: string[]): Promise<string> {
  const run = promisify(execFile)(program, args, { cwd, timeout: 240_000, killSignal: 'SIGKILL' });
  const { stdout } = await run.catch(
    (error: Error & { readonly stdout?: string; readonly stderr?: string }) => {
      throw new Error(`${program} ${args.join(' ')}: ${error.message}\n${error.stdout}\n${error.stderr}`);
    },
  );
  return stdout;
}

const versionOf = (path: string) =>
  (JSON.parse(readFileSync(join(path, 'package.json'), 'utf8')) as { version: string }).version;
/** As it is installed here: what users may have, and no other to download. */
const asHere = (name: string) => `${name}@${versionOf(join(ROOT, 'node_modules', name))}`;

beforeAll(async () => {
  // Without `prepack`, which compiles from nothing: programs of other tests may be running from dist/.
  await output(ROOT, 'npm', 'pack', '--ignore-scripts', '--pack-destination', temp);
  archive = join(temp, readdirSync(temp).find((name) => name.endsWith('.tgz'))!);
  await mkdir(folder);
  await writeFile(join(folder, 'package.json'), '{ "private": true, "type": "module" }');
  const quiet = ['--no-audit', '--no-fund', '--no-update-notifier', '--prefer-offline'];
  await output(folder, 'npm', 'install', ...quiet, archive, asHere('typescript'), asHere('@types/node'));
});

describe('its programs', () => {
  const running: ChildProcess[] = [];
  afterEach(() => {
    for (const { pid } of running.splice(0)) {
      try {
        process.kill(-pid!, 'SIGKILL'); // npx and what it has started
      } catch {} // ended already, as it should
    }
  });

  /** `match`: in the first line of stdout that has one. `interrupt` is Ctrl-C, and resolves when all has ended. */
  async function npx(pattern: RegExp, program: string, ...args: string[]) {
    const child = spawn('npx', ['--no', '--', program, ...args], {
      cwd: folder,
      stdio: ['ignore', 'pipe', 'pipe'],
      detached: true,
    });
    running.push(child);
    let stderr = '';
    child.stderr.on('data', (chunk: Buffer) => {
      stderr = (stderr + chunk).slice(-8_000);
    });
    // Once nothing of what npx has started holds its output any more.
    const ended = once(child, 'close');
    const interrupt = async () => {
      process.kill(-child.pid!, 'SIGINT');
      await ended;
    };
    const match = await untilLine(child.stdout, pattern);
    if (match) return { match, interrupt };
    throw new Error(`${program} ended before it said ${pattern}\n${stderr}`);
  }

  test('each tells the version of the package', async () => {
    const { version, bin } = JSON.parse(readFileSync(join(ROOT, 'package.json'), 'utf8')) as {
      version: string;
      bin: Record<string, string>;
    };
    for (const name of Object.keys(bin)) {
      const said = await output(folder, 'npx', '--no', '--', name, '--version');
      expect([name, said.trim()]).toEqual([name, version]);
    }
  });

  test('npx pd-launch serves the bundled model until Ctrl-C', async () => {
    const host = ['--json', '--free-ports', '--device', 'host'];
    const { match, interrupt } = await npx(/^\{.*\}$/, 'pd-launch', ...host);
    const { proxy } = JSON.parse(match[0]) as { proxy: { url: string } };
    const { text } = await complete(proxy.url, CAPITAL);
    expect(text).toContain('Paris');
    await interrupt();
  });

  test('npx pd-proxy runs until Ctrl-C', async () => {
    const loopback = ['--host', '127.0.0.1', '--port', '0', '--discovery-port', '0'];
    const { match, interrupt } = await npx(/Running on (http:[^"\s]+)/, 'pd-proxy', ...loopback);
    const response = await fetch(`${match[1]}/health`);
    expect(await response.json()).toMatchObject({ instances: [] });
    await interrupt();
  });
});

describe('its API', () => {
  test('the examples compile under a strict compiler of their own, and run', async () => {
    const examples = join(folder, 'node_modules/pd-worker/examples');
    const names = readdirSync(examples).filter((name) => name.endsWith('.ts'));
    for (const name of names) await copyFile(join(examples, name), join(folder, name));
    const strict = ['--strict', '--skipLibCheck', 'false', '--module', 'nodenext', '--types', 'node'];
    const target = ['--target', 'es2023', '--lib', 'es2023,esnext.disposable'];
    await output(folder, 'npx', '--no', '--', 'tsc', ...strict, ...target, ...names);
    for (const name of names) await output(folder, process.execPath, name.replace('.ts', '.js'));
  });

  test('beside it package.json can be imported, and nothing else', async () => {
    const script = `
      import own from 'pd-worker/package.json' with { type: 'json' };
      const deep = await import('pd-worker/dist/src/version.js').catch(({ code }) => code);
      console.log(own.version, deep);`;
    await writeFile(join(folder, 'paths.js'), script);
    const said = await output(folder, process.execPath, '--no-warnings', 'paths.js');
    expect(said.trim()).toBe(`${versionOf(ROOT)} ERR_PACKAGE_PATH_NOT_EXPORTED`);
  });

  test('publint and arethetypeswrong find nothing to say', async () => {
    await output(temp, 'npx', '--yes', PUBLINT, 'run', archive, '--strict');
    await output(temp, 'npx', '--yes', ATTW, archive, '--profile', 'esm-only');
  });

  test('scripts/api-docs.sh makes a page of each class', async () => {
    await output(ROOT, './scripts/api-docs.sh');
    for (const name of ['TransferEngine', 'PdWorker', 'PdProxy', 'P2pWorkerConnector']) {
      expect([name, existsSync(join(ROOT, 'dist-docs/classes', `${name}.html`))]).toEqual([name, true]);
    }
  });
});
