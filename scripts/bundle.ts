/**
 * One archive for Linux x64 hosts that have GPUs and neither Node nor a package registry: this Node, the build, production
 * dependencies, the demo model, kernels and start scripts. Made from what is installed here: it needs no network.
 *
 *   npm run bundle [-- --out DIR --level 0..9]
 */
import { execFileSync } from 'node:child_process';
import {
  chmodSync,
  copyFileSync,
  cpSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  statSync,
  writeFileSync,
} from 'node:fs';
import { basename, dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { Command, Option } from 'commander';

const ROOT = fileURLToPath(new URL('..', import.meta.url));
const PLATFORM = 'linux-x64';

interface LockedPackage {
  readonly dev?: true;
  readonly version: string;
  /** Installed only on machines that it is for. */
  readonly optional?: true;
}

const options = new Command('bundle')
  .description(`Packs pd-worker for ${PLATFORM} hosts without Node.`)
  .addOption(new Option('--out <dir>', 'where the archive goes').default(join(ROOT, 'dist-bundle')))
  .addOption(
    new Option('--level <level>', "xz's: 0 is quick, 9 is small")
      .choices([...Array(10).keys()].map(String))
      .default('6'),
  )
  .allowExcessArguments(false)
  .parse()
  .opts<{ out: string; level: string }>();

const { version } = readJson<{ version: string }>('package.json');
const name = `pd-worker-${version}-${PLATFORM}`;

/** Throws if what is installed differs from the lock file, as nobody would know what the archive holds. */
function copyDependencies(to: string): void {
  const { packages } = readJson<{ packages: Record<string, LockedPackage> }>('package-lock.json');
  for (const [path, { dev, version: wanted, optional }] of Object.entries(packages)) {
    if (path === '' || dev) continue;
    const from = join(ROOT, path);
    if (!existsSync(from)) {
      if (optional) continue;
      throw new Error(`${path} is not installed: run npm ci first`);
    }
    const { version: found } = readJson<{ version: string }>(join(path, 'package.json'));
    if (found !== wanted) throw new Error(`${path} is ${found}, not ${wanted}: run npm ci first`);
    // Packages nested in a package have their own entry in the lock file.
    cpSync(from, join(to, path), { recursive: true, filter: (file) => !unused(file, from) });
  }
  pruneZeromq(join(to, 'node_modules/zeromq/build'));
}

/** Types, maps and sources of native modules: a third of the size. */
function unused(file: string, folder: string): boolean {
  const inside = file.slice(folder.length + 1);
  if (/^node_modules(\/|$)/.test(inside)) return true;
  if (/\.(map|d\.[cm]?ts|[cm]?ts|md|markdown|flow|cc|cpp|hh)$/.test(inside) && !/licen[cs]e/i.test(inside))
    return true;
  const native = /\/(koffi|zeromq)$/.exec(folder)?.[1];
  if (native === 'koffi') return /^(vendor|doc)(\/|$)|\.(c|h|inc|asm|S|def)$/.test(inside);
  if (native === 'zeromq') return /^(src|script|vcpkg\.json|CMakeLists\.txt)(\/|$)/.test(inside);
  return /^(test|tests|benchmarks?|examples?|\.github)(\/|$)/.test(inside);
}

/**
 * Keeps the addons for Linux x64 with glibc. They differ in the glibc that they need, not in the Node, and zeromq tries them one by one as
 * its manifest lists them, so the manifest is cut down too.
 */
function pruneZeromq(build: string): void {
  const manifest = JSON.parse(readFileSync(join(build, 'manifest.json'), 'utf8')) as Record<string, string>;
  const kept = Object.entries(manifest).filter(([, addon]) => addon.startsWith('linux/x64/node/glibc-'));
  if (kept.length === 0) throw new Error('zeromq has no addon for linux x64 with glibc');
  const addons = kept.map(([, path]) => [path, readFileSync(join(build, path))] as const);
  rmSync(build, { recursive: true });
  for (const [path, bytes] of addons) {
    mkdirSync(dirname(join(build, path)), { recursive: true });
    writeFileSync(join(build, path), bytes);
  }
  writeFileSync(join(build, 'manifest.json'), JSON.stringify(Object.fromEntries(kept)));
}

/**
 * The programs of bin/, run by the bundled Node: a shell executes the second line, in which Node, started with the same file by pd-launch,
 * sees a string and a comment.
 */
function writePrograms(to: string): void {
  mkdirSync(join(to, 'bin'));
  for (const program of readdirSync(join(ROOT, 'bin'))) {
    const [shebang, ...rest] = readFileSync(join(ROOT, 'bin', program), 'utf8').split('\n');
    if (shebang !== '#!/usr/bin/env node')
      throw new Error(`bin/${program} does not start with node's shebang`);
    const start = `':' //; exec "$(dirname -- "$(readlink -f -- "$0")")/../node" "$0" "$@"`;
    writeFileSync(join(to, 'bin', program), ['#!/bin/sh', start, ...rest].join('\n'));
    chmodSync(join(to, 'bin', program), 0o755);
  }
}

function readme(glibc: string): string {
  return `# pd-worker ${version} for ${PLATFORM}

Node ${process.versions.node}, pd-worker, its dependencies and a small demo model in one folder: nothing to install but the NVIDIA driver, the
CUDA runtime (12 or 13) and NCCL (2.27 or later) on hosts with GPUs. Needs glibc ${glibc} or later.

    bin/pd-doctor                       what this machine has, and what it lacks
    scripts/gpu-results.sh              on two GPUs, everything that pd-bench measures about transfers, checks of the device, the demo
    scripts/experiment-matrix.sh        which ids, send types and keys find their KV (--device cuda: on two GPUs)
    scripts/wire-results.sh             on two GPUs, against an independent worker in Python: needs python3 with torch and msgpack
    scripts/two-gpu.sh                  proxy, producer and consumer on two GPUs, checked with four prompts (--keep leaves them serving)
    scripts/two-gpu.sh --host ::1 ipv6  the same on these addresses in turn, with the address that NCCL's bootstrap took
    scripts/runbook.sh                  the lines of docs/operations.md with vLLM's configuration, as written, on two GPUs
    scripts/serve-results.sh            what clients see of a pair and of an undivided worker (--device cuda: on two GPUs)
    scripts/proxy-results.sh            without a GPU, on 16 cores or more, how fast the proxy alone is
    scripts/native-faults.sh            on two GPUs, the native hand-over under kill -9 and SIGSTOP, on one GPU, and over NCCL's sockets
    scripts/pair-results.sh             on two GPUs, whether a pair gives the answers of an undivided worker, and how much later
    scripts/hand-over-results.sh        on two GPUs, how fast KV is handed over, and where the time to a pair's first token goes
    scripts/goodput-results.sh          on two GPUs, how many requests per second a pair and two undivided workers answer within bounds
    ./node dist/bench/proxy/policies.js what each policy of placement is worth, on simulated workers; overload.js, vanish.js beside it
    bench/gpu/model.sh DIR              on one GPU, logits and times compared with transformers
    ./node dist/bench/gpu/sampling.js   on one GPU, sampling compared with the host's, and what it costs a decode step (16 GB in TMPDIR)
    ./node dist/bench/gpu/serving.js DIR
                                        on one GPU, what fields cost the steps of a worker that serves; DIR: a Llama 3's tokenizer (16 GB in TMPDIR)
    python3 scripts/model-reference/checkpoint.py --out DIR --tokenizer models/demo
                                        a Llama of 8B with random weights, for --model DIR/llama-8b: torch, transformers and a GPU
    bin/pd-launch --model DIR           proxy, producer and consumer, on a GPU each where there are any: proxy on port 10002
    bin/pd-worker --help                one worker; bin/pd-proxy --help: the proxy

docs/ has the architecture, the wire protocol and every error code.
`;
}

/** The oldest glibc on which everything here runs; symbol versions are plain text in a binary. */
function leastGlibc(to: string): string {
  const zeromq = join(to, 'node_modules/zeromq/build/linux/x64/node');
  const koffi = join(to, 'node_modules/@koromix/koffi-linux-x64/linux_x64/koffi.node');
  const needed = [
    glibcOf(join(to, 'node')),
    glibcOf(koffi),
    // one of them suffices
    Math.min(...readdirSync(zeromq).map((folder) => glibcOf(join(zeromq, folder, 'addon.node')))),
  ];
  return `2.${Math.max(...needed)}`;
}

/** The minor version: 36 for 2.36. */
function glibcOf(binary: string): number {
  const versions = readFileSync(binary, 'latin1').matchAll(/GLIBC_2\.(\d+)/g);
  return Math.max(...[...versions].map(([, minor]) => Number(minor)));
}

function readJson<T>(path: string): T {
  return JSON.parse(readFileSync(join(ROOT, path), 'utf8')) as T;
}

function tsc(outDir: string): void {
  const project = join(ROOT, 'tsconfig.bundle.json');
  execFileSync(join(ROOT, 'node_modules/.bin/tsc'), ['-p', project, '--outDir', outDir], {
    stdio: ['ignore', 'inherit', 'inherit'],
  });
}

function main(): void {
  if (`${process.platform}-${process.arch}` !== PLATFORM) {
    throw new Error(
      `the bundle is for ${PLATFORM}; build it there, not on ${process.platform}-${process.arch}`,
    );
  }
  const { node_shared: shared } = process.config.variables as { node_shared?: boolean };
  if (shared) throw new Error(`${process.execPath} needs a shared libnode: use Node from nodejs.org`);
  mkdirSync(options.out, { recursive: true });
  const aside = mkdtempSync(join(options.out, '.staging-'));
  try {
    const to = join(aside, name);
    mkdirSync(to);
    console.log('bundle: compiling');
    tsc(join(to, 'dist'));
    console.log('bundle: copying');
    copyDependencies(to);
    writePrograms(to);
    copyFileSync(process.execPath, join(to, 'node'));
    chmodSync(join(to, 'node'), 0o755);
    for (const path of [
      'package.json',
      'models',
      'ui',
      'kernels',
      'docs',
      'scripts/common.sh',
      'scripts/two-gpu.sh',
      'scripts/runbook.sh',
      'scripts/experiment-matrix.sh',
      'scripts/gpu-results.sh',
      'scripts/wire-results.sh',
      'scripts/serve-results.sh',
      'scripts/proxy-results.sh',
      'scripts/pair-results.sh',
      'scripts/native-faults.sh',
      'scripts/hand-over-results.sh',
      'scripts/goodput-results.sh',
      'bench/gpu/model.sh',
      'scripts/model-reference',
      'support/peers',
      'LICENSE',
      'CHANGELOG.md',
      'SECURITY.md',
    ]) {
      const from = join(ROOT, path);
      if (!existsSync(from)) continue;
      cpSync(from, join(to, path), { recursive: true, filter: (file) => basename(file) !== '__pycache__' });
    }
    writeFileSync(join(to, 'README.md'), readme(leastGlibc(to)));
    const archive = join(options.out, `${name}.tar.xz`);
    console.log(`bundle: packing (xz -${options.level}, which takes a while)`);
    execFileSync(
      'tar',
      [
        '-C',
        aside,
        '--owner=0',
        '--group=0',
        '-cf',
        `${archive}.part`,
        '-I',
        `xz -T0 -${options.level}`,
        name,
      ],
      {
        stdio: 'inherit',
      },
    );
    execFileSync('mv', [`${archive}.part`, archive]);
    const mib = (statSync(archive).size / 2 ** 20).toFixed(1);
    console.log(`bundle: ${archive}, ${mib} MiB
Start it on a ${PLATFORM} host:
  tar -xf ${basename(archive)} && cd ${name}
  bin/pd-doctor
  scripts/two-gpu.sh`);
  } finally {
    rmSync(aside, { recursive: true, force: true });
  }
}

try {
  main();
} catch (error) {
  console.error(`bundle: ${(error as Error).message}`);
  process.exitCode = 1;
}
