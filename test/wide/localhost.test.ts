/**
 * A machine whose only IPv4 address is 127.0.0.1, without a name server: HTTP on 127.0.0.1, ZeroMQ and KV on its IPv6 address, and our
 * tools told `localhost`, whatever /etc/hosts makes of that name.
 */
import { execFile } from 'node:child_process';
import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import { afterEach, describe, expect, test } from 'vitest';
import { startProxy, startWorker } from '../support/cluster.ts';
import { failed, pdDoctor } from '../support/doctor.ts';
import { NETNS_IPV6, NetworkNamespace, netnsUnavailable } from '../support/netns.ts';
import { tempDir } from '../support/temp-dir.ts';

const unavailable = netnsUnavailable();
if (unavailable) console.warn(`localhost: skipped: ${unavailable}`);

const bench = fileURLToPath(new URL('../../bin/pd-bench', import.meta.url));

const undo: (() => Promise<unknown>)[] = [];
afterEach(async () => {
  for (const step of undo.splice(0).reverse()) await step();
});

interface Served {
  readonly prefix: readonly string[];
  readonly proxy: string;
  readonly producer: string;
  readonly kv: string;
}

/** A pair behind a proxy, every URL with `localhost` in place of the address that is bound. */
async function serve(hosts: string, pingedAt: string): Promise<Served> {
  const file = join(await tempDir(), 'hosts');
  writeFileSync(file, hosts);
  const network = await NetworkNamespace.create('loopback4', file);
  undo.push(() => network.close());
  const { prefix } = network;
  const proxy = await startProxy(['--discovery-host', pingedAt], prefix);
  undo.push(() => proxy.program.stop());
  const discovery = pingedAt === '::1' ? proxy.discovery.replace('[::1]', 'localhost') : proxy.discovery;
  const kv = ['--kv-host', NETNS_IPV6, '--proxy', discovery];
  const common = ['--num-blocks', '64', '--debug-state', '--kv-load-failure', 'fail', ...kv];
  const workers = await Promise.all(
    (['producer', 'consumer'] as const).map((role) => startWorker(role, undefined, common, prefix)),
  );
  undo.push(() => Promise.all(workers.map(({ program }) => program.stop())));
  await proxy.program.line(/🔵Add/);
  const first = proxy.program.lines.findIndex(({ msg }) => msg.includes('🔵Add'));
  await proxy.program.line(/🔵Add/, 60_000, first + 1);
  const byName = (url: string) => url.replace(/^http:\/\/(\[.*\]|[^:]*):/, 'http://localhost:');
  const [producer] = workers;
  return { prefix, proxy: byName(proxy.url), producer: byName(producer!.url), kv: producer!.kvAddress };
}

describe.skipIf(unavailable !== undefined)('localhost, where IPv4 is 127.0.0.1 alone', () => {
  test.each([
    ['is 127.0.0.1, and pings go to the IPv6 address', '127.0.0.1 localhost\n', NETNS_IPV6],
    ['is ::1, and pings go to it too', '::1 localhost\n', '::1'],
  ])('%s', async (_, hosts, pingedAt) => {
    const { prefix, proxy, producer, kv } = await serve(hosts, pingedAt);
    const [system, worker, peer] = await Promise.all([
      pdDoctor('System', ['--proxy', proxy], prefix),
      pdDoctor('Worker', ['--worker', producer], prefix),
      pdDoctor('Peer', ['--peer', kv], prefix),
    ]);
    expect([system, worker, peer].map(failed)).toEqual([[], [], []]);
    expect(kv).toMatch(`[${NETNS_IPV6}]:`);
    const said = [...system.findings, ...peer.findings].map(({ what }) => what).join('\n');
    // The completion that --proxy tries.
    expect(said).toContain(`it went to producer ${kv}, then consumer [${NETNS_IPV6}]:`);
    expect(said).toMatch(/its KV moved: [\d,]{4,} bytes/);
    expect(said).toContain('its KV listener answers; it is a pd-worker');
    const load = ['--num-requests', '2', '--warm-up', '0', '--prompt-tokens', '16', '--output-tokens', '4'];
    const [command, ...rest] = [
      ...prefix,
      process.execPath,
      bench,
      'serve',
      '--url',
      proxy,
      '--json',
      ...load,
    ];
    const { stdout } = await promisify(execFile)(command!, [...rest, '--tokenize-url', producer]);
    expect(JSON.parse(stdout)).toMatchObject({ summary: { requests: { done: 2, failed: 0 } } });
  });
});
