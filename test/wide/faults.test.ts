import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { inParallel } from '../../bench/measure/parallel.ts';
import { demoModelDir } from '../../src/config/demo-model.ts';
import {
  keptPorts,
  metricsOf,
  type ProxyHandle,
  startProxy,
  startWorker,
  untilListed,
  type WorkerHandle,
} from '../support/cluster.ts';
import {
  type Completion,
  type CompletionRequest,
  complete,
  eventually,
  mixedRequests,
} from '../support/requests.ts';

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

describe('kill -9 under load, with three producers, three consumers and two proxies', () => {
  const requests = mixedRequests(120, 23);
  let proxies: ProxyHandle[];
  let producers: WorkerHandle[];
  let consumers: WorkerHandle[];
  let expected: Map<string, string>;

  beforeAll(async () => {
    const undivided = await startWorker('both', undefined);
    const texts = await inParallel(requests, 8, (request) => complete(undivided.url, request));
    expected = new Map(requests.map((request, i) => [request.prompt, texts[i]!.text]));
    await undivided.program.stop();
    const policy = ['--policy', 'kv-aware', '--tokenizer', demoModelDir()];
    proxies = await Promise.all([startProxy(policy), startProxy(policy)]);
    const own = [...ARGS, '--kv-events-port', '0', '--prompt-ids-from', '127.0.0.1'];
    const [first, second] = proxies;
    const start = (role: 'producer' | 'consumer') =>
      startWorker(role, first, ['--proxy', second!.discovery, ...own]);
    producers = await Promise.all([1, 2, 3].map(() => start('producer')));
    consumers = await Promise.all([1, 2, 3].map(() => start('consumer')));
    for (const proxy of proxies) await untilListed(proxy, 3, 3);
  });

  afterAll(async () => {
    const all = [...(proxies ?? []), ...(producers ?? []), ...(consumers ?? [])];
    await Promise.all(all.map(({ program }) => program.stop('SIGKILL')));
  });

  interface Seen {
    /** Events that had come when it ended. */
    readonly events: number;
    /** Its connection broke, or never was. */
    readonly broken: boolean;
    readonly text: string;
    readonly error?: string;
  }

  /** As a client that asks another proxy where its own is gone before it has said anything. */
  async function ask(at: number): Promise<Seen> {
    const first = await askOne(proxies[at % 2]!.url, requests[at]!);
    return first.broken && first.events === 0
      ? await askOne(proxies[(at + 1) % 2]!.url, requests[at]!)
      : first;
  }

  async function askOne(url: string, request: CompletionRequest): Promise<Seen> {
    let raw = '';
    let broken = false;
    try {
      const response = await fetch(`${url}/v1/completions`, {
        method: 'POST',
        headers: { 'content-type': 'application/json' },
        body: JSON.stringify({ ...request, model: 'demo', stream: true }),
        signal: AbortSignal.timeout(CLIENT_DEADLINE_MS),
      });
      for await (const chunk of response.body!) raw += Buffer.from(chunk).toString();
      if (!response.ok) return { events: 0, broken, text: '', error: raw };
    } catch (error) {
      broken = !raw.endsWith('data: [DONE]\n\n');
      if ((error as Error).name === 'TimeoutError') throw error;
    }
    const events = raw.split('\n\n').filter((event) => event.startsWith('data: {'));
    const said = events.map((event) => JSON.parse(event.slice(6)) as StreamedEvent);
    const failed = said.find(({ error }) => error !== undefined);
    const text = said.flatMap(({ choices }) => choices ?? []).map((choice) => choice.text);
    return {
      events: text.length,
      broken,
      text: text.join(''),
      ...(failed && { error: failed.error!.message }),
    };
  }

  async function withKill(kill: () => void): Promise<Seen[]> {
    let answered = 0;
    return await inParallel([...requests.keys()], 12, async (at) => {
      const seen = await ask(at);
      if (++answered === Math.floor(requests.length / 3)) kill();
      return seen;
    });
  }

  /** Right, or ended with an error event after some text; never an error where the client had nothing. */
  function judge(all: readonly Seen[], mayBreak: boolean): void {
    let right = 0;
    for (const [at, { events, broken, text, error }] of all.entries()) {
      const whole = expected.get(requests[at]!.prompt)!;
      if (broken) {
        expect(mayBreak, `request ${at} broke off without an error event`).toBe(true);
        expect(events).toBeGreaterThan(0);
      }
      if (error !== undefined)
        expect(events, `request ${at} failed before it began: ${error}`).toBeGreaterThan(0);
      if (broken || error !== undefined) {
        expect(whole.startsWith(text)).toBe(true);
      } else {
        expect(text).toBe(whole);
        right++;
      }
    }
    expect(right).toBeGreaterThan((all.length * 3) / 4);
  }

  test('of a producer: every request is answered', async () => {
    judge(await withKill(() => void producers[0]!.program.stop('SIGKILL')), false);
  });

  test('of a consumer: those that had nothing of its answers go to others, the rest end with an error event', async () => {
    judge(await withKill(() => void consumers[0]!.program.stop('SIGKILL')), false);
  });

  test('of a proxy: those that had nothing of it are answered by the other, which nothing happens to', async () => {
    const all = await withKill(() => void proxies[0]!.program.stop('SIGKILL'));
    judge(all, true);
    for (const [at, { broken, error }] of all.entries()) {
      if (at % 2 === 1) expect([broken, error]).toEqual([false, undefined]);
    }
  });
});

interface StreamedEvent {
  readonly choices?: readonly { readonly text: string }[];
  readonly error?: { readonly message: string };
}
