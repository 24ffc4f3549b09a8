import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { proxyConfig } from '../../../src/cli/proxy.ts';
import { resolveHosts } from '../../../src/config/hosts.ts';
import type { WorkerEnvironment } from '../../../src/config/resolve-worker.ts';
import {
  nativeEnvironment,
  ncclEnvironment,
  prepareNativeEnvironment,
} from '../../../src/device/native-env.ts';
import { sharedTempDir } from '../../support/temp-dir.ts';
import { resolveFlags } from '../../support/worker-flags.ts';

const modelDir = sharedTempDir();
writeFileSync(join(modelDir, 'config.json'), '{}');

const address = { netmask: '', mac: '', internal: false, cidr: null };
const lan = [{ ...address, address: '10.0.0.7', family: 'IPv4' as const }];
const lan6 = [{ ...address, address: '2001:db8::7', family: 'IPv6' as const, scopeid: 0 }];

function resolve(
  args: string[],
  env: Record<string, string> = {},
  interfaces: NonNullable<WorkerEnvironment['interfaces']> = { eth0: [...lan, ...lan6] },
  autoDevice = 'host',
) {
  return resolveFlags(args, { env, interfaces, demoModelDir: () => modelDir, autoDevice });
}

const config = (args: string[], env?: Record<string, string>) => resolve(args, env).config;

/** What people start vLLM with. */
const RUNBOOK = {
  kv_connector: 'P2pNcclConnector',
  kv_role: 'kv_producer',
  kv_buffer_size: '1e9',
  kv_port: '8082',
  kv_connector_extra_config: {
    proxy_ip: '0.0.0.0',
    proxy_port: '30002',
    http_port: '8081',
    send_type: 'PUT_ASYNC',
    nccl_num_channels: '16',
  },
};
const vllm = (json: object, ...args: string[]) => ['--kv-transfer-config', JSON.stringify(json), ...args];

