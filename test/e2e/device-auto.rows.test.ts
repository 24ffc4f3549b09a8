/** `--device auto`, the default, in real processes: on a machine without a GPU and on one with stand-ins. Nobody says `--device`. */
import { once } from 'node:events';
import { existsSync } from 'node:fs';
import { afterEach, describe, expect, test } from 'vitest';
import { standInEnvironment } from '../stand-ins/build.ts';
import { PATIENT } from '../support/cluster.ts';
import { Program } from '../support/process.ts';
import { complete } from '../support/requests.ts';
import { rows, withTheOthers } from '../support/rows.ts';
import { tempDir } from '../support/temp-dir.ts';

const GPUS = standInEnvironment();
/** Quick to start where GPUs are threads of a CPU. */
const SMALL = [
  ...['--num-blocks', '64', '--kv-buffer-size', '64e6', '--max-model-len', '256'],
  ...['--max-num-seqs', '2', '--max-num-batched-tokens', '64'],
];
const LOCAL = ['--host', '127.0.0.1', '--log-format', 'json'];

const programs: Program[] = [];
afterEach(async () => {
  await Promise.all(programs.splice(0).map((program) => program.stop('SIGTERM')));
});

function start(name: string, args: readonly string[], env: NodeJS.ProcessEnv): Program {
  const program = new Program(name, [...LOCAL, ...args], { ...PATIENT, ...env });
  programs.push(program);
  return program;
}

const worker = (env: NodeJS.ProcessEnv, ...args: string[]) =>
  start('pd-worker', ['--port', '0', ...SMALL, ...args], env);
const PRODUCER = ['--role', 'producer', '--kv-host', '127.0.0.1', '--kv-port', '0'];

/** Exit status and last words of a program that does not come to serve. */
async function refusal(program: Program): Promise<string> {
  if (!program.exited) await once(program.child, 'close');
  return `${program.child.exitCode} ${program.tail()}`;
}

/** What it chose, once it serves. */
async function chosen(program: Program): Promise<string[]> {
  await program.line(/Running on/);
  return program.lines.flatMap(({ msg }) => (msg.startsWith('Device: ') ? [msg] : []));
}

const onGpuMachine = existsSync('/dev/nvidia0');
/** Tests for every change, and those for where all is tested. */
const always = test.skipIf(withTheOthers);
const seldom = test.skipIf(!withTheOthers);

describe('pd-worker', () => {
  test.skipIf(withTheOthers || onGpuMachine)(
    'serves on the host where there is no GPU, and says so',
    async () => {
      // The runbook's line: it names a GPU that this machine has not.
      const program = worker({ CUDA_VISIBLE_DEVICES: '0' }, ...PRODUCER);
      expect(await chosen(program)).toEqual([
        'Device: host, as no GPU is visible: there is no NVIDIA device file in /dev for CUDA_VISIBLE_DEVICES=0 to name (--device auto)',
      ]);
      await program.line(/^Serving demo as producer on host/);
    },
  );

  test.skipIf(!withTheOthers || onGpuMachine)(
    'serves on the host where the driver reports no GPU, and where all are hidden',
    async () => {
      const [none, hidden] = [
        worker({ ...GPUS, PD_STANDIN_DEVICES: '0' }),
        worker({ ...GPUS, CUDA_VISIBLE_DEVICES: '' }),
      ];
      expect(await chosen(none)).toEqual([
        expect.stringContaining('host, as no GPU is visible: the CUDA driver reports none'),
      ]);
      expect(await chosen(hidden)).toEqual([
        expect.stringContaining('CUDA_VISIBLE_DEVICES, empty, hides every GPU'),
      ]);
    },
  );

  always('takes the first visible GPU, and computes there', async () => {
    const program = worker({ ...GPUS, CUDA_VISIBLE_DEVICES: '1' }, ...PRODUCER);
    expect(await chosen(program)).toEqual([
      'Device: cuda:0 (Stand-in GPU 1), the only visible GPU, CUDA_VISIBLE_DEVICES=1 (--device auto)',
    ]);
    await program.line(/^Serving demo as producer on cuda:0/);
  });

  seldom('needs no NCCL where it has no peers', async () => {
    const program = worker({ ...GPUS, PD_NCCL_LIB: '/no/libnccl.so' });
    expect(await chosen(program)).toEqual([expect.stringContaining('the first of 2 visible GPUs')]);
  });

  test('ends where a visible GPU cannot be used, with why and the way to do without', async () => {
    const cases = rows<readonly [NodeJS.ProcessEnv, RegExp]>(
      [
        [
          { PD_NCCL_LIB: '/no/libnccl.so' },
          /LIBRARY_NOT_FOUND: --device auto: a GPU is visible .*cannot load NCCL/,
        ],
      ],
      [
        // A context is made only by who serves: the choice stood by then.
        [
          { PD_STANDIN_FAULTS: 'cudaStreamCreateWithFlags=2' },
          /OUT_OF_DEVICE_MEMORY: [\s\S]*auto chose cuda:0/,
        ],
        [{ PD_CUBLAS_LIB: '/no/libcublas.so' }, /LIBRARY_NOT_FOUND: .*cannot load cuBLAS/],
        [{ PD_STANDIN_DRIVER: '11040' }, /LIBRARY_TOO_OLD: .*supports CUDA 11\.4/],
        [{ PD_STANDIN_FAULTS: 'cuInit=999' }, /DEVICE_UNAVAILABLE: .*cuInit failed with 999/],
        [{ CUDA_VISIBLE_DEVICES: '7' }, /DEVICE_UNAVAILABLE: .*=7 names no GPU of this machine, which has 2/],
      ],
    );
    const said = await Promise.all(cases.map(([env]) => refusal(worker({ ...GPUS, ...env }, ...PRODUCER))));
    for (const [i, [, pattern]] of cases.entries()) {
      expect(said[i]).toMatch(pattern);
      expect(said[i]).toMatch(/^1 [\s\S]*--device host/);
    }
  });

  always('a stop while it asks for GPUs is a stop', async () => {
    const program = worker({ ...GPUS, PD_STANDIN_FAULTS: 'cuInit=hang', PD_LOG_LEVEL: 'debug' });
    await program.line(/^choosing a device/);
    expect(await program.stop('SIGTERM')).toBe(0);
  });
});

