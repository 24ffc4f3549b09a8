/** Configuration given in code: few fields become what the flags would have made, and mistakes are named. */
import { expect, it } from 'vitest';
import { proxyConfig as proxyConfigOfFlags } from '../../../src/cli/proxy.ts';
import { demoModelDir } from '../../../src/config/demo-model.ts';
import { transferOptions, workerConfig } from '../../../src/config/embedded.ts';
import { proxyConfig } from '../../../src/config/proxy-config.ts';
import { DEFAULT_TIMEOUTS } from '../../../src/config/transfer-options.ts';
import { PdError } from '../../../src/errors.ts';
import { resolveFlags } from '../../support/worker-flags.ts';

const QUIET = { level: 'warn', format: 'auto' };
const LOOPBACK = { host: '127.0.0.1', port: 0 };

function problem(make: () => unknown): string {
  try {
    make();
  } catch (error) {
    if (error instanceof PdError) return `${error.code} ${error.message}`;
    throw error;
  }
  throw new Error('nothing was wrong');
}

it('a worker of no fields is the one of no flags, on the host and on loopback, and quiet', () => {
  const { config } = resolveFlags([], { env: {}, demoModelDir, autoDevice: 'host' });
  expect(workerConfig()).toEqual({
    ...config,
    http: LOOPBACK,
    httpAnnounceHost: '127.0.0.1',
    transfer: { ...config.transfer, bind: LOOPBACK, announceHost: '127.0.0.1', log: QUIET },
  });
  // An engine of its own sends blocks as they lie in the cache that it is given.
  expect({ ...transferOptions(), wireLayout: 'kv-first' }).toEqual(workerConfig().transfer);
  expect(transferOptions()).not.toHaveProperty('wireLayout');
});

it('a proxy of no fields is the one of no flags, on loopback and quiet', () => {
  expect(proxyConfig()).toEqual({
    ...proxyConfigOfFlags([], {}),
    http: LOOPBACK,
    discovery: LOOPBACK,
    log: QUIET,
  });
});

it('fields that are given stand, nested ones beside the defaults of their neighbours', () => {
  const config = workerConfig({
    role: 'consumer',
    http: '0.0.0.0:8083',
    kv: { bind: '[::1]:14579' },
    proxy: '0.0.0.0:30002',
    timeouts: { load: 5 },
    numBlocks: 7,
    // As a program without exactOptionalPropertyTypes may write it.
    ...({ blockSize: undefined } as object),
  });
  expect(config).toMatchObject({
    role: 'consumer',
    http: { host: '0.0.0.0', port: 8083 },
    transfer: {
      bind: { host: '::1', port: 14_579 },
      announceHost: '::1',
      rank: 0,
      timeouts: { ...DEFAULT_TIMEOUTS, load: 5 },
    },
    proxy: [{ host: '127.0.0.1', port: 30_002 }],
    numBlocks: 7,
    blockSize: 16,
  });
  expect(config.httpAnnounceHost).not.toBe('0.0.0.0');
  expect(transferOptions({ device: 'cuda', timeouts: { answer: 9 } })).toMatchObject({
    device: 'cuda:0',
    bind: LOOPBACK,
    announceHost: '127.0.0.1',
    timeouts: { ...DEFAULT_TIMEOUTS, answer: 9 },
  });
});

it('complete options go through unchanged, so that they can be kept and given again', () => {
  const options = transferOptions({ bind: '127.0.0.1:5000', sendType: 'GET' });
  expect(transferOptions(options)).toEqual(options);
  const config = workerConfig({ role: 'producer', kv: { bind: '127.0.0.2:5000', rank: 1 }, kvKey: 'engine' });
  expect(workerConfig(config)).toEqual(config);
  const changed = workerConfig({ ...config, kv: { bind: '127.0.0.3:6000' }, sendType: 'GET' });
  expect(changed.transfer).toEqual({
    ...config.transfer,
    bind: { host: '127.0.0.3', port: 6000 },
    announceHost: '127.0.0.3',
    rank: 0,
    sendType: 'GET',
  });
});

it('says which field is wrong', () => {
  const wrong = (fields: object) => problem(() => transferOptions(fields));
  expect(wrong({ sendType: 'PUSH' })).toMatch(/^CONFIG_INVALID transfer options: sendType: .*PUT_ASYNC/);
  expect(wrong({ sendTyp: 'PUT' })).toContain('"sendTyp"');
  expect(wrong({ bind: '::1:80' })).toMatch(/bind: "::1:80" is not HOST:PORT/);
  expect(wrong({ bind: 80 })).toMatch(/bind: expected HOST:PORT/);
  expect(wrong({ device: 'auto' })).toMatch(/device: expected host or cuda:N/);
  expect(wrong({ device: 'gpu' })).toMatch(/device: expected host or cuda:N/);
  expect(wrong({ kvBufferSize: 1.5 })).toMatch(/kvBufferSize: .*int/);
  expect(wrong({ timeouts: { load: 0 } })).toMatch(/timeouts\.load: /);
  expect(wrong({ fingerprint: 'abc' })).toMatch(/fingerprint: /);
  expect(problem(() => workerConfig({ kvKey: 'x' as 'engine' }))).toMatch(/worker configuration: kvKey: /);
  expect(problem(() => workerConfig({ transfer: { rank: -1 } }))).toMatch(/transfer\.rank: /);
  expect(problem(() => workerConfig({ modelDir: '/nowhere' }))).toMatch(/^CONFIG_INVALID .*\/nowhere/);
  expect(problem(() => workerConfig({ executor: 'cuda' }))).toMatch(/^CONFIG_INVALID .*executor/);
  expect(problem(() => proxyConfig({ instanceTimeoutMs: -1 }))).toMatch(/instanceTimeoutMs: /);
});