describe('worker configuration', () => {
  it('serves the demo model undivided by default', () => {
    expect(config([])).toMatchObject({
      role: 'both',
      modelDir,
      servedModelNames: ['demo'],
      executor: 'host',
      toolCallParser: 'auto',
      reasoningParser: 'auto',
      http: { host: '0.0.0.0', port: 8080 },
      httpAnnounceHost: '10.0.0.7',
      transfer: {
        device: 'host',
        sendType: 'PUT_ASYNC',
        kvBufferSize: 1e9,
        memPoolSize: 32 * 2 ** 30,
        timeouts: { connect: 5_000, load: 60_000, orphan: 60_000 },
      },
      loadFailure: 'recompute',
      blockSize: 16,
      enablePrefixCaching: true,
      randomizeRequestIds: true,
      drainTimeoutMs: 30_000,
      pingIntervalMs: 3_000,
    });
    expect(config([]).proxy).toEqual([]);
  });

  it('has the ports of the runbook per role', () => {
    expect(config(['--role', 'producer']).http.port).toBe(8081);
    expect(config(['--role', 'consumer']).http.port).toBe(8083);
    expect(config(['--role', 'consumer', '--port', '0']).http.port).toBe(0);
  });

  it('names the model as given', () => {
    expect(config(['--model', modelDir]).servedModelNames).toEqual([modelDir]);
    expect(config(['--model', modelDir, '--served-model-name', 'a', 'b']).servedModelNames).toEqual([
      'a',
      'b',
    ]);
  });

  it('tells others what is bound, another address where that says nothing, and PD_HOST_IP above both', () => {
    const bound = config(['--host', '127.0.0.1', '--kv-host', '::1']);
    expect([bound.httpAnnounceHost, bound.transfer.announceHost]).toEqual(['127.0.0.1', '::1']);
    const any = config(['--host', '::', '--kv-host', '0.0.0.0']);
    expect([any.httpAnnounceHost, any.transfer.announceHost]).toEqual(['2001:db8::7', '10.0.0.7']);
    const told = config(['--host', '127.0.0.1'], { PD_HOST_IP: '192.0.2.1' });
    expect([told.httpAnnounceHost, told.transfer.announceHost]).toEqual(['192.0.2.1', '192.0.2.1']);
    const explicit = config(['--kv-announce-host', '198.51.100.1'], { PD_HOST_IP: '192.0.2.1' });
    expect(explicit.transfer.announceHost).toBe('198.51.100.1');
    // A translated address is not this machine's own: told, never bound.
    expect(config([], { PD_HOST_IP: '192.0.2.1' }).transfer).toMatchObject({
      bind: { host: '10.0.0.7' },
      announceHost: '192.0.2.1',
    });
  });

  it('binds IPv6 on a machine without IPv4, and says whom 127.0.0.1 will do for', () => {
    const lo6 = { ...address, address: '::1', family: 'IPv6' as const, scopeid: 0, internal: true };
    const lo4 = { ...address, address: '127.0.0.1', family: 'IPv4' as const, internal: true };
    const only6 = { lo: [lo4, lo6], eth0: lan6 };
    const proxy = ['--role', 'producer', '--proxy', '[2001:db8::9]:30002'];
    const { config: worker, warnings } = resolve(proxy, {}, only6);
    expect(worker.transfer).toMatchObject({ bind: { host: '2001:db8::7' }, announceHost: '2001:db8::7' });
    expect(worker.httpAnnounceHost).toBe('127.0.0.1');
    expect(warnings).toEqual([
      expect.stringMatching(
        /^HTTP is bound to 0\.0\.0\.0.*127\.0\.0\.1 is told, so the proxy must be on this host.*--host ::/,
      ),
    ]);
    expect(resolve([...proxy, '--host', '::'], {}, only6).warnings).toEqual([]);
    expect(resolve([], {}, { lo: [lo6] }).config.transfer.bind.host).toBe('::1');
    expect(resolve([], {}, { lo: [lo4] }).config.transfer.bind.host).toBe('127.0.0.1');
  });

  it('tells an address with a zone id to nobody outside of this machine', () => {
    const link = { ...address, address: 'fe80::7', family: 'IPv6' as const, scopeid: 2 };
    const here = { eth0: [link, ...lan6] };
    const args = ['--role', 'consumer', '--host', '::', '--kv-host', 'fe80::7%eth0', '--proxy'];
    expect(() => resolve([...args, '[2001:db8::9]:30002'], {}, here)).toThrow(
      /KV address fe80::7%eth0 carries a zone id.*--kv-announce-host/,
    );
    const { config: worker, warnings } = resolve([...args, '[2001:db8::7]:30002'], {}, here);
    expect(worker.transfer.announceHost).toBe('fe80::7%eth0');
    expect(warnings).toEqual([expect.stringContaining('proxy and peers must run here')]);
    expect(
      resolve([...args, '[2001:db8::9]:30002', '--kv-announce-host', '2001:db8::7'], {}, here).warnings,
    ).toEqual([]);
  });

  it('tells a v4-mapped address as what it is', () => {
    expect(config(['--kv-host', '::ffff:10.0.0.7']).transfer).toMatchObject({
      bind: { host: '::ffff:10.0.0.7' },
      announceHost: '10.0.0.7',
    });
  });

  it('looks host names up once, and says what they are', async () => {
    const named = config(['--kv-host', 'localhost', '--host', 'localhost', '--proxy', 'localhost:30002']);
    const { config: found, lines } = await resolveHosts(named);
    expect(found).toMatchObject({
      http: { host: '127.0.0.1' },
      httpAnnounceHost: '127.0.0.1',
      transfer: { bind: { host: '127.0.0.1' }, announceHost: '127.0.0.1' },
      // for all its addresses, whenever they change
      proxy: [{ host: 'localhost', port: 30_002 }],
    });
    expect(lines).toContain('KV host localhost is 127.0.0.1 (IPv4)');
    await expect(resolveHosts(config(['--kv-host', 'no.such.host.invalid']))).rejects.toThrow(
      /^KV host "no.such.host.invalid"/,
    );
  });

  it('takes who may talk to it, who may look at it, and how it speaks to vLLM', () => {
    expect(config([])).toMatchObject({ transfer: { wireLayout: 'kv-first', kvKey: 'transfer' } });
    expect(config([]).transfer).not.toHaveProperty('allowPeers');
    expect(config([])).not.toHaveProperty('debugState');
    expect(config(['--debug-state']).debugState).toBe('loopback');
    expect(config(['--debug-state-remote']).debugState).toBe('anyone');
    expect(config([])).not.toHaveProperty('debugLogits');
    expect(config([], { PD_DEBUG_LOGITS: '/tmp/logits' }).debugLogits).toBe('/tmp/logits');
    expect(config(['--allow-peers', '10.0.0.0/8', 'fd00::/8']).transfer.allowPeers).toEqual([
      '10.0.0.0/8',
      'fd00::/8',
    ]);
    expect(config([], { PD_ALLOW_PEERS: '10.0.0.1,::1' }).transfer.allowPeers).toEqual(['10.0.0.1', '::1']);
    expect(config(['--wire-layout', 'blocks-first', '--kv-key', 'engine'])).toMatchObject({
      transfer: { wireLayout: 'blocks-first', kvKey: 'engine' },
    });
  });

  it('computes where the device is, unless told otherwise', () => {
    expect(config(['--device', 'cuda'])).toMatchObject({
      transfer: { device: 'cuda:0' },
      executor: 'cuda',
      maxNumSeqs: 256,
    });
    expect(config(['--device', 'cuda:1', '--executor', 'host'])).toMatchObject({
      transfer: { device: 'cuda:1' },
      executor: 'host',
      maxNumSeqs: 32,
    });
  });

  it('leaves the device to what the machine has, unless one is named', () => {
    const onGpu = (...args: string[]) => resolve(args, {}, undefined, 'cuda:0').config;
    expect(onGpu()).toMatchObject({ transfer: { device: 'cuda:0' }, executor: 'cuda', maxNumSeqs: 256 });
    expect(onGpu('--device', 'auto', '--executor', 'host')).toMatchObject({
      transfer: { device: 'cuda:0' },
      executor: 'host',
    });
    expect(onGpu('--device', 'host')).toMatchObject({ transfer: { device: 'host' }, executor: 'host' });
  });

  it("takes vLLM's log level where ours is not given", () => {
    const level = (value: string, args: string[] = [], env: Record<string, string> = {}) =>
      config(args, { VLLM_LOGGING_LEVEL: value, ...env }).transfer.log.level;
    expect(['DEBUG', 'info', 'Warning', 'ERROR', 'CRITICAL'].map((value) => level(value))).toEqual([
      ...['debug', 'info', 'warn', 'error', 'error'],
    ]);
    expect(level('DEBUG', ['--log-level', 'warn'])).toBe('warn');
    expect(level('DEBUG', [], { PD_LOG_LEVEL: 'error' })).toBe('error');
    const file = join(modelDir, 'log.json');
    writeFileSync(file, '{"log-level": "trace"}');
    expect(level('DEBUG', ['--config', file])).toBe('trace');

    const unknown = { VLLM_LOGGING_LEVEL: 'LOUD' };
    expect(resolve([], unknown)).toMatchObject({
      config: { transfer: { log: { level: 'info' } } },
      warnings: [expect.stringMatching(/^VLLM_LOGGING_LEVEL=LOUD is no level.*DEBUG.*--log-level/)],
    });
    expect(resolve(['--log-level', 'info'], unknown).warnings).toEqual([]);

    const warned: string[] = [];
    expect(proxyConfig([], { VLLM_LOGGING_LEVEL: 'DEBUG' }).log.level).toBe('debug');
    expect(proxyConfig([], unknown, (text) => warned.push(text)).log.level).toBe('info');
    expect(warned).toEqual([expect.stringContaining('VLLM_LOGGING_LEVEL=LOUD')]);
  });

  it.each([
    [['--executor', 'cuda'], /--executor/],
    [['--device', 'tpu'], /^--device: "tpu" is not allowed; expected auto, host, cuda or cuda:N/],
    [['--model', '/nonexistent'], /--model \/nonexistent: .*no config.json/],
    [['--kv-buffer-size', 'big'], /^--kv-buffer-size/],
    [['--kv-orphan-timeout', '-1'], /^--kv-orphan-timeout/],
    [['--allow-peers', '10.0.0.0/99'], /^--allow-peers.*expected an IP address or a range/],
    [['--wire-layout', 'mla'], /^--wire-layout.*tokens, kv-first, blocks-first/],
  ])('refuses %j', (args, message) => {
    expect(() => config(args)).toThrow(
      expect.objectContaining({ code: 'CONFIG_INVALID', message: expect.stringMatching(message) }),
    );
  });
});

