import { describe, expect, test } from 'vitest';
import { doctorCommand } from '../../../src/cli/doctor.ts';
import { fail, info, ok, reportOf, warn } from '../../../src/doctor/finding.ts';
import { renderReport } from '../../../src/doctor/render.ts';
import { diagnose } from '../../../src/doctor/scenarios.ts';
import { variablesSection } from '../../../src/doctor/variables.ts';
import type { ErrorCode, ErrorContext, ErrorData } from '../../../src/errors.ts';

describe('variables', () => {
  const config = { device: 'cuda:0', bind: { host: '127.0.0.1', port: 8082 }, announceHost: '' };
  const findings = (env: Record<string, string>, onGpu = true) =>
    variablesSection(config, onGpu, env).findings;
  const about = (env: Record<string, string>, name: string) =>
    findings(env).find(({ what }) => what.startsWith(`${name}=`));

  test.each([
    ['NCCL_COMM_BLOCKING', '1', 'fail'],
    ['NCCL_SOCKET_IFNAME', 'no-such-interface', 'fail'],
    ['NCCL_SOCKET_IFNAME', '=lo', 'info'],
    ['NCCL_SOCKET_IFNAME', '^docker', 'info'],
    ['CUDA_VISIBLE_DEVICES', '', 'fail'],
    ['CUDA_VISIBLE_DEVICES', '1,0', 'info'],
    ['CUDA_MODULE_LOADING', 'LAZY', 'warn'],
    ['NCCL_P2P_DISABLE', '1', 'warn'],
    ['NCCL_P2P_DISABLE', '0', 'info'],
    ['NCCL_SOMETHING_NEW', '1', 'info'],
  ])('%s=%s is %s', (name, value, level) => {
    expect(about({ [name]: value }, name)).toMatchObject({ level });
  });

  test('what workers would set is told, less what is set already', () => {
    const set = findings({ NCCL_CUMEM_ENABLE: '1' }).at(-1)?.what ?? '';
    expect(set).toContain('NCCL_SOCKET_IFNAME==lo (`=`: exactly this name)');
    expect(set).toContain('CUDA_MODULE_LOADING=EAGER');
    expect(set).not.toContain('CUMEM');
  });

  test('without a GPU a hidden GPU stops nobody', () => {
    expect(findings({ CUDA_VISIBLE_DEVICES: '' }, false)).toMatchObject([{ level: 'info' }]);
  });
});

describe('the four hang scenarios', () => {
  const answer = (error: object) => diagnose(504, JSON.stringify({ error: { message: 'words', ...error } }));
  const fix = (error: object) => answer(error).finding.fix;
  const error = (code: ErrorCode, context: ErrorContext = {}, cause?: ErrorData): ErrorData => ({
    code,
    message: 'words',
    context,
    ...(cause && { cause }),
  });
  const late = (context: ErrorContext) => error('KV_LOAD_TIMEOUT', context);

  test.each<[string, ErrorData, RegExp]>([
    ['a pair that never opened', error('PAIR_INIT_TIMEOUT'), /scenario 1.*communicator init/],
    [
      'data connections that are refused',
      error('KV_LOAD_FAILED', {}, error('PEER_UNREACHABLE', { stage: 'pair-init' })),
      /scenario 1/,
    ],
    ['a pair still being opened at the deadline', late({ pair: 'opening' }), /scenario 1/],
    [
      'a peer that is not reached',
      error('PEER_UNREACHABLE', { peer: '10.0.0.9:1' }),
      /scenario 2.*--peer 10\.0\.0\.9:1/,
    ],
    [
      'no pair and no near miss',
      late({ pair: 'none', peer: '10.0.0.1:8082', announced: '10.0.0.2:8084' }),
      /scenario 2.*--kv-announce-host.*--peer 10\.0\.0\.2:8084/,
    ],
    ['no room', error('KV_LOAD_FAILED', {}, error('KV_BUFFER_FULL')), /scenario 3.*--kv-buffer-size/],
    [
      'the innermost of three',
      error('KV_LOAD_FAILED', {}, error('KV_SEND_FAILED', {}, error('KV_BUFFER_FULL'))),
      /scenario 3.*--mem-pool-size-gb/,
    ],
    ['a cause that says nothing', error('PAIR_INIT_TIMEOUT', {}, error('INTERNAL')), /scenario 1/],
    ['the other send type', error('SEND_TYPE_MISMATCH'), /scenario 3.*--send-type/],
    [
      'a near miss',
      late({ pair: 'open', nearMiss: 'x' }),
      /scenario 4.*--kv-key.*VLLM_DISABLE_REQUEST_ID_RANDOM/,
    ],
    [
      'keyed by the full id',
      late({ nearMiss: 'x', kvKey: 'engine' }),
      /scenario 4.*this consumer with --kv-key/,
    ],
    [
      'a producer of ours',
      late({ nearMiss: 'x', peerIsOurs: true }),
      /scenario 4.*the producer with --kv-key/,
    ],
    [
      'one of vLLM',
      late({ nearMiss: 'x', peerIsOurs: false }),
      /scenario 4.*vLLM producer with VLLM_DISABLE/,
    ],
  ])('%s', (_, failed, pattern) => {
    expect(fix(failed)).toMatch(pattern);
  });

  test('a load that says nothing of its pair, or whose pair is open, is left to the workers', () => {
    for (const failed of [late({}), late({ pair: 'open' }), error('KV_LOAD_FAILED')]) {
      const { finding, ask } = answer(failed);
      expect(ask).toBe('workers');
      expect(finding.fix).toMatch(/^the error does not say why: pd-doctor --worker/);
    }
  });

  test('another code brings its own hint, and a body that is no JSON its words', () => {
    expect(fix({ code: 'NO_INSTANCE' })).toMatch(/GET \/health lists/);
    expect(diagnose(502, '<html>bad gateway').finding.what).toContain('bad gateway');
  });
});

