/**
 * Two transfer engines in one script exchange tensors in every mode. Over a network nothing changes but the addresses.
 *
 *   npx tsx examples/two-engines.ts
 */
import assert from 'node:assert/strict';
import { randomFillSync } from 'node:crypto';
import {
  hostMemory,
  hostView,
  layerBytes,
  type PagedLayer,
  type PagedLayout,
  requestKvBytes,
  runBytes,
  runOffset,
  SEND_TYPES,
  type SendType,
  TransferEngine,
  tensorBytes,
  tensorIdOf,
  transferIdOf,
  wireShape,
} from 'pd-worker';

for (const sendType of SEND_TYPES) {
  // Each has a thread and sockets of its own: `await using` disposes them at the end of the block, whatever happens in it.
  await using producer = await TransferEngine.create({ sendType });
  await using consumer = await TransferEngine.create({ sendType });
  await exchangeTensor(producer, consumer, sendType);
  await exchangePagedKv(producer, consumer, sendType);

  const { tensors, buffer } = await consumer.state();
  assert.deepEqual([tensors, buffer.usedBytes], [0, 0], 'all memory is free again');
}

/** Bytes that lie in one piece, received into memory of the engine. */
async function exchangeTensor(producer: TransferEngine, consumer: TransferEngine, sendType: SendType) {
  // Both ends name a tensor by the request that it belongs to and a name of its own.
  const request = transferIdOf('hello-0');
  const tensorId = tensorIdOf(request, 'greeting');
  const shape = [3, 1_000];
  const source = hostMemory(tensorBytes(shape, 'float32'));
  randomFillSync(hostView(source));

  const arriving = consumer.receive(tensorId, producer.address);
  const { sent } = producer.send({
    tensorId,
    shape,
    dtype: 'float32',
    source: { kind: 'flat', memory: source },
    // In GET the producer keeps the tensor and whoever asks for it gets it; else it is sent to this peer.
    ...(sendType === 'GET' ? {} : { peer: consumer.address }),
  });
  const tensor = await arriving;
  assert.deepEqual(tensor.shape, shape);
  assert.deepEqual(consumer.view(tensor.memory), hostView(source));
  console.log(`${sendType}: tensor [${shape}], ${await sent} bytes, equal`);

  // `tensor.memory` is the engine's: read or copy it before the request is finished.
  consumer.finish(request);
  producer.finish(request);
}

/** KV of one request: blocks scattered over the producer's cache, put into other blocks of the consumer's. */
async function exchangePagedKv(producer: TransferEngine, consumer: TransferEngine, sendType: SendType) {
  const layout: PagedLayout = {
    family: 'kv-first',
    numBlocks: 32,
    blockSize: 16,
    heads: 2,
    headDim: 8,
    dtype: 'float32',
  };
  const names = ['layers.0', 'layers.1', 'layers.2'];
  const cacheOf = () => names.map((): PagedLayer => ({ memory: hostMemory(layerBytes(layout)), layout }));
  const [from, to] = [cacheOf(), cacheOf()];
  for (const { memory } of from) randomFillSync(hostView(memory));

  const request = transferIdOf('prompt-0');
  const fromBlocks = [7, 3, 21];
  const toBlocks = [0, 9, 4];
  // May begin before the first layer is sent, or after the last one has come.
  const loading = consumer.load({
    requestId: request,
    transferId: request,
    peer: producer.address,
    layers: names.map((name, i) => ({ name, target: to[i]! })),
    blockIds: Int32Array.from(toBlocks),
    skipBlocks: 0,
  });
  const sends = names.map((name, i) =>
    producer.send({
      tensorId: tensorIdOf(request, name),
      shape: wireShape(layout, fromBlocks.length),
      dtype: layout.dtype,
      source: { kind: 'blocks', layer: from[i]!, blockIds: Int32Array.from(fromBlocks) },
      ...(sendType === 'GET' ? {} : { peer: consumer.address }),
    }),
  );
  // From here on the producer may reuse its blocks.
  await Promise.all(sends.map(({ gathered }) => gathered));
  const { bytes } = await loading;
  await Promise.all(sends.map(({ sent }) => sent));

  assert.equal(bytes, requestKvBytes(layout, names.length, fromBlocks.length * layout.blockSize));
  for (const [i] of names.entries()) {
    for (const [j, block] of toBlocks.entries()) {
      assert.deepEqual(blockOf(to[i]!, block), blockOf(from[i]!, fromBlocks[j]!));
    }
  }
  console.log(`${sendType}: KV of ${names.length} layers, ${bytes} bytes, equal`);
  consumer.finish(request);
  producer.finish(request);
}

/** K and V of one block. */
function blockOf({ memory, layout }: PagedLayer, block: number): Uint8Array[] {
  return [0, 1].map((run) => {
    const offset = runOffset(layout, layout.numBlocks, block, run);
    return hostView(memory).subarray(offset, offset + runBytes(layout));
  });
}
