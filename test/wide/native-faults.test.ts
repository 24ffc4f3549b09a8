/** By direct, on stand-in GPUs: a producer that stands still, dies, cannot map or hears another by our name costs its consumer time, never a wrong byte or a block. */
import { randomBytes } from 'node:crypto';
import { afterAll, beforeAll, expect, test } from 'vitest';
import { parseHostPort } from '../../src/net/address.ts';
import { encodeNative } from '../../src/transfer/native/codec.ts';
import { identityOf } from '../../src/transfer/native/hello.ts';
import { type HelloMessage, type Nonce, PROBE_ONLY } from '../../src/transfer/native/messages.ts';
import { proxyRequestId } from '../../src/wire/ids.ts';
import type { CoreState } from '../../src/worker/core-messages.ts';
import { standInEnvironment } from '../stand-ins/build.ts';
import { metricsOf, startWorker, type WorkerHandle } from '../support/cluster.ts';
import { RawPeer } from '../support/raw-peer.ts';
import { eventually } from '../support/requests.ts';

const NATIVE = ['--executor', 'host', '--kv-buffer-size', '64e6', '--wire', 'native', '--debug-state'];
const ARGS = [...NATIVE, '--transport', 'direct'];
const PROBE: HelloMessage = {
  cmd: 'HELLO',
  from: 'f'.repeat(32) as Nonce,
  hello: { version: 1, features: ['native'], sendType: 'PUT_ASYNC' },
  cache: { blocks: 1, blockSize: 16, layers: 1, blockBytes: 16, family: 'kv-first' },
  transports: ['direct'],
  probe: PROBE_ONLY,
};
const PROMPT = 'Once upon a time in a magical forest, there lived a wise old dragon who';

let producer: WorkerHandle;
let consumer: WorkerHandle;
let undivided: WorkerHandle;
const expected = new Map<string, string>();
beforeAll(async () => {
  Object.assign(process.env, standInEnvironment());
  [producer, consumer, undivided] = await Promise.all([
    startWorker('producer', undefined, [...ARGS, '--device', 'cuda:0']),
    startWorker('consumer', undefined, [...ARGS, '--device', 'cuda:1', '--kv-load-timeout', '5s']),
    startWorker('both', undefined),
  ]);
  for (const name of ['second', 'third', 'fourth', 'fifth', 'sixth', 'seventh', 'eighth'])
    expected.set(name, await ask(undivided, newId(), name));
});
afterAll(async () => {
  await Promise.all([producer, consumer, undivided].map((worker) => worker?.program.stop('SIGKILL')));
});

const newId = (from = producer, to = consumer) => {
  const [prefill, decode] = [from, to].map(({ kvAddress }) => parseHostPort(kvAddress));
  return proxyRequestId(prefill!, decode!, randomBytes(16).toString('hex'));
};
/** `before`: makes the prompt another from its first block on. */
async function ask({ url }: WorkerHandle, id: string, before: string, max_tokens = 6): Promise<string> {
  const response = await fetch(`${url}/v1/completions`, {
    method: 'POST',
    headers: { 'content-type': 'application/json', 'x-request-id': id },
    body: JSON.stringify({ model: 'demo', prompt: `${before}: ${PROMPT}`, max_tokens, temperature: 0 }),
  });
  const { choices } = (await response.json()) as { choices: { text: string }[] };
  return choices[0]!.text;
}
const metric = async (worker: WorkerHandle, name: string) =>
  (await metricsOf(worker)).get(name) ?? Number.NaN;
async function handOverOf({ url }: WorkerHandle): Promise<NonNullable<CoreState['handOver']>> {
  const { core } = (await (await fetch(`${url}/debug/state`)).json()) as { core: CoreState };
  return core.handOver!;
}
/** The consumer is asked, and its producer never is: the WANT is heard there, and waits. */
async function wanting(before: string): Promise<{ readonly answer: Promise<string> }> {
  const answer = ask(consumer, newId(), before);
  await eventually(
    'the WANT to be heard',
    60_000,
    async () => (await handOverOf(producer)).grants.unbound > 0,
  );
  return { answer };
}
/** A further producer, with settings of the stand-ins of its own. */
async function startWith(env: Record<string, string>, args: readonly string[]): Promise<WorkerHandle> {
  Object.assign(process.env, env);
  try {
    return await startWorker('producer', undefined, [...args, '--device', 'cuda:0']);
  } finally {
    for (const name of Object.keys(env)) delete process.env[name];
  }
}
const free = async (worker = consumer) => {
  const [quarantined, used] = await Promise.all([
    metric(worker, 'pd_native_quarantined_blocks'),
    metric(worker, 'pd_kv_blocks_used'),
  ]);
  return quarantined === 0 && used === 0;
};
const silences = (result: string) => `pd_native_silences_total{result="${result}"}`;
const LOADED = 'pd_kv_loads_total{result="ok"}';
/** A request whose KV comes from the one and is loaded by the other. */
async function loads(from: WorkerHandle, to: WorkerHandle, before: string): Promise<void> {
  const id = newId(from, to);
  const loaded = await metric(to, LOADED);
  await ask(from, id, before, 1);
  expect(await ask(to, id, before)).toBe(expected.get(before));
  expect(await metric(to, LOADED)).toBe(loaded + 1);
}

