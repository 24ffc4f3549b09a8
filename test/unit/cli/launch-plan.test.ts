import { readdirSync, readFileSync, symlinkSync, writeFileSync } from 'node:fs';
import { createServer } from 'node:net';
import { join } from 'node:path';
import { describe, expect, test } from 'vitest';
import { launchOptions } from '../../../src/cli/launch.ts';
import { LaunchOutput, LogFiles } from '../../../src/cli/launch-output.ts';
import { launchDevices, planLaunch } from '../../../src/cli/launch-plan.ts';
import { tempDir } from '../../support/temp-dir.ts';

const flag = (args: readonly string[], name: string) => args[args.indexOf(name) + 1];
const plan = async (...argv: string[]) => {
  const { settings } = launchOptions(['--device', 'host', ...argv], {});
  return await planLaunch(settings, (await launchDevices(settings, {})).devices);
};

describe('pd-launch', () => {
  test('gives the first producer and consumer the ports of the runbook, further workers the next', () => {
    const { settings } = launchOptions(['--prefill', '1'], {});
    expect([settings.port, settings.discoveryPort, settings.basePort]).toEqual([10_002, 30_002, 8_081]);
  });

  test('takes ports upward from --base-port', async () => {
    const free = await plan('--free-ports');
    const base = free.workers[0]!.httpPort; // free a moment ago; those above it most likely too
    const { workers } = await plan(
      ...['--decode', '2', '--base-port', String(base)],
      ...['--port', String(free.proxy.httpPort), '--discovery-port', String(free.proxy.discoveryPort)],
    ).catch(() => ({ workers: [] }));
    const ports = workers.flatMap(({ httpPort, kvPort }) => [httpPort, kvPort]);
    if (workers.length > 0) expect(ports).toEqual([0, 1, 2, 3, 4, 5].map((i) => base + i));
  });

  test('with --free-ports all differ, and workers ping the proxy that is started with them', async () => {
    const { proxy, workers } = await plan('--free-ports', '--prefill', '2', '--decode', '3');
    const ports = [proxy.httpPort, proxy.discoveryPort, ...workers.flatMap((w) => [w.httpPort, w.kvPort])];
    expect(new Set(ports).size).toBe(12);
    expect(workers.map(({ spec }) => spec.name)).toEqual([
      'producer-0',
      'producer-1',
      'consumer-0',
      'consumer-1',
      'consumer-2',
    ]);
    for (const { spec, role, httpPort, kvPort } of workers) {
      expect(flag(spec.args, '--proxy')).toBe(`127.0.0.1:${proxy.discoveryPort}`);
      expect(flag(spec.args, '--role')).toBe(role);
      expect(flag(spec.args, '--port')).toBe(String(httpPort));
      expect(flag(spec.args, '--kv-port')).toBe(String(kvPort));
    }
    expect(flag(proxy.spec.args, '--discovery-port')).toBe(String(proxy.discoveryPort));
  });

  test('where there is something to choose from, the proxy knows what workers have cached', async () => {
    const { proxy, workers } = await plan('--free-ports', '--prefill', '2', '--model', 'some/dir');
    expect(flag(proxy.spec.args, '--tokenizer')).toBe('some/dir');
    for (const { spec } of workers) expect(flag(spec.args, '--kv-events-port')).toBe('0');
    const pair = await plan('--free-ports');
    expect(pair.proxy.spec.args).not.toContain('--tokenizer');
    for (const { spec } of pair.workers) expect(spec.args).not.toContain('--kv-events-port');
  });

  test('starts each worker on the device that was chosen for it', async () => {
    const { settings } = launchOptions(['--free-ports', '--decode', '2'], {});
    const { workers } = await planLaunch(settings, ['cuda:0', 'cuda:1', 'cuda:2']);
    expect(workers.map(({ spec }) => flag(spec.args, '--device'))).toEqual(['cuda:0', 'cuda:1', 'cuda:2']);
    expect(workers.map(({ device }) => device)).toEqual(['cuda:0', 'cuda:1', 'cuda:2']);
  });

  test('puts all workers on one GPU that is named, natively by direct, and divides its memory', async () => {
    const { settings } = launchOptions(['--free-ports', '--device', 'cuda:1', '--decode', '2'], {});
    const { devices, line } = await launchDevices(settings, {});
    expect(line).toBe('Device: cuda:1, which 3 workers share (--device cuda:1)');
    const { workers } = await planLaunch(settings, devices);
    for (const { spec } of workers) {
      expect(flag(spec.args, '--device')).toBe('cuda:1');
      expect(flag(spec.args, '--wire')).toBe('native');
      expect(flag(spec.args, '--transport')).toBe('direct');
      expect(flag(spec.args, '--workers-per-gpu')).toBe('3');
    }
    for (const { spec } of (await plan('--free-ports')).workers) {
      expect(spec.args).not.toContain('--workers-per-gpu');
    }
  });

  test("leaves the device to the machine, and takes vLLM's log level, unless told otherwise", () => {
    const options = launchOptions([], { VLLM_LOGGING_LEVEL: 'DEBUG' });
    expect(options.settings).toMatchObject({ device: 'auto', logLevel: 'debug' });
    expect(launchOptions([], { VLLM_LOGGING_LEVEL: 'loud' }).warnings).toEqual([
      expect.stringContaining('VLLM_LOGGING_LEVEL=loud is no level'),
    ]);
  });

  test('passes flags on to the programs of one kind, behind those of all', async () => {
    const { proxy, workers } = await plan(
      ...[
        '--free-ports',
        '--proxy-flags',
        '--bypass-wait  150ms',
        '--decode-flags',
        '--max-num-batched-tokens 512',
      ],
      ...['--prefill-flags', '--log-level debug', '--', '--max-num-seqs', '4'],
    );
    const [producer, consumer] = workers.map(({ spec }) => spec.args);
    expect(proxy.spec.args.slice(-2)).toEqual(['--bypass-wait', '150ms']);
    expect(producer!.slice(-4)).toEqual(['--max-num-seqs', '4', '--log-level', 'debug']);
    expect(consumer!.slice(-4)).toEqual(['--max-num-seqs', '4', '--max-num-batched-tokens', '512']);
  });

  test.each([
    ['--proxy-flags', '--bypass-wait 1s --port 9000'],
    ['--proxy-flags', '--tls-cert=cert.pem --tls-key=key.pem'],
    ['--prefill-flags', '--role both'],
    ['--decode-flags', '--kv-port=1'],
  ])('refuses %s "%s", by which it would wait where nobody is, or name what is not so', (option, flags) => {
    const word = /--(port|tls-cert|role|kv-port)/.exec(flags)![0];
    expect(() => launchOptions([option, flags], {})).toThrow(
      expect.objectContaining({
        code: 'CONFIG_INVALID',
        message: expect.stringContaining(`${option}: ${word} is set by pd-launch`),
      }),
    );
  });

  test('passes its own worker options on, then whatever stands after --', async () => {
    const argv = ['--free-ports', '--send-type', 'GET', '--model', 'some/dir', '--', '--max-num-seqs', '4'];
    for (const { spec } of (await plan(...argv)).workers) {
      expect(flag(spec.args, '--send-type')).toBe('GET');
      expect(flag(spec.args, '--model')).toBe('some/dir');
      expect(spec.args.slice(-2)).toEqual(['--max-num-seqs', '4']);
    }
  });

  test('names a port that is taken, and what it was for, before anything starts', async () => {
    const server = createServer();
    await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
    const { port } = server.address() as { port: number };
    await expect(plan('--port', String(port))).rejects.toMatchObject({
      code: 'PORT_IN_USE',
      message: expect.stringMatching(new RegExp(`HTTP of the proxy.*${port}.*pid ${process.pid}`)),
    });
    server.close();
  });

  test.each([
    [['--prefill', '0'], '--prefill'],
    [['--send-type', 'PUSH'], 'PUT, PUT_ASYNC, GET'],
    [['--device', 'tpu'], '--device'],
  ])('refuses %j by name', (argv, named) => {
    expect(() => launchOptions(argv, {})).toThrow(named);
  });
});

