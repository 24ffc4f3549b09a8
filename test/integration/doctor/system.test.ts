/** `--peer` and `--proxy` against what they may meet: a running system, and the ways in which one is not. */
import { createServer as createHttpServer } from 'node:http';
import { type AddressInfo, createServer } from 'node:net';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { Router } from 'zeromq';
import { DEFAULT_LIMITS } from '../../../src/config/transfer-options.ts';
import { peerSection } from '../../../src/doctor/peer.ts';
import { proxySection } from '../../../src/doctor/proxy-check.ts';
import { parseHostPort } from '../../../src/net/address.ts';
import { AllowList } from '../../../src/net/allow-list.ts';
import { ZapGate } from '../../../src/net/zap.ts';
import { createLogger } from '../../../src/observability/log.ts';
import { decodeMessage, encodeAnswer } from '../../../src/wire/codec.ts';
import {
  type ProxyHandle,
  startProxy,
  startWorker,
  untilListed,
  type WorkerHandle,
} from '../../support/cluster.ts';
import { keptPort } from '../../support/transfer.ts';

const TIMEOUT_MS = 60_000;
/** To pass, but not before a connection and a greeting have been made. */
const GREETED_MS = 1_500;
const levels = (section: { findings: readonly { level: string }[] }) =>
  section.findings.map(({ level }) => level);
const peer = (address: string, announced?: string, timeoutMs = TIMEOUT_MS) =>
  peerSection({ peer: parseHostPort(address), timeoutMs, ...(announced === undefined ? {} : { announced }) });

/** Where nobody listens. */
async function closedAddress(): Promise<string> {
  return `127.0.0.1:${await keptPort()}`;
}

describe('a running system', () => {
  let proxy: ProxyHandle;
  let workers: WorkerHandle[];
  beforeAll(async () => {
    proxy = await startProxy();
    workers = await Promise.all([startWorker('producer', proxy), startWorker('consumer', proxy)]);
    await untilListed(proxy, 1, 1);
  });
  afterAll(async () => {
    await Promise.all([...workers, proxy].map(({ program }) => program.stop()));
  });

  test('passes the checklist, KV included', async () => {
    const section = await proxySection(proxy.url, TIMEOUT_MS);
    expect(section.findings.filter(({ level }) => level === 'fail' || level === 'warn')).toEqual([]);
    const text = section.findings.map(({ what }) => what).join('\n');
    expect(text).toMatch(/fingerprints match/);
    expect(text).toContain(
      `it went to producer ${workers[0]!.kvAddress}, then consumer ${workers[1]!.kvAddress}`,
    );
    expect(text).toMatch(/its KV moved: [\d,]{4,} bytes/);
  });

  test('passes it where the proxy gave the completion to its consumer alone', async () => {
    const named = workers.map(({ url }) => new URL(url).host);
    const other = await startProxy(['--bypass-tokens', '100', '--instances', ...named]);
    try {
      await untilListed(other, 1, 1);
      const { findings } = await proxySection(other.url, TIMEOUT_MS);
      expect(findings.filter(({ level }) => level === 'fail' || level === 'warn')).toEqual([]);
      expect(findings.at(-1)?.what).toContain(`consumer ${named[1]} computed it alone (--bypass-tokens`);
    } finally {
      await other.program.stop();
    }
  });

  test('its listeners answer, and its log says nothing of it', async () => {
    const { findings } = await peer(workers[0]!.kvAddress);
    expect(findings[1]).toEqual({ level: 'ok', what: 'its KV listener answers; it is a pd-worker' });
    expect(workers[0]!.program.lines.filter(({ msg }) => msg.includes('pd-doctor'))).toEqual([]);
  });

  test('a worker is told from a proxy', async () => {
    const { findings } = await proxySection(workers[0]!.url, TIMEOUT_MS);
    expect(findings).toMatchObject([{ level: 'fail', fix: expect.stringContaining("proxy's HTTP port") }]);
    const [finding] = (await peer(new URL(proxy.url).host)).findings;
    expect(finding).toMatchObject({ level: 'fail', fix: expect.stringContaining('this is an HTTP port') });
  });
});