describe("vLLM's kv-transfer-config", () => {
  it('is accepted as it is', () => {
    const { config: worker, warnings } = resolve(vllm(RUNBOOK));
    expect(warnings).toEqual([]);
    expect(worker).toMatchObject({
      role: 'producer',
      http: { port: 8081 },
      proxy: [{ host: '127.0.0.1', port: 30_002 }],
      transfer: { bind: { port: 8082 }, sendType: 'PUT_ASYNC', kvBufferSize: 1e9, ncclNumChannels: 16 },
    });
  });

  it('means the same with numbers as with strings, and has the defaults of vLLM', () => {
    const numbers = {
      ...RUNBOOK,
      kv_buffer_size: 1e9,
      kv_port: 8082,
      kv_connector_extra_config: {
        ...RUNBOOK.kv_connector_extra_config,
        proxy_port: 30_002,
        http_port: 8081,
        nccl_num_channels: 16,
        mem_pool_size_gb: 4,
      },
    };
    const same = config(vllm(RUNBOOK));
    expect(config(vllm(numbers))).toEqual({
      ...same,
      transfer: { ...same.transfer, memPoolSize: 4 * 2 ** 30 },
    });
    const bare = { kv_connector: 'P2pNcclConnector', kv_role: 'kv_consumer' };
    const overruled = resolve([...vllm(bare), '--role', 'producer']);
    expect(overruled.config.role).toBe('producer');
    expect(overruled.warnings).toEqual([expect.stringContaining('says consumer; --role producer wins')]);
    expect(config(vllm(bare))).toMatchObject({
      role: 'consumer',
      transfer: {
        sendType: 'PUT_ASYNC',
        ncclNumChannels: 8,
        memPoolSize: 32 * 2 ** 30,
        kvBufferSize: 1e9,
        bind: { port: 14_579 },
      },
    });
    // What vLLM writes into it by itself.
    const full = { ...RUNBOOK, kv_ip: '127.0.0.1', kv_buffer_device: 'cuda', engine_id: 'x', kv_rank: null };
    expect(resolve(vllm(full)).warnings).toEqual([]);
  });

  it('ranks below flags, environment and file', () => {
    expect(config(vllm(RUNBOOK, '--kv-port', '9'))).toMatchObject({ transfer: { bind: { port: 9 } } });
    expect(config(vllm(RUNBOOK), { PD_SEND_TYPE: 'GET' }).transfer.sendType).toBe('GET');
    const file = join(modelDir, 'options.json');
    writeFileSync(file, JSON.stringify({ 'nccl-num-channels': 32, 'kv-transfer-config': RUNBOOK }));
    expect(config(['--config', file])).toMatchObject({
      role: 'producer',
      transfer: { ncclNumChannels: 32 },
    });
  });

  it('reads an IPv6 proxy, and an empty one as none', () => {
    const extra = (values: object) => config(vllm({ ...RUNBOOK, kv_connector_extra_config: values }));
    expect(extra({ proxy_ip: '::1', proxy_port: 30_002 }).proxy).toEqual([{ host: '::1', port: 30_002 }]);
    expect(extra({ proxy_ip: '::', proxy_port: '30002' }).proxy).toEqual([{ host: '::1', port: 30_002 }]);
    expect(extra({ proxy_ip: '', proxy_port: '' }).proxy).toEqual([]);
  });

  it('takes several proxies, by flags and in the environment', () => {
    const two = [
      { host: '10.0.0.1', port: 30_002 },
      { host: 'proxies', port: 30_003 },
    ];
    expect(config(['--proxy', '10.0.0.1:30002', 'proxies:30003']).proxy).toEqual(two);
    expect(config(['--proxy', '10.0.0.1:30002', '--proxy', 'proxies:30003']).proxy).toEqual(two);
    expect(config([], { PD_PROXY: '10.0.0.1:30002,proxies:30003' }).proxy).toEqual(two);
  });

  it('warns of unknown keys by name', () => {
    const { warnings } = resolve(
      vllm({ ...RUNBOOK, kv_colour: 1, kv_connector_extra_config: { mood: 'good' } }),
    );
    expect(warnings).toHaveLength(2);
    expect(warnings[0]).toContain('kv_colour');
    expect(warnings[1]).toContain('kv_connector_extra_config.mood');
  });

  it.each([
    [{ kv_rank: '0', kv_parallel_size: '2' }, undefined],
    [{ kv_rank: 0 }, undefined],
    [{ kv_rank: 5, kv_parallel_size: 1 }, undefined],
    [{ kv_parallel_size: 2 }, undefined],
    [{ kv_rank: 1, kv_parallel_size: 2 }, /kv_rank.*: 1 is not allowed; expected 0 for a producer/],
    [{ kv_role: 'kv_consumer', kv_rank: '0', kv_parallel_size: '2' }, /expected 1 for a consumer/],
    [{ kv_rank: 0, kv_parallel_size: 3 }, /kv_parallel_size.*expected 1 or 2/],
    [{ kv_rank: 'first' }, /kv_rank/],
    [{ kv_connector: 'NixlConnector' }, /kv_connector in.*P2pNcclConnector/],
    [{ kv_role: 'kv_both' }, /kv_role/],
    [{ kv_port: 'abc' }, /^kv_port in --kv-transfer-config: "abc"/],
    [{ kv_connector_extra_config: { proxy_ip: '10.0.0.1' } }, /proxy_port/],
    [{ kv_connector_extra_config: 7 }, /kv_connector_extra_config.*JSON object/],
    [{ kv_connector_extra_config: { send_type: 'POST' } }, /^send_type in .*one of PUT, PUT_ASYNC, GET/],
  ])('checks %j', (change, message) => {
    const act = () => config(vllm({ ...RUNBOOK, ...change }));
    if (message === undefined) expect(act).not.toThrow();
    else {
      expect(act).toThrow(
        expect.objectContaining({ code: 'CONFIG_INVALID', message: expect.stringMatching(message) }),
      );
    }
  });

  it('must be JSON, and needs a role', () => {
    expect(() => config(['--kv-transfer-config', '{'])).toThrow(/--kv-transfer-config is not JSON/);
    expect(() => config(vllm({ kv_port: 1 }))).toThrow(/kv_role/);
    expect(config(vllm({ kv_port: 1 }, '--role', 'consumer')).transfer.bind.port).toBe(1);
  });

  it('knows the switch that turns random suffixes off', () => {
    expect(config([], { VLLM_DISABLE_REQUEST_ID_RANDOMIZATION: '1' }).randomizeRequestIds).toBe(false);
    expect(config(['--no-randomize-request-ids']).randomizeRequestIds).toBe(false);
  });
});