describe('lines of several programs', () => {
  const lines = (format: 'pretty' | 'json', colour: boolean) => {
    const written: string[] = [];
    const output = new LaunchOutput({ format, colour, width: 10, write: (line) => written.push(line) });
    return { output, written };
  };

  test('carry the name of who wrote them', () => {
    const { output, written } = lines('pretty', false);
    output.line('proxy', 'Running on http://x');
    expect(written).toEqual(['proxy      | Running on http://x\n']);
  });

  test('stay JSON where JSON is asked for, also those that were none', () => {
    const { output, written } = lines('json', false);
    output.line('proxy', '{"level":"info","msg":"hi"}');
    output.line('proxy', 'Error: "crash"');
    expect(written.map((line) => JSON.parse(line))).toEqual([
      { instance: 'proxy', level: 'info', msg: 'hi' },
      { instance: 'proxy', level: 'info', msg: 'Error: "crash"' },
    ]);
  });
});

describe('--log-dir', () => {
  const names = ['launch', 'proxy', 'producer-0'];

  test('keeps what each program says in a file of its own, over restarts', async () => {
    const dir = join(await tempDir(), 'not/there/yet');
    for (const run of ['first', 'second']) {
      const files = new LogFiles(dir, names, unexpected);
      files.line('proxy', `${run} of the proxy`);
      files.line('producer-0', `${run} of the producer`);
      files.close();
    }
    expect(readdirSync(dir).sort()).toEqual(['launch.log', 'producer-0.log', 'proxy.log']);
    const kept = (name: string) => readFileSync(join(dir, name), 'utf8');
    expect(kept('proxy.log')).toBe('first of the proxy\nsecond of the proxy\n');
    expect(kept('producer-0.log')).toBe('first of the producer\nsecond of the producer\n');
  });

  test('refuses a directory that it cannot make, by name', async () => {
    const file = join(await tempDir(), 'file');
    writeFileSync(file, '');
    for (const dir of [join(file, 'logs'), file, '/proc/no/logs']) {
      expect(() => new LogFiles(dir, names, unexpected)).toThrow(
        expect.objectContaining({
          code: 'LOG_UNWRITABLE',
          message: expect.stringContaining(`--log-dir ${dir}: `),
        }),
      );
    }
  });

  test('says once that a file takes no more, and goes on', async () => {
    const dir = await tempDir();
    symlinkSync('/dev/full', join(dir, 'proxy.log'));
    const said: string[] = [];
    const files = new LogFiles(dir, names, (text) => said.push(text));
    files.line('proxy', 'one');
    files.line('proxy', 'two');
    files.line('producer-0', 'three');
    files.close();
    expect(said).toEqual([
      expect.stringMatching(/^LOG_UNWRITABLE: .*proxy\.log: ENOSPC.*the output of proxy is no longer kept/),
    ]);
    expect(readFileSync(join(dir, 'producer-0.log'), 'utf8')).toBe('three\n');
  });

  function unexpected(text: string): void {
    throw new Error(text);
  }
});
