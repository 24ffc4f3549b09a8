/** pd-doctor where instances take TLS alone. */
import { execFile } from 'node:child_process';
import { readFileSync } from 'node:fs';
import { createServer, type Server } from 'node:http';
import { createServer as createSecureServer } from 'node:https';
import type { AddressInfo } from 'node:net';
import { fileURLToPath } from 'node:url';
import { afterEach, expect, it } from 'vitest';
import type { DoctorReport } from '../../../src/doctor/finding.ts';
import { proxySection } from '../../../src/doctor/proxy-check.ts';
import { formatHostPort } from '../../../src/net/address.ts';
import { Authority } from '../../../support/certificates.ts';
import { answerJson, FakeUpstream } from '../../support/fake-upstream.ts';
import { startQuietProxy } from '../../support/quiet-proxy.ts';
import { sharedTempDir } from '../../support/temp-dir.ts';

const DOCTOR = fileURLToPath(new URL('../../../bin/pd-doctor', import.meta.url));
const authority = new Authority(sharedTempDir());
const closing: (() => unknown)[] = [];
afterEach(async () => {
  for (const close of closing.splice(0).reverse()) await close();
});

async function listening(server: Server): Promise<string> {
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  closing.push(() => server.close());
  return `127.0.0.1:${(server.address() as AddressInfo).port}`;
}

it('asks them by TLS, as the proxy lists them', async () => {
  const { cert, key } = authority.sign('worker');
  const worker = await listening(
    createSecureServer({ cert: readFileSync(cert), key: readFileSync(key) }, (_, out) => out.end('{}')),
  );
  const instances = ['producer', 'consumer'].map((role) => ({
    ...{ role, http_address: worker, zmq_address: '127.0.0.1:1', tls: true },
    ...{ model: 'm', fingerprint: 'a', models: ['m'] },
  }));
  const proxy = await listening(
    createServer((_, out) => out.end(JSON.stringify({ status: 'ok', instances }))),
  );
  const report = await new Promise<DoctorReport>((resolve) => {
    const env = { ...process.env, PD_HOST_IP: '127.0.0.1', NODE_EXTRA_CA_CERTS: authority.ca };
    const args = [DOCTOR, '--json', '--proxy', `http://${proxy}`];
    execFile(process.execPath, args, { env }, (_error, stdout) =>
      resolve(JSON.parse(stdout) as DoctorReport),
    );
  });
  const findings = report.sections.flatMap((section) => section.findings);
  for (const role of ['producer', 'consumer'])
    expect(findings).toContainEqual({ level: 'ok', what: `${role} ${worker} answers /health` });
});

it('goes on where they answer their proxy alone', async () => {
  const [tls, shown] = [authority.sign('worker'), authority.sign('proxy')];
  const proxy = await startQuietProxy({ upstream: { ...shown, ca: authority.ca } });
  closing.push(() => proxy.close(0));
  for (const role of ['producer', 'consumer'] as const) {
    const one = await FakeUpstream.start(role, answerJson(), { tls: { ...tls, ca: authority.ca } });
    closing.push(() => one.kill());
    await one.ping(proxy.discoveryAddress, 'd1', ['tls']);
  }
  await proxy.untilPaired();
  const { findings } = await proxySection(`http://${formatHostPort(proxy.httpAddress)}`, 60_000);
  const text = findings.map(({ level, what }) => `${level} ${what}`).join('\n');
  for (const role of ['producer', 'consumer'])
    expect(text).toMatch(new RegExp(`info ${role} \\S+ speaks TLS, and cannot be asked from here: `));
  expect(text).toContain('a completion by ');
});
