/**
 * The KV connector in a runtime that is not ours: it has its own scheduler, block allocator, paged cache and model, and calls the two
 * halves of the connector at the places that vLLM's connector interface has. First natively: KV is written into the consumer's blocks while the
 * producer computes, and the first token comes with it. Then by the wire that vLLM speaks, in each of its modes.
 *
 *   npx tsx examples/foreign-runtime.ts
 */
import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import {
  type ConnectorRequest,
  createDevice,
  engineRequestId,
  fingerprint,
  hostView,
  KvCache,
  type KvRole,
  type LoadOutcome,
  type NamedLayer,
  NativeTransfer,
  P2pSchedulerConnector,
  P2pWorkerConnector,
  type PagedLayout,
  proxyRequestId,
  requestKvBytes,
  SEND_TYPES,
  type SendType,
  type SharedBlocks,
  slotMapping,
  TransferEngine,
  transferIdOf,
} from 'pd-worker';

const LAYERS = 3;
const CHUNK = 5; // tokens that one step computes
const LOAD_MS = 2_000;
const LAYOUT: PagedLayout = {
  family: 'kv-first',
  numBlocks: 16,
  blockSize: 4,
  heads: 1,
  headDim: 2,
  dtype: 'int32',
};
/** Peers that hold KV of something else are refused with this. */
const FINGERPRINT = fingerprint({
  model: 'toy',
  weights: 'none',
  dtype: LAYOUT.dtype,
  blockSize: LAYOUT.blockSize,
  layers: LAYERS,
  heads: LAYOUT.heads,
  headDim: LAYOUT.headDim,
});

/** A model in integers, so that equal means equal: what a layer makes of a token depends on all KV of that layer before it. */
function toyLayer(cache: Int32Array, slots: readonly number[], position: number, input: number): number {
  const { numBlocks, blockSize, headDim } = LAYOUT;
  const vAt = numBlocks * blockSize * headDim; // kv-first: all of K, then all of V
  const own = slots[position]! * headDim;
  for (let i = 0; i < headDim; i++) {
    cache[own + i] = Math.imul(input + i, 0x9e3779b1) ^ position;
    cache[vAt + own + i] = Math.imul(input - i, 0x85ebca6b) + position;
  }
  let attention = input;
  for (const slot of slots.slice(0, position + 1)) {
    for (let i = slot * headDim; i < (slot + 1) * headDim; i++) {
      attention = (Math.imul(attention ^ cache[i]!, 31) + cache[vAt + i]!) | 0;
    }
  }
  return attention;
}

type Ids = Pick<ConnectorRequest, 'requestId' | 'transferId'>;

interface Generated {
  readonly token: number;
  /** Prompt tokens computed here; the others were loaded. */
  readonly computed: number;
  /** KV of the prompt, layer by layer, in the order of its tokens. */
  readonly kv: readonly number[][];
}

/** Blocks, and how many have each: a request, a write that has not landed, KV that is kept to be asked for, another process that may write. */
class ToyBlocks implements SharedBlocks {
  readonly #owners = new Map<number, number>();
  /** Handed out in an order of their own, so that producer and consumer hold one prompt in different places. */
  readonly #free: number[];
  readonly #kept = new Map<string, readonly number[]>();

  constructor(order: number) {
    this.#free = Array.from({ length: LAYOUT.numBlocks }, (_, i) => (i * order) % LAYOUT.numBlocks);
  }

  get numFree(): number {
    return this.#free.length;
  }

  allocate(count: number): number[] {
    const blocks = this.#free.splice(0, count);
    assert.equal(blocks.length, count, 'a real runtime would wait');
    this.hold(blocks);
    return blocks;
  }

  hold(blocks: readonly number[]): void {
    for (const block of blocks) this.#owners.set(block, (this.#owners.get(block) ?? 0) + 1);
  }

  unhold(blocks: readonly number[]): void {
    for (const block of blocks) {
      const left = this.#owners.get(block)! - 1;
      this.#owners.set(block, left);
      if (left === 0) this.#free.push(block);
    }
  }

  expose(key: string, blocks: readonly number[]): void {
    this.#keep(`exposed ${key}`, blocks);
  }

  retract(key: string): void {
    this.#letGo(`exposed ${key}`);
  }

  lease(key: string, blocks: readonly number[]): void {
    this.#keep(`leased ${key}`, blocks);
  }

  endLease(key: string): void {
    this.#letGo(`leased ${key}`);
  }

  #keep(key: string, blocks: readonly number[]): void {
    this.hold(blocks);
    this.#kept.set(key, blocks);
  }

  #letGo(key: string): void {
    this.unhold(this.#kept.get(key) ?? []);
    this.#kept.delete(key);
  }
}

