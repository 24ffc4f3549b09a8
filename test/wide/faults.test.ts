import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { inParallel } from '../../bench/measure/parallel.ts';
import {
  keptPorts,
  metricsOf,
  type ProxyHandle,
  startProxy,
  startWorker,
  untilListed,
  type WorkerHandle,
} from '../support/cluster.ts';
import { type Completion, complete, eventually, mixedRequests } from '../support/requests.ts';

// KV whose request died with the proxy or the client is nobody's: it goes at the orphan deadline.
const ARGS = ['--kv-load-timeout', '5s', '--kv-orphan-timeout', '5s'];
/** No answer may take longer than this: load deadline, answer deadline and one computed prompt, with room. */
const CLIENT_DEADLINE_MS = 120_000;

const portOf = (address: string) => address.slice(address.lastIndexOf(':') + 1);

describe('kill -9 under load', () => {
  let proxy: ProxyHandle;
  let producers: WorkerHandle[];
  let consumers: WorkerHandle[];
  let expected: Map<string, string>;
  const requests = mixedRequests(96, 11);

  beforeAll(async () => {
    const undivided = await startWorker('both', undefined);
    const texts = await inParallel(requests, 8, (request) => complete(undivided.url, request));
    expected = new Map(requests.map((request, i) => [request.prompt, texts[i]!.text]));
    await undivided.program.stop();
    const ports = (await keptPorts(10)).map(String);
    const two = () => ports.splice(0, 2) as [string, string];
    const [port, discovery] = two();
    proxy = await startProxy(['--port', port, '--discovery-port', discovery]);
    const start = (role: 'producer' | 'consumer') => {
      const [http, kv] = two();
      return startWorker(role, proxy, [...ARGS, '--port', http, '--kv-port', kv]);
    };
    producers = await Promise.all([start('producer'), start('producer')]);
    consumers = await Promise.all([start('consumer'), start('consumer')]);
    await untilListed(proxy, 2, 2);
  });

  afterAll(async () => {
    const programs = [proxy, ...(producers ?? []), ...(consumers ?? [])].map((handle) => handle?.program);
    await Promise.all(programs.map((program) => program?.stop('SIGKILL')));
  });

  /** Runs the mix, calls `kill` once a third has been answered, and returns every answer or the transport's error. */
  async function runWithKill(kill: () => void): Promise<(Completion | { broken: string })[]> {
    let answered = 0;
    return await inParallel(requests, 8, async (request) => {
      try {
        return await complete(proxy.url, request, CLIENT_DEADLINE_MS);
      } catch (error) {
        return { broken: String(error) };
      } finally {
        if (++answered === Math.floor(requests.length / 3)) kill();
      }
    });
  }

  /** Each answer is right, or says clearly that it is not; those that never met `victim` are right. */
  function judge(answers: readonly (Completion | { broken: string })[], victim: string): void {
    let right = 0;
    for (const [i, answer] of answers.entries()) {
      if ('broken' in answer) throw new Error(`request ${i} ended without an answer: ${answer.broken}`);
      if (answer.error || answer.status >= 400) {
        expect(answer.error?.message, 'an error has a message').toBeTruthy();
        expect(`${answer.id} ${answer.error?.message}`, 'only requests of the dead instance fail').toContain(
          victim,
        );
      } else {
        expect(answer.text).toBe(expected.get(requests[i]!.prompt));
        right++;
      }
    }
    expect(right).toBeGreaterThan(answers.length / 3);
  }

  async function allRight(): Promise<void> {
    const answers = await inParallel(requests.slice(0, 32), 8, (request) => complete(proxy.url, request));
    expect(answers.map((answer) => answer.error ?? answer.text)).toEqual(
      requests.slice(0, 32).map((request) => expected.get(request.prompt)),
    );
    const all = [...producers, ...consumers];
    await eventually('accounting is back to zero everywhere', 60_000, async () => {
      const pages = await Promise.all(all.map(metricsOf));
      return pages.every((page) =>
        ['pd_kv_buffer_used_bytes', 'pd_kv_pool_used_bytes', 'pd_kv_blocks_used'].every(
          (n) => page.get(n) === 0,
        ),
      );
    });
  }

  /** The same instance again: same ports, so that the address in ids stays true. */
  async function restart(worker: WorkerHandle): Promise<WorkerHandle> {
    const ports = ['--port', new URL(worker.url).port, '--kv-port', portOf(worker.kvAddress)];
    return await startWorker(worker.role, proxy, [...ARGS, ...ports]);
  }

  test('of a producer', async () => {
    const victim = producers[0]!;
    judge(await runWithKill(() => void victim.program.stop('SIGKILL')), victim.kvAddress);
    producers[0] = await restart(victim);
    await untilListed(proxy, 2, 2);
    await allRight();
  });

  test('of a consumer', async () => {
    const victim = consumers[0]!;
    judge(await runWithKill(() => void victim.program.stop('SIGKILL')), victim.kvAddress);
    consumers[0] = await restart(victim);
    await untilListed(proxy, 2, 2);
    await allRight();
  });

  test('of the proxy: workers go on and find the next one', async () => {
    const port = new URL(proxy.url).port;
    const discovery = portOf(proxy.discovery);
    let killed: Promise<unknown> = Promise.resolve();
    const answers = await runWithKill(() => {
      killed = proxy.program.stop('SIGKILL');
    });
    await killed;
    // Clients of a dead proxy see a broken connection; what was answered before is right.
    for (const [i, answer] of answers.entries()) {
      if (!('broken' in answer) && answer.status === 200 && answer.finishReason) {
        expect(answer.text).toBe(expected.get(requests[i]!.prompt));
      }
    }
    proxy = await startProxy(['--port', port, '--discovery-port', discovery]);
    await untilListed(proxy, 2, 2);
    await allRight();
  });
});
