/** What readers of the runbook grep for, word for word, in the logs of real processes; and what a debug log lets them follow of the frozen wire. */
import { afterAll, beforeAll, expect, it } from 'vitest';
import {
  keptPorts,
  type ProxyHandle,
  startProxy,
  startWorker,
  untilListed,
  type WorkerHandle,
} from '../support/cluster.ts';
import type { LogLine } from '../support/process.ts';

let proxy: ProxyHandle;
let producer: WorkerHandle;
let consumer: WorkerHandle;
const ports = { producer: 0, consumer: 0 };
let requestId = '';

beforeAll(async () => {
  proxy = await startProxy();
  // The line under test tells the port that was asked for.
  [ports.producer, ports.consumer] = (await keptPorts(2)) as [number, number];
  const args = [
    '--kv-load-failure',
    'fail',
    '--nccl-num-channels',
    '16',
    '--log-level',
    'debug',
    '--wire',
    'frozen',
    '--port',
  ];
  [producer, consumer] = await Promise.all([
    startWorker('producer', proxy, [...args, String(ports.producer)]),
    startWorker('consumer', proxy, [...args, String(ports.consumer)]),
  ]);
  await untilListed(proxy, 1, 1);
  const response = await fetch(`${proxy.url}/v1/completions`, {
    method: 'POST',
    headers: { 'content-type': 'application/json' },
    body: JSON.stringify({ prompt: 'Hello world', max_tokens: 3, temperature: 0 }),
  });
  expect(response.status).toBe(200);
  const { id } = (await response.json()) as { id: string };
  requestId = id.replace('cmpl-', '');
  for (const { program } of [producer, consumer]) await program.line(/request done/);
});

afterAll(async () => {
  for (const worker of [consumer, producer]) {
    expect(await worker?.program.stop()).toBe(0);
    // What was computed since the last line of throughput is told at the end.
    expect(worker?.program.lines.map(({ msg }) => msg)).toContainEqual(
      expect.stringMatching(
        /^in \d+\.\d s: prompt throughput .* tokens\/s, generation throughput .* tokens\/s; running 0, /,
      ),
    );
  }
  expect(await proxy?.program.stop()).toBe(0);
});

it('the engine says what it is', () => {
  for (const [worker, port] of [
    [producer, ports.producer],
    [consumer, ports.consumer],
  ] as const) {
    expect(worker.program.lines.map(({ msg }) => msg)).toContain(
      `💯P2pNcclEngine init, rank:0, local_rank:0, http_address:127.0.0.1:${port}, zmq_address:${worker.kvAddress}, ` +
        `proxy_address:${proxy.discovery}, send_type:PUT_ASYNC, buffer_size_threshold:1000000000.00, nccl_num_channels:16`,
    );
  }
});

it('a worker says at its start how it moves KV', () => {
  for (const [{ program, kvAddress }, role, kvRank] of [
    [producer, 'producer', 0],
    [consumer, 'consumer', 1],
  ] as const) {
    const messages = program.lines.map(({ msg }) => msg);
    const line =
      `KV transfer: kv_role kv_${role}, kv_rank ${kvRank} of kv_parallel_size 2, rank 0 in this instance, host 127.0.0.1, port any, ` +
      'send_type PUT_ASYNC, threshold kv_buffer_size 1000000000 bytes';
    expect(messages).toContain(line);
    expect(messages.indexOf(line)).toBeLessThan(messages.findIndex((msg) => msg.includes(kvAddress)));
  }
});

it('what is about to be done is told before it: a connection, a communicator, the first ping', () => {
  const [a, b] = [producer.kvAddress, consumer.kvAddress];
  const inOrder = (worker: WorkerHandle, lines: string[]) => {
    const messages = worker.program.lines.map(({ msg }) => msg);
    const at = lines.map((line) => messages.indexOf(line));
    expect([lines, at]).toEqual([lines, at.filter((index) => index >= 0).sort((x, y) => x - y)]);
  };
  inOrder(producer, [
    `connecting to ${b}`,
    `joining a communicator with ${b}: rank 0, size 2 (host transport)`,
    `🤝ncclCommInitRank Success, ${a}👉${b}, MyRank:0`,
  ]);
  inOrder(consumer, [
    `joining a communicator with ${a}: rank 1, size 2 (host transport)`,
    `🤝ncclCommInitRank Success, ${b}👈${a}, MyRank:1`,
  ]);
  for (const worker of [producer, consumer]) {
    const to = `proxy ${proxy.discovery}`;
    inOrder(worker, [`connecting to ${to}`, `first ping sent to ${to}`]);
  }
});

it('a debug log has the points at which the two ends wait for each other', () => {
  const messages = (worker: WorkerHandle) => worker.program.lines.map(({ msg }) => msg);
  for (const line of ['waitForSave: begins', 'waitForSave: done']) {
    expect(messages(producer)).toContain(line);
    expect(messages(consumer)).not.toContain(line);
  }
  expect(messages(consumer)).toContain('waitForLayerLoad: every layer of the load is in place');
});

it('both ends tell the pair, each from its side', async () => {
  const [a, b] = [producer.kvAddress, consumer.kvAddress];
  const messages = (worker: WorkerHandle) => worker.program.lines.map(({ msg }) => msg);
  expect(messages(producer)).toContain(`🤝ncclCommInitRank Success, ${a}👉${b}, MyRank:0`);
  expect(messages(consumer)).toContain(`🤝ncclCommInitRank Success, ${b}👈${a}, MyRank:1`);
});

it('the proxy tells whom it knows and which way a request goes', () => {
  const messages = proxy.program.lines.map(({ msg }) => msg);
  const p = `[HTTP:127.0.0.1:${ports.producer}, ZMQ:${producer.kvAddress}]`;
  const c = `[HTTP:127.0.0.1:${ports.consumer}, ZMQ:${consumer.kvAddress}]`;
  for (const instance of [p, c])
    expect(messages.some((msg) => msg.startsWith(`🔵Add ${instance}`))).toBe(true);
  expect(messages).toContain(`handle_request count: 0, ${p} 👉 ${c}`);
  expect(messages).toContain(`Running on ${proxy.url}`);
});

it('a debug log follows each tensor on both ends', async () => {
  const transferId = `cmpl-${requestId}-0`;
  const tensorId = `${transferId}#model.layers.0.self_attn.attn`;
  const tensorLine = ({ tensorId: id, transferId: transfer, peer, shape, dtype, bufferUsed }: LogLine) =>
    id === tensorId &&
    transfer === transferId &&
    peer &&
    Array.isArray(shape) &&
    dtype === 'float32' &&
    typeof bufferUsed === 'number';
  for (const [worker, word] of [
    [producer, 'sent'],
    [consumer, 'received'],
  ] as const) {
    await worker.program.line(new RegExp(`^${word} .*#model.layers.0.self_attn.attn$`));
    const { lines } = worker.program;
    const full = lines.filter(tensorLine).map(({ msg }) => msg);
    expect(full).toContain(`${word} ${tensorId}`);
    expect(lines.some(({ msg }) => msg === 'connector metadata built')).toBe(true);
    const ours = lines.filter((line) => line['transferId'] === transferId);
    expect(ours.some(({ requestId: id }) => String(id).startsWith(transferId))).toBe(true);
  }
  const messages = (worker: WorkerHandle) => worker.program.lines.map(({ msg }) => msg);
  expect(messages(producer)).toContain('layer saved');
  expect(messages(consumer)).toContain('load started');
});