describe('the page', () => {
  const report = reportOf('1.2.3', [
    { title: 'Ports', findings: [ok('free'), warn('busy', 'wait'), info('by the way')] },
    { title: 'Nothing', findings: [] },
  ]);

  test('is sound with warnings, and leaves empty sections out', () => {
    expect(report.sound).toBe(true);
    const page = renderReport(report, { colour: false, width: 80 });
    expect(page).toContain('  warn busy\n       -> wait\n');
    expect(page).not.toContain('Nothing');
    expect(page).toMatch(/no problems found, 1 warning\n$/);
  });

  test('keeps within its width, and counts failures', () => {
    const long = reportOf('1.2.3', [{ title: 'T', findings: [fail('word '.repeat(60).trim(), 'fix it')] }]);
    const page = renderReport(long, { colour: false, width: 60 });
    expect(long.sound).toBe(false);
    expect(Math.max(...page.split('\n').map((line) => line.length))).toBeLessThanOrEqual(60);
    expect(page).toMatch(/1 failure\n$/);
  });
});

describe('flags', () => {
  const worker = async (...argv: string[]) => (await doctorCommand(argv, {})).options.worker;
  const JSON_OF = (rank: number) =>
    JSON.stringify({
      kv_connector: 'P2pNcclConnector',
      kv_role: 'kv_consumer',
      kv_rank: rank,
      kv_parallel_size: 2,
    });

  test('a worker is resolved as pd-worker would, more flags after --', async () => {
    expect(
      await worker('--role', 'producer', '--device', 'cuda:1', '--', '--send-type', 'GET'),
    ).toMatchObject({
      config: { role: 'producer', transfer: { device: 'cuda:1', sendType: 'GET' }, http: { port: 8081 } },
    });
  });

  test('a wrong kv_rank is told with the one that it should be', async () => {
    expect(await worker('--kv-transfer-config', JSON_OF(0))).toMatchObject({
      code: 'CONFIG_INVALID',
      message: expect.stringMatching(/kv_rank.*expected 1 for a consumer/),
    });
    expect(await worker('--kv-transfer-config', JSON_OF(1))).toMatchObject({ config: { role: 'consumer' } });
  });

  test('a flag that pd-worker does not have is a finding, and its own bad values are refused', async () => {
    expect(await worker('--', '--no-such-flag')).toMatchObject({ code: 'CONFIG_INVALID' });
    await expect(worker('--peer', 'nowhere')).rejects.toThrow(/--peer.*HOST:PORT/);
    await expect(worker('--timeout', 'soon')).rejects.toThrow(/--timeout/);
  });
});
