/** pd-doctor as a program: without a GPU, over stand-in libraries, and with a library that crashes. */
import { execFile, execFileSync } from 'node:child_process';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { createServer } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import type { DoctorReport, Finding } from '../../../src/doctor/finding.ts';
import { standInEnvironment } from '../../stand-ins/build.ts';
import { withTheOthers } from '../../support/rows.ts';

/** Tests for every change, and those for where all is tested. */
const always = test.skipIf(withTheOthers);
const seldom = test.skipIf(!withTheOthers);

const BIN = fileURLToPath(new URL('../../../bin/', import.meta.url));

interface Ended {
  readonly code: number;
  readonly stdout: string;
  readonly stderr: string;
}

function run(program: string, args: readonly string[], env: Record<string, string> = {}): Promise<Ended> {
  return new Promise((resolve) => {
    const all = { ...process.env, PD_HOST_IP: '127.0.0.1', ...env };
    execFile(process.execPath, [join(BIN, program), ...args], { env: all }, (error, stdout, stderr) =>
      resolve({ code: error ? Number(error.code) : 0, stdout, stderr }),
    );
  });
}

async function examine(args: readonly string[], env: Record<string, string> = {}) {
  const { code, stdout } = await run('pd-doctor', ['--json', ...args], env);
  const report = JSON.parse(stdout) as DoctorReport;
  const of = (title: string): readonly Finding[] =>
    report.sections.find((section) => section.title === title)?.findings ?? [];
  const failures = report.sections.flatMap(({ findings }) =>
    findings.filter(({ level }) => level === 'fail'),
  );
  return { code, report, of, failures };
}

let folder: string;
let standIns: Record<string, string>;
/** As on a machine where nothing of NVIDIA's is installed, wherever this runs. */
let nothing: Record<string, string>;
beforeAll(() => {
  folder = mkdtempSync(join(tmpdir(), 'pd-doctor-'));
  standIns = standInEnvironment();
  nothing = Object.fromEntries(Object.keys(standIns).map((name) => [name, join(folder, 'absent.so')]));
});
afterAll(() => rmSync(folder, { recursive: true }));

describe('without a GPU', () => {
  always('nothing is wrong, and it says so plainly', async () => {
    const { code, failures, of } = await examine([], nothing);
    expect(failures).toEqual([]);
    expect(code).toBe(0);
    expect(of('GPUs')[0]?.what).toContain('no NVIDIA GPU or driver here');
    expect(of('Node').map(({ level }) => level)).toEqual(['ok', 'ok', 'ok']);
  });

  seldom('asked for one, it fails with what to install, library by library', async () => {
    const { code, of } = await examine(['--device', 'cuda:0'], nothing);
    expect(code).toBe(1);
    const [cuda, , nccl] = of('Libraries');
    expect(cuda).toMatchObject({ level: 'fail', fix: expect.stringContaining('install the NVIDIA driver') });
    expect(nccl).toMatchObject({ level: 'fail', fix: expect.stringContaining('PD_NCCL_LIB') });
  });

  always('pd-launch refuses GPUs with the reason and the way out', async () => {
    const { code, stderr } = await run('pd-launch', ['--device', 'cuda'], nothing);
    expect(code).toBe(1);
    expect(stderr).toMatch(/LIBRARY_NOT_FOUND: --device cuda: no GPU can be used here.*--device host/);
  });
});

describe('with two GPUs', () => {
  always('lists libraries with versions and files, GPUs, and how they reach each other', async () => {
    const { code, of } = await examine([], standIns);
    expect(code).toBe(0);
    expect(of('Libraries').map(({ what }) => what)).toEqual([
      expect.stringMatching(/^cuda .*CUDA 13\.0 \(.*libpdstandin.*named by PD_CUDA_LIB\)/),
      expect.stringMatching(/^cudart 13\.0/),
      expect.stringMatching(/^nccl 2\.28\.9/),
      expect.stringMatching(/^nvrtc 13\.0/),
      expect.stringMatching(/^cublas 13\.0/),
    ]);
    expect(of('GPUs').map(({ what }) => what)).toEqual([
      expect.stringMatching(/cuda:0 {2}Stand-in GPU 0, 1\.00 GiB.*compute 9\.0, kernels sm_90/),
      expect.stringMatching(/cuda:1 {2}Stand-in GPU 1/),
      expect.stringMatching(/pairs 0-1 .*NVLink/),
    ]);
  });

  seldom('a GPU that is not there, no GPU behind the driver, and an old NCCL are told', async () => {
    const [absent, none, old] = await Promise.all([
      examine(['--device', 'cuda:2'], standIns),
      examine([], { ...standIns, PD_STANDIN_FAULTS: 'cudaGetDeviceCount=100' }),
      examine([], { ...standIns, PD_STANDIN_NCCL: '22005' }),
    ]);
    expect(absent.failures[0]?.what).toMatch(/cuda:2 does not exist: this process sees cuda:0 to cuda:1/);
    expect(none.failures[0]?.what).toMatch(/no CUDA-capable device/);
    expect(old.of('Libraries')[2]).toMatchObject({ level: 'warn', fix: expect.stringContaining('2.27') });
  });

  always('a library that crashes as it loads is named; the rest of the page stands', async () => {
    const source = join(folder, 'crash.c');
    const library = join(folder, 'libcrash.so');
    writeFileSync(
      source,
      '#include <stdlib.h>\n__attribute__((constructor)) static void crash(void) { abort(); }\n',
    );
    execFileSync('gcc', ['-shared', '-fPIC', '-o', library, source]);
    const { code, failures, of } = await examine([], { ...standIns, PD_NCCL_LIB: library });
    expect(code).toBe(1);
    expect(failures).toEqual([
      expect.objectContaining({ what: 'nccl: the process that loads it ended with SIGABRT' }),
    ]);
    expect(of('GPUs').length).toBe(3);
    expect(of('Ports').length).toBeGreaterThan(0);
  });

  seldom('pd-launch names the GPUs it lacks and who would have had them', async () => {
    const many = await run('pd-launch', ['--device', 'cuda', '--prefill', '2'], standIns);
    expect(many.stderr).toMatch(
      /DEVICE_UNAVAILABLE: .*3 workers want a GPU each.*Stand-in GPU 1\): there is no cuda:2 for consumer-0/,
    );
    expect(many.code).toBe(1);
  });
});

always('a port that is taken stops the worker that wants it, with who holds it', async () => {
  const server = createServer();
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  const { port } = server.address() as { port: number };
  const { code, failures } = await examine(
    ['--role', 'producer', '--kv-host', '127.0.0.1', '--kv-port', String(port), '--port', '0'],
    nothing,
  );
  server.close();
  expect(code).toBe(1);
  expect(failures[0]?.what).toMatch(new RegExp(`KV: port ${port} .*pid ${process.pid}`));
});

seldom('a wrong kv_rank stops a worker', async () => {
  const json = { kv_connector: 'P2pNcclConnector', kv_role: 'kv_producer', kv_rank: 1, kv_parallel_size: 2 };
  const { code, failures } = await examine(['--kv-transfer-config', JSON.stringify(json)], nothing);
  expect(code).toBe(1);
  expect(failures[0]?.what).toMatch(/kv_rank.*expected 0 for a producer/);
});