describe('pd-launch', () => {
  const launch = (env: NodeJS.ProcessEnv, ...args: string[]) =>
    start('pd-launch', ['--free-ports', '--kv-load-failure', 'fail', ...args, '--', ...SMALL], env);
  const ready = async (program: Program) =>
    (await program.line(/ready: (http:\/\/\S+) serves.* on (host|cuda);/)).slice(1);
  const devices = ({ lines }: Program) =>
    lines.flatMap(({ msg, instance }) => (msg.startsWith('Device: ') ? [`${String(instance)} ${msg}`] : []));

  always('gives each worker a GPU of its own, and serves', async () => {
    const dir = await tempDir();
    const program = launch(GPUS, '--log-dir', dir);
    const [url, device] = await ready(program);
    expect(device).toBe('cuda');
    expect(devices(program).sort()).toEqual([
      'consumer-0 Device: cuda:1 (--device cuda:1)',
      'launch Device: a GPU each, cuda:0 (Stand-in GPU 0) for producer-0, cuda:1 (Stand-in GPU 1) for consumer-0 (--device auto)',
      'producer-0 Device: cuda:0 (--device cuda:0)',
    ]);
    const answer = await complete(url!, {
      prompt: 'Hello world',
      max_tokens: 4,
      temperature: 0,
      seed: 1,
      stream: true,
    });
    expect(answer.error).toBeUndefined();
    for (const name of ['launch', 'proxy', 'producer-0', 'consumer-0']) {
      expect(existsSync(`${dir}/${name}.log`), name).toBe(true);
    }
  });

  seldom('starts nothing where there are fewer GPUs than workers', async () => {
    const said = await refusal(launch({ ...GPUS, PD_STANDIN_DEVICES: '1' }));
    expect(said).toMatch(
      /^1 [\s\S]*DEVICE_UNAVAILABLE: --device auto: 2 workers want a GPU each, and this process sees 1 GPU .*no cuda:1 for consumer-0.*--device host/,
    );
    expect(said).not.toContain('started, pid');
  });

  seldom('says how to do without where a worker cannot start on its GPU', async () => {
    const said = await refusal(launch({ ...GPUS, PD_STANDIN_FAULTS: 'cudaStreamCreateWithFlags=2' }));
    expect(said).toMatch(
      /did not start[\s\S]*OUT_OF_DEVICE_MEMORY[\s\S]*auto chose cuda:0 and cuda:1;.*--device host/,
    );
  });

  test.skipIf(!withTheOthers || onGpuMachine)(
    'serves on the host where there is no GPU, and says so once',
    async () => {
      const program = launch({});
      expect((await ready(program))[1]).toBe('host');
      expect(devices(program).sort()).toEqual([
        'consumer-0 Device: host (--device host)',
        'launch Device: host, as no GPU is visible: there is no NVIDIA device file in /dev (--device auto)',
        'producer-0 Device: host (--device host)',
      ]);
    },
  );
});