interface ToyOptions {
  readonly role: KvRole;
  readonly cache: KvCache;
  readonly sendType: SendType;
  readonly engine: TransferEngine;
  /** Absent: by the frozen wire. */
  readonly native?: NativeTransfer;
}

class ToyRuntime {
  readonly blocks: ToyBlocks;
  readonly #layers: readonly NamedLayer[];
  readonly #caches: readonly Int32Array[];
  readonly #scheduler: P2pSchedulerConnector;
  readonly #worker: P2pWorkerConnector;
  readonly #native: boolean;

  constructor({ role, cache, sendType, engine, native }: ToyOptions) {
    this.#layers = cache.layers;
    this.#caches = this.#layers.map(({ cache: { memory } }) => new Int32Array(hostView(memory).buffer));
    this.#native = native !== undefined;
    this.blocks = new ToyBlocks(role === 'producer' ? 5 : 11);
    this.#scheduler = new P2pSchedulerConnector({ role, blockSize: LAYOUT.blockSize, native: this.#native });
    this.#worker = new P2pWorkerConnector({
      ...{ engine, role, sendType, rank: 0, layers: this.#layers },
      ...(native && { native: { handOver: native.handOver, blocks: this.blocks, loadMs: LOAD_MS } }),
    });
  }

  /** Computes (or loads) the prompt and makes one token. A real runtime has many requests in each step; the calls are the same. */
  async generate({ requestId, transferId }: Ids, prompt: readonly number[]): Promise<Generated> {
    const request = {
      ...{ requestId, transferId, numPromptTokens: prompt.length, mayLoad: true },
      promptTokens: Int32Array.from(prompt),
      // what both ends were told; and equal where both would draw the same token
      ...(this.#native && { wire: 'native' as const, samplingDigest: 'greedy' }),
    };
    const external = this.#scheduler.getNumNewMatchedTokens(request, 0);
    let blockIds = this.blocks.allocate(Math.ceil(prompt.length / LAYOUT.blockSize));
    this.#scheduler.updateStateAfterAlloc(request, blockIds, 0, external);

    let [done, computed, token] = [external, 0, 0];
    if (external > 0) {
      const outcome = await this.#load();
      if (!outcome.ok) {
        console.log(`  as meant: no KV came (${outcome.error.code}), the prompt is computed here`);
        this.#scheduler.loadFailed(requestId);
        done = 0;
        // a write may still come into the old ones (`quarantined`): they are nobody's until none can
        this.blocks.unhold(blockIds);
        blockIds = this.blocks.allocate(blockIds.length);
      } else if (outcome.draw) token = outcome.draw.tokens[0]!;
      // all KV is there and no token: the last one is computed again, for its logits
      else done = Math.min(done, prompt.length - 1);
    }
    const slots = slotMapping(blockIds, LAYOUT.blockSize, 0, prompt.length);
    while (done < prompt.length) {
      const count = Math.min(CHUNK, prompt.length - done);
      const scheduled = { ...request, numComputedTokens: done, numScheduledTokens: count, blockIds };
      this.#worker.startLoadKv(this.#scheduler.buildConnectorMeta([scheduled]));
      let states: readonly number[] = prompt.slice(done, done + count);
      for (const [i, { name, cache }] of this.#layers.entries()) {
        await this.#worker.waitForLayerLoad(name); // only where a runtime loads within the step
        states = states.map((state, j) => toyLayer(this.#caches[i]!, slots, done + j, state));
        this.#worker.saveKvLayer(name, cache); // on a GPU, with an event of the stream that writes it
      }
      const unsaved = await this.#worker.waitForSave(); // only now may blocks be overwritten
      assert.deepEqual(
        unsaved.filter(({ state }) => state === 'failed'),
        [],
      );
      token = states.at(-1)! & 0x7fff_ffff;
      computed += count;
      done += count;
      // natively it travels with the KV
      if (done === prompt.length) this.#worker.promptsDrawn(new Map([[requestId, { tokens: [token] }]]));
    }

    const kv = this.#caches.map((cache) => slots.flatMap((slot) => kvOf(cache, slot)));
    this.#scheduler.requestFinished(requestId);
    this.#worker.requestFinished({ requestId, transferId, aborted: false });
    this.blocks.unhold(blockIds);
    return { token, computed, kv };
  }

  /** Starts the load of the request that was allocated last, and waits for its end; a real runtime runs other requests meanwhile. */
  async #load(): Promise<LoadOutcome> {
    this.#worker.startLoadKv(this.#scheduler.buildConnectorMeta([]));
    for (;;) {
      const [outcome] = this.#worker.getFinished();
      if (outcome) return outcome;
      await this.#worker.loadEnded;
    }
  }
}

/** K and V of one token. */
function kvOf(cache: Int32Array, slot: number): number[] {
  const { numBlocks, blockSize, headDim } = LAYOUT;
  const v = (numBlocks * blockSize + slot) * headDim;
  return [...cache.subarray(slot * headDim, (slot + 1) * headDim), ...cache.subarray(v, v + headDim)];
}

const OPTIONS = { fingerprint: FINGERPRINT, timeouts: { load: LOAD_MS }, log: { level: 'error' } } as const;

/** The transfer id tells each side where the other one is, and KV is keyed by it. Each engine adds a random suffix for itself. */
function idOf(producer: TransferEngine, consumer: TransferEngine, index: number) {
  const header = proxyRequestId(producer.address, consumer.address, randomBytes(16).toString('hex'));
  const transferId = transferIdOf(`cmpl-${header}-${index}`);
  const ids = () => ({ transferId, requestId: engineRequestId(transferId, randomBytes(4).toString('hex')) });
  return { there: ids(), here: ids() };
}

/** Prompts of several lengths on both; then one whose KV nobody sends. */
async function check(
  how: string,
  {
    producer,
    consumer,
    sending,
    receiving,
  }: Record<'producer' | 'consumer', ToyRuntime> & Record<'sending' | 'receiving', TransferEngine>,
  computedByConsumer: number,
): Promise<void> {
  for (const length of [2, 4, 13]) {
    const prompt = Array.from({ length }, (_, i) => 100 + i * i);
    const { there, here } = idOf(sending, receiving, 0);
    // Side by side: the KV leaves while the producer computes, and the consumer may be asked first.
    const [prefill, decode] = await Promise.all([
      producer.generate(there, prompt),
      consumer.generate(here, prompt),
    ]);
    assert.equal(prefill.computed, length);
    assert.equal(decode.computed, computedByConsumer);
    assert.deepEqual(decode.kv, prefill.kv);
    assert.equal(decode.token, prefill.token);
    const bytes = requestKvBytes(LAYOUT, LAYERS, length);
    console.log(`${how}: ${length} tokens, ${bytes} bytes of KV, equal; token ${decode.token}`);
  }
  const { tensors, buffer } = await receiving.state();
  assert.deepEqual([tensors, buffer.usedBytes], [0, 0], 'all memory is free again');

  // KV that no producer sends: after the deadline the consumer computes the prompt itself.
  const prompt = [7, 8, 9];
  const local = await consumer.generate(idOf(sending, receiving, 1).here, prompt);
  const alone = {
    requestId: engineRequestId('no-peer-in-this-id'),
    transferId: transferIdOf('no-peer-in-this-id'),
  };
  assert.equal(local.computed, prompt.length);
  assert.equal(local.token, (await producer.generate(alone, prompt)).token);
}

// On a GPU `KvCache` takes memory that producers of the same host write into (`direct`); layers in memory of your own come by `nccl`.
const host = await createDevice('host');
const names = Array.from({ length: LAYERS }, (_, i) => `toy.layers.${i}`);
const [ours, theirs] = [
  await KvCache.allocate(host, LAYOUT, names),
  await KvCache.allocate(host, LAYOUT, names),
];
const sendType = 'PUT_ASYNC';

{
  await using from = await NativeTransfer.create({ ...OPTIONS, role: 'producer', cache: ours });
  await using to = await NativeTransfer.create({ ...OPTIONS, role: 'consumer', cache: theirs });
  const producer = new ToyRuntime({
    role: 'producer',
    cache: ours,
    sendType,
    engine: from.engine,
    native: from,
  });
  const consumer = new ToyRuntime({
    role: 'consumer',
    cache: theirs,
    sendType,
    engine: to.engine,
    native: to,
  });
  await check('native', { producer, consumer, sending: from.engine, receiving: to.engine }, 0);
}

for (const sendType of SEND_TYPES) {
  await using sending = await TransferEngine.create({ ...OPTIONS, sendType });
  await using receiving = await TransferEngine.create({ ...OPTIONS, sendType });
  const producer = new ToyRuntime({ role: 'producer', cache: ours, sendType, engine: sending });
  const consumer = new ToyRuntime({ role: 'consumer', cache: theirs, sendType, engine: receiving });
  // by this wire the consumer computes the last prompt token alone
  await check(sendType, { producer, consumer, sending, receiving }, 1);
}