describe('native environment', () => {
  const eth1 = [...lan, ...lan6];
  const kv = (host: string) => ({ bind: { host, port: 1 }, announceHost: host });

  it("follows the KV address, and never overrules the user's own", () => {
    expect(nativeEnvironment({ device: 'host', ...kv('10.0.0.7') }, { eth1 })).toEqual({});
    const env: Record<string, string> = { NCCL_CUMEM_ENABLE: '0' };
    prepareNativeEnvironment({ device: 'cuda:0', ...kv('2001:db8::7') }, env, { eth1 });
    expect(env).toEqual({
      NCCL_CUMEM_ENABLE: '0',
      CUDA_MODULE_LOADING: 'EAGER',
      NCCL_SOCKET_IFNAME: '=eth1',
      NCCL_SOCKET_FAMILY: 'AF_INET6',
    });
  });

  const loopback = (address_: string, family: 'IPv4' | 'IPv6') =>
    ({ ...address, address: address_, family, scopeid: 0, internal: true }) as const;
  const link = (scopeid: number) => ({ ...address, address: 'fe80::7', family: 'IPv6', scopeid }) as const;
  const interfaces = {
    lo: [loopback('127.0.0.1', 'IPv4'), loopback('::1', 'IPv6')],
    eth0: [{ ...address, address: '192.168.0.7', family: 'IPv4' as const }, link(2)],
    eth1: [...eth1, link(3)],
  };
  const V4 = 'AF_INET';
  const V6 = 'AF_INET6';

  it.each([
    ['an IPv4 address', '10.0.0.7', '10.0.0.7', '=eth1', V4],
    ['an IPv6 address', '2001:db8::7', '2001:db8::7', '=eth1', V6],
    ['an IPv6 address, written otherwise', '2001:DB8:0::7', '2001:db8::7', '=eth1', V6],
    ['a v4-mapped address', '::ffff:10.0.0.7', '10.0.0.7', '=eth1', V4],
    ['an address that others know under a translated one', '10.0.0.7', '203.0.113.1', '=eth1', V4],
    ['what is bound, where another address of this machine is told', '10.0.0.7', '192.168.0.7', '=eth1', V4],
    ['every interface, told as one of them', '0.0.0.0', '192.168.0.7', '=eth0', V4],
    ['every interface of both families, told as IPv6', '::', '2001:db8::7', '=eth1', V6],
    ['every interface of both families, told as IPv4', '::', '10.0.0.7', '=eth1', V4],
    ['every interface, told as a translated address', '::', '203.0.113.1', undefined, V4],
    ['every interface, told as a translated IPv6 address', '::', '2001:db8:ffff::1', undefined, V6],
    ['every IPv4 interface, told as an IPv6 address', '0.0.0.0', '2001:db8::7', undefined, V4],
    ['loopback', '127.0.0.1', '127.0.0.1', '=lo', V4],
    // NCCL never takes ::1: with AF_INET6 on lo every communicator fails.
    ['IPv6 loopback', '::1', '::1', '=lo', V4],
    ['IPv6 loopback, told by one that binds all', '::', '::1', '=lo', V4],
    ['an address with a zone id', 'fe80::7%eth1', 'fe80::7%eth1', '=eth1', V6],
    ['an address with the number of a zone', 'fe80::7%2', 'fe80::7%2', '=eth0', V6],
    ['a name, which says nothing', 'localhost', 'localhost', undefined, undefined],
  ])("NCCL's bootstrap for %s", (_, bound, announced, name, family) => {
    const config = { device: 'cuda:0', bind: { host: bound, port: 1 }, announceHost: announced };
    const { NCCL_SOCKET_IFNAME, NCCL_SOCKET_FAMILY } = nativeEnvironment(config, interfaces);
    expect([NCCL_SOCKET_IFNAME, NCCL_SOCKET_FAMILY]).toEqual([name, family]);
    // The transfer thread asks for itself, with the same answer.
    expect(ncclEnvironment(bound, announced, interfaces)).toMatchObject(
      Object.fromEntries(
        Object.entries({ NCCL_SOCKET_IFNAME, NCCL_SOCKET_FAMILY }).filter(([, value]) => value),
      ),
    );
  });

  it('leaves IPv6 loopback to NCCL on a machine whose loopback has no IPv4', () => {
    const only6 = { lo: [loopback('::1', 'IPv6')], eth1 };
    expect(ncclEnvironment('::1', '::1', only6)).toEqual({ NCCL_CUMEM_ENABLE: '1' });
  });
});