test('a producer that is stopped is given up; what it may still write to is nobody’s until it goes on', async () => {
  const id = newId();
  await ask(producer, id, 'first', 1);
  await ask(consumer, id, 'first');
  expect(await metric(consumer, 'pd_native_connections{transport="direct"}')).toBe(1);
  // when it has nothing else to do
  await eventually('the path to be measured', 60_000, async () => {
    return (await metric(producer, 'pd_native_path_bytes_per_second')) > 0;
  });
  expect((await handOverOf(producer)).mappings).toEqual([
    {
      peer: consumer.kvAddress,
      cache: 'theirs',
      bytes: expect.any(Number),
      path: expect.objectContaining({ state: 'measured', latencySeconds: expect.any(Number) }),
    },
  ]);
  expect((await handOverOf(consumer)).mappings).toMatchObject([{ peer: producer.kvAddress, cache: 'ours' }]);
  const { answer } = await wanting('second');
  producer.program.child.kill('SIGSTOP');
  expect(await answer).toBe(expected.get('second'));
  expect(await metric(consumer, 'pd_native_quarantined_blocks')).toBeGreaterThan(0);
  await eventually('it to be found to answer nobody', 60_000, async () => {
    return (await metric(consumer, silences('nobody'))) > 0;
  });
  producer.program.child.kill('SIGCONT');
  await eventually('the end of the quarantine', 60_000, async () => {
    return (await metric(consumer, 'pd_native_quarantined_blocks')) === 0;
  });
  expect(await metric(consumer, 'pd_kv_blocks_used')).toBe(0);
  // on the connection that it had
  expect(await metric(consumer, silences('renewed'))).toBe(0);
  expect(await metric(consumer, 'pd_native_connections{transport="direct"}')).toBe(1);
  await loads(producer, consumer, 'sixth');
});

test('a producer that is killed is known to be dead, and its blocks are free', async () => {
  const { answer } = await wanting('third');
  await producer.program.stop('SIGKILL');
  expect(await answer).toBe(expected.get('third'));
  await eventually('no block in use', 60_000, free);
});

test('a producer that is stopped in the middle of its writes changes nothing that is another’s by then', async () => {
  // a launch starts up to 2 s after its call
  const slow = await startWith({ PD_STANDIN_WRITE_US: '2000000' }, ARGS);
  try {
    const id = newId(slow);
    await ask(slow, id, 'fourth', 1);
    const answer = ask(consumer, id, 'fourth');
    await eventually(
      'a write to be under way',
      60_000,
      async () => (await handOverOf(slow)).grants.launches > 0,
    );
    slow.program.child.kill('SIGSTOP');
    expect(await answer).toBe(expected.get('fourth'));
    expect(await ask(consumer, newId(), 'second')).toBe(expected.get('second'));
    slow.program.child.kill('SIGCONT');
    await eventually('no block in use', 60_000, free);
    expect(await ask(consumer, newId(), 'third')).toBe(expected.get('third'));
  } finally {
    await slow.program.stop('SIGKILL');
  }
});

test('a cache that cannot be mapped is filled by nccl, and the gauge and pd-doctor’s source say why', async () => {
  const other = await startWorker('consumer', undefined, [...NATIVE, '--device', 'cuda:1']);
  const unable = await startWith({ PD_STANDIN_FAULTS: 'cuMemImportFromShareableHandle=1' }, NATIVE);
  try {
    const id = newId(unable, other);
    await ask(unable, id, 'fifth', 1);
    expect(await ask(other, id, 'fifth')).toBe(expected.get('fifth'));
    expect(await metric(other, 'pd_kv_loads_total{result="ok"}')).toBe(1);
    expect(await metric(other, 'pd_native_connections{transport="nccl"}')).toBe(1);
    expect(await metric(other, 'pd_native_fallbacks{reason="refused"}')).toBe(1);
    expect((await handOverOf(other)).producers).toMatchObject([
      {
        transport: 'nccl',
        fallback: { reason: 'refused', why: expect.stringContaining('cannot be mapped') },
      },
    ]);
  } finally {
    await Promise.all([other, unable].map(({ program }) => program.stop('SIGKILL')));
  }
});

test('a consumer whose name another takes at its producer loads KV again, and nothing is left', async () => {
  const [from, to] = await Promise.all([
    startWorker('producer', undefined, [...ARGS, '--device', 'cuda:0']),
    startWorker('consumer', undefined, [...ARGS, '--device', 'cuda:1', '--kv-load-timeout', '30s']),
  ]);
  let thief: RawPeer | undefined;
  try {
    await loads(from, to, 'sixth');
    expect((await handOverOf(to)).producers).toMatchObject([{ transport: 'direct' }]);
    // a hello without effect, answered under that name; the consumer's own connection stays open
    thief = new RawPeer(parseHostPort(from.kvAddress), identityOf(to.kvAddress));
    await thief.say(encodeNative(PROBE, { maxBlocks: 1 }));
    await eventually('the answer to another', 60_000, async () => thief!.answers.length > 0);
    await loads(from, to, 'seventh');
    expect(await metric(to, silences('renewed'))).toBe(1);
    await loads(from, to, 'eighth');
    expect(await metric(to, silences('renewed'))).toBe(1);
    await eventually('no block in use', 60_000, async () => (await free(to)) && (await free(from)));
    expect((await handOverOf(to)).wants).toMatchObject({ waiting: 0, givenUp: 0, ended: 0, quarantined: 0 });
  } finally {
    await Promise.all([thief?.dispose(), ...[from, to].map(({ program }) => program.stop('SIGKILL'))]);
  }
});
