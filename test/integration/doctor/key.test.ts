/** The key of pd-doctor's user is for the proxy that he has named: anybody may announce an instance to that. */
import { createServer, type Server } from 'node:http';
import type { AddressInfo } from 'node:net';
import { afterEach, expect, it, vi } from 'vitest';
import { proxySection } from '../../../src/doctor/proxy-check.ts';

const KEY = 'sk-operator-0123456789abcdef';
const servers: Server[] = [];
afterEach(() => {
  vi.unstubAllEnvs();
  for (const server of servers.splice(0)) server.close();
});

/** What a server is shown, by path. */
async function recording(answer: (path: string) => object) {
  const shown: [path: string, authorization: string | undefined][] = [];
  const server = createServer((request, out) => {
    shown.push([request.url!, request.headers.authorization]);
    out.end(JSON.stringify(answer(request.url!)));
  });
  servers.push(server);
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  return { shown, address: `127.0.0.1:${(server.address() as AddressInfo).port}` };
}

it('is shown to the proxy, and to none that is only announced there', async () => {
  vi.stubEnv('PD_API_KEY', KEY);
  const stranger = await recording(() => ({}));
  const instance = (role: string) => ({
    role,
    http_address: stranger.address,
    zmq_address: '127.0.0.1:1',
    fingerprint: null,
    models: ['m'],
    age_seconds: 0,
  });
  const instances = [instance('producer'), instance('consumer')];
  const counts = { producer: 1, consumer: 1 };
  const proxy = await recording((path) =>
    path === '/health' ? { status: 'ok', counts, instances } : { data: [{ id: 'm' }] },
  );
  await proxySection(`http://${proxy.address}`, 60_000);
  expect(proxy.shown).toContainEqual(['/v1/completions', `Bearer ${KEY}`]);
  expect(stranger.shown.length).toBeGreaterThan(0);
  expect(stranger.shown.filter(([, authorization]) => authorization !== undefined)).toEqual([]);
});