describe('a system that is not whole', () => {
  const servers: { close(): unknown }[] = [];
  afterAll(() => {
    for (const server of servers) server.close();
  });
  async function http(answer: (url: string) => unknown): Promise<string> {
    const server = createHttpServer((request, response) => {
      const body = answer(request.url ?? '');
      response.writeHead(body === undefined ? 404 : 200, { 'content-type': 'application/json' });
      response.end(JSON.stringify(body ?? {}));
    });
    servers.push(server);
    await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
    return `127.0.0.1:${(server.address() as AddressInfo).port}`;
  }
  const instance = (role: string, address: string, fingerprint: string) => ({
    role,
    http_address: address,
    zmq_address: '127.0.0.1:1',
    model: 'demo',
    fingerprint,
  });

  test('a role without an instance, an instance that does not answer', async () => {
    const gone = await closedAddress();
    const proxy = await http(() => ({ status: 'ok', instances: [instance('producer', gone, 'a')] }));
    const { findings } = await proxySection(`http://${proxy}`, TIMEOUT_MS);
    const failed = findings.filter(({ level }) => level === 'fail');
    expect(failed).toMatchObject([
      { what: 'no consumer is listed', fix: expect.stringContaining('--role consumer --proxy') },
      { what: expect.stringMatching(/does not answer \/health from here: connect ECONNREFUSED/) },
    ]);
  });

  test('two models', async () => {
    const worker = await http((url) => (url === '/health' ? { status: 'ok' } : undefined));
    const instances = [instance('producer', worker, 'aaaa'), instance('consumer', worker, 'bbbb')];
    const proxy = await http(() => ({ status: 'ok', instances }));
    const { findings } = await proxySection(`http://${proxy}`, TIMEOUT_MS);
    expect(findings.find(({ level }) => level === 'fail')?.what).toMatch(
      /no producer matches a consumer.*aaaa.*bbbb/,
    );
  });

  test('no proxy, or one of another kind', async () => {
    const other = await http(() => undefined);
    const gone = await closedAddress();
    const [none, alien] = await Promise.all([
      proxySection(`http://${gone}`, TIMEOUT_MS),
      proxySection(`http://${other}`, TIMEOUT_MS),
    ]);
    expect(none.findings[0]?.what).toContain('ECONNREFUSED');
    expect(alien.findings[0]).toMatchObject({ level: 'fail', what: expect.stringContaining('answers 404') });
  });
});

describe('a peer', () => {
  test('where nothing listens', async () => {
    const section = await peer(await closedAddress());
    expect(levels(section)).toEqual(['fail']);
    expect(section.findings[0]?.what).toContain('nothing listens');
  });

  test('of vLLM, one that never answers, and one that answers nonsense', async () => {
    const routers = await Promise.all(
      (['vllm', 'silent', 'nonsense'] as const).map(async (kind) => {
        const router = new Router({ linger: 0 });
        await router.bind('tcp://127.0.0.1:*');
        const asked: unknown[] = [];
        void (async () => {
          for await (const [id, body] of router) {
            asked.push(decodeMessage(body!, DEFAULT_LIMITS));
            if (kind === 'vllm') await router.send([id!, encodeAnswer({ kind: 'get', ret: 1 })]);
            if (kind === 'nonsense') await router.send([id!, 'hello?']);
          }
        })();
        return { router, asked, address: router.lastEndpoint!.replace('tcp://', '') };
      }),
    );
    const [vllm, silent, nonsense] = routers;
    const sections = await Promise.all([
      peer(vllm!.address),
      peer(silent!.address, undefined, GREETED_MS),
      peer(nonsense!.address),
    ]);
    for (const { router } of routers) router.close();
    expect(sections.map(({ findings }) => findings[1])).toMatchObject([
      { level: 'ok', what: expect.stringContaining('not a pd-worker (vLLM?)') },
      { level: 'fail', fix: expect.stringContaining('discovery port') },
      { level: 'fail', what: expect.stringContaining('is not of the protocol') },
    ]);
    // one GET for nothing, and not a NEW or PUT, which would change something there
    expect(vllm!.asked).toEqual([{ cmd: 'GET', tensor_id: 'pd-doctor#probe' }]);
  });

  test('one whose allow list leaves this machine out, on IPv6 too', async () => {
    const gate = await ZapGate.open({
      allow: AllowList.parse(['192.0.2.77']),
      what: 'test',
      log: createLogger({ level: 'silent', format: 'json' }, 'test'),
    });
    const router = new Router({ linger: 0, ipv6: true, ...gate.socketOptions });
    await router.bind('tcp://[::1]:*');
    const { findings } = await peer(router.lastEndpoint!.replace('tcp://', ''), undefined, GREETED_MS);
    router.close();
    await gate.close();
    expect(gate.refused).toBeGreaterThan(0);
    expect(findings[1]).toMatchObject({ level: 'fail', fix: expect.stringContaining('--allow-peers') });
  });

  test('the way back is tried at the address that would be told', async () => {
    const server = createServer((socket) => socket.destroy());
    await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
    const address = `127.0.0.1:${(server.address() as AddressInfo).port}`;
    const { findings } = await peer(address, '127.0.0.1');
    server.close();
    expect(findings.find(({ what }) => what.startsWith('the way back'))).toMatchObject({ level: 'ok' });
  });
});
