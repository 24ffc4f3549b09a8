/**
 * Our engine on one GPU beside a worker of another make on the other (test/peers, Python: torch, blocking NCCL), as vLLM's would be: all
 * modes, both directions, bytes checked, and a consumer of ours that restarts under a producer that keeps announcing.
 * `node dist/bench/gpu/python-peer.js`, from the root; Python with torch and msgpack is `python3`, or what PD_TEST_PYTHON names.
 */
import { resolve } from 'node:path';
import { prepareNativeEnvironment } from '../../src/config/native-env.ts';
import { createDevice } from '../../src/device/create.ts';
import type { MemoryRef } from '../../src/device/device.ts';
import { hostMemory, hostView } from '../../src/device/memory.ts';
import { formatHostPort, type HostPort } from '../../src/net/address.ts';
import { TransferEngine } from '../../src/transfer/engine.ts';
import {
  DEFAULT_LIMITS,
  DEFAULT_TIMEOUTS,
  type SendRequest,
  type SendType,
} from '../../src/transfer/types.ts';
import { type Dtype, tensorBytes } from '../../src/wire/dtype.ts';
import type { TensorId } from '../../src/wire/ids.ts';
import { type PeerAnswer, PythonPeer, seededBytes, sha256 } from '../../test/support/python-peer.ts';

const TENSORS: readonly { readonly shape: number[]; readonly dtype: Dtype }[] = [
  { shape: [2, 1, 16, 8, 128], dtype: 'bfloat16' },
  { shape: [64, 2, 16, 8, 128], dtype: 'bfloat16' },
  { shape: [2, 1_024, 1_024], dtype: 'float16' },
  { shape: [100, 16, 576], dtype: 'uint8' },
  { shape: [2, 1_024, 16, 8, 128], dtype: 'bfloat16' },
];

/** `host` tries this script itself, without GPUs. */
const [ours, theirs] = process.env['PD_CHECK_DEVICE'] === 'host' ? ['host', 'host'] : ['cuda:0', 'cuda:1'];

prepareNativeEnvironment({
  device: ours!,
  kv: { bind: { host: '127.0.0.1', port: 0 }, announceHost: '127.0.0.1', rank: 0 },
});
const device = await createDevice(ours!);
const stream = device.createStream();
let failures = 0;

function row(name: string, ok: boolean, detail = ''): void {
  if (!ok) failures++;
  console.log(`${ok ? '  ' : 'X '}${name.padEnd(72)} ${detail}`);
}

const engineOf = (sendType: SendType, port = 0): Promise<TransferEngine> =>
  TransferEngine.create({
    device: ours!,
    bind: { host: '127.0.0.1', port },
    announceHost: '127.0.0.1',
    rank: 0,
    sendType,
    kvBufferSize: 2 ** 30,
    memPoolSize: 2 ** 30,
    ncclNumChannels: 16,
    timeouts: DEFAULT_TIMEOUTS,
    limits: DEFAULT_LIMITS,
    log: { level: 'warn', format: 'json' },
  });

function download(memory: MemoryRef): Uint8Array {
  const host = hostMemory(memory.bytes);
  device.copy(host, memory, stream);
  return hostView(host);
}

function tensor(id: string, index: number, peer?: HostPort): SendRequest {
  const { shape, dtype } = TENSORS[index]!;
  const host = hostMemory(tensorBytes(shape, dtype));
  hostView(host).set(seededBytes(shape, dtype, index));
  const memory = device.allocate(host.bytes, id);
  device.copy(memory, host, stream);
  return {
    tensorId: id as TensorId,
    shape,
    dtype,
    source: { kind: 'flat', memory },
    ready: stream.record().ref,
    ...(peer && { peer }),
  };
}

const hashOf = (index: number) => {
  const { shape, dtype } = TENSORS[index]!;
  return sha256(seededBytes(shape, dtype, index));
};
const label = (index: number) => `${TENSORS[index]!.dtype} [${TENSORS[index]!.shape.join(', ')}]`;

const peer = await PythonPeer.start({
  python: process.env['PD_TEST_PYTHON'] ?? 'python3',
  script: resolve('test/peers/peer.py'),
  transport: theirs === 'host' ? 'host' : 'nccl',
  device: theirs!,
});
console.log(`Python peer at ${formatHostPort(peer.address)}`);

const put = (to: HostPort, tensor_id: string, index: number): Promise<PeerAnswer> =>
  peer.attempt('put', { peer: formatHostPort(to), tensor_id, ...TENSORS[index]!, seed: index });

async function theirPut(engine: TransferEngine, id: string, index: number): Promise<void> {
  const waiting = engine.receive(`${id}#l${index}` as TensorId, peer.address, 20_000);
  const answer = await put(engine.address, `${id}-0123abcd#l${index}`, index);
  const got = sha256(download((await waiting).memory));
  row(
    `PUT, Python to ours: ${label(index)}`,
    answer['answer'] === '0' && got === hashOf(index),
    answer.error,
  );
}

try {
  const consumer = await engineOf('PUT');
  for (const index of TENSORS.keys()) await theirPut(consumer, 'cmpl-a-0', index);

  await consumer.dispose();
  const restarted = await engineOf('PUT', consumer.address.port);
  const refused = await put(restarted.address, 'cmpl-b-0#l0', 0);
  row('restarted consumer answers 1 on the pair of before', refused['answer'] === '1', refused.error);
  await peer.ask('joined', { peer: formatHostPort(restarted.address), timeout: 30 });
  await theirPut(restarted, 'cmpl-b-1', 0);
  await restarted.dispose();

  for (const sendType of ['PUT', 'PUT_ASYNC'] as const) {
    const producer = await engineOf(sendType);
    for (const index of TENSORS.keys()) {
      const tensorId = `cmpl-c-${sendType}#l${index}`;
      const { sent } = producer.send(tensor(tensorId, index, peer.address));
      const got = await peer.ask('received', { tensor_id: tensorId, timeout: 20 });
      await sent;
      row(`${sendType}, ours to Python: ${label(index)}`, got['sha256'] === hashOf(index));
    }
    await producer.dispose();
  }

  const producer = await engineOf('GET');
  for (const index of TENSORS.keys()) {
    await producer.send(tensor(`cmpl-d-0#l${index}`, index)).sent;
    const to = formatHostPort(producer.address);
    const got = await peer.ask('get', { peer: to, tensor_id: `cmpl-d-0-89abcdef#l${index}` });
    row(`GET, Python from ours: ${label(index)}`, got['sha256'] === hashOf(index));
  }
  await producer.dispose();

  const asking = await engineOf('GET');
  for (const index of TENSORS.keys()) {
    const tensor_id = `cmpl-e-0#l${index}`;
    await peer.ask('keep', { tensor_id, ...TENSORS[index]!, seed: index });
    const { memory } = await asking.receive(tensor_id as TensorId, peer.address, 20_000);
    row(`GET, ours from Python: ${label(index)}`, sha256(download(memory)) === hashOf(index));
  }
  await asking.dispose();
  await peer.quit();
} catch (error) {
  failures++;
  console.log('X', error);
} finally {
  await peer.dispose();
}
console.log(failures === 0 ? 'all as it should be' : `${failures} failed`);
process.exitCode = failures === 0 ? 0 : 1;
