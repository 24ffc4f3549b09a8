/**
 * The KV connector in a runtime that is not ours: it has its own scheduler, block allocator, paged cache and model, and calls the two
 * halves of the connector at the places that vLLM's connector interface has.
 *
 *   npx tsx examples/foreign-runtime.ts
 */
import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import {
  type ConnectorRequest,
  engineRequestId,
  fingerprint,
  hostMemory,
  hostView,
  type KvRole,
  layerBytes,
  type NamedLayer,
  P2pSchedulerConnector,
  P2pWorkerConnector,
  type PagedLayout,
  proxyRequestId,
  requestKvBytes,
  type ScheduledRequest,
  SEND_TYPES,
  type SendType,
  slotMapping,
  TransferEngine,
  transferIdOf,
} from 'pd-worker';

const LAYERS = 3;
const CHUNK = 5; // tokens that one step computes
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

class ToyRuntime {
  readonly #layers: readonly NamedLayer[];
  readonly #caches: readonly Int32Array[];
  /** Blocks are handed out in an order of its own, so that producer and consumer hold one prompt in different places. */
  readonly #freeBlocks: number[];
  readonly #scheduler: P2pSchedulerConnector;
  readonly #worker: P2pWorkerConnector;

  constructor(role: KvRole, engine: TransferEngine, sendType: SendType) {
    this.#layers = Array.from({ length: LAYERS }, (_, i) => ({
      name: `toy.layers.${i}`,
      cache: { memory: hostMemory(layerBytes(LAYOUT)), layout: LAYOUT },
    }));
    this.#caches = this.#layers.map(({ cache }) => new Int32Array(hostView(cache.memory).buffer));
    const order = role === 'producer' ? 5 : 11;
    this.#freeBlocks = Array.from({ length: LAYOUT.numBlocks }, (_, i) => (i * order) % LAYOUT.numBlocks);
    this.#scheduler = new P2pSchedulerConnector({ role, blockSize: LAYOUT.blockSize });
    this.#worker = new P2pWorkerConnector({ engine, role, sendType, rank: 0, layers: this.#layers });
  }

  /** Computes (or loads) the prompt and makes one token. A real runtime has many requests in each step; the calls are the same. */
  async generate({ requestId, transferId }: Ids, prompt: readonly number[]): Promise<Generated> {
    const promptTokens = Int32Array.from(prompt);
    const request = { requestId, transferId, numPromptTokens: prompt.length, promptTokens, mayLoad: true };
    const external = this.#scheduler.getNumNewMatchedTokens(request, 0);
    const blockIds = this.#freeBlocks.splice(0, Math.ceil(prompt.length / LAYOUT.blockSize));
    this.#scheduler.updateStateAfterAlloc(request, blockIds, 0, external);
    const slots = slotMapping(blockIds, LAYOUT.blockSize, 0, prompt.length);

    let [done, computed, token] = [external, 0, 0];
    while (done < prompt.length) {
      const count = Math.min(CHUNK, prompt.length - done);
      const scheduled = { ...request, numComputedTokens: done, numScheduledTokens: count, blockIds };
      if (!(await this.#beginStep(scheduled))) {
        done = 0; // the KV did not come: the prompt is computed here, from its start
        continue;
      }
      let states: readonly number[] = prompt.slice(done, done + count);
      for (const [i, { name, cache }] of this.#layers.entries()) {
        await this.#worker.waitForLayerLoad(name);
        states = states.map((state, j) => toyLayer(this.#caches[i]!, slots, done + j, state));
        this.#worker.saveKvLayer(name, cache); // on a GPU, with an event of the stream that writes it
      }
      const unsaved = await this.#worker.waitForSave(); // only now may blocks be overwritten
      assert.deepEqual(
        unsaved.filter(({ state }) => state === 'failed'),
        [],
      );
      token = states.at(-1)!;
      computed += count;
      done += count;
    }

    const kv = this.#caches.map((cache) => slots.flatMap((slot) => kvOf(cache, slot)));
    this.#scheduler.requestFinished(requestId);
    this.#worker.requestFinished({ requestId, transferId, aborted: false });
    this.#freeBlocks.push(...blockIds);
    return { token, computed, kv };
  }

  /** Starts the saves and loads of a step. False where the load ended without KV. */
  async #beginStep(scheduled: ScheduledRequest): Promise<boolean> {
    const metadata = this.#scheduler.buildConnectorMeta([scheduled]);
    this.#worker.startLoadKv(metadata);
    if (metadata.loads.length === 0) return true;
    await this.#worker.loadEnded; // a real runtime runs other requests meanwhile
    for (const outcome of this.#worker.getFinished()) {
      if (outcome.ok) continue;
      console.log(`  as meant: no KV came (${outcome.error.code}), the prompt is computed here`);
      this.#scheduler.loadFailed(outcome.requestId);
      return false;
    }
    return true;
  }
}

/** K and V of one token. */
function kvOf(cache: Int32Array, slot: number): number[] {
  const { numBlocks, blockSize, headDim } = LAYOUT;
  const v = (numBlocks * blockSize + slot) * headDim;
  return [...cache.subarray(slot * headDim, (slot + 1) * headDim), ...cache.subarray(v, v + headDim)];
}

for (const sendType of SEND_TYPES) {
  const options = {
    sendType,
    fingerprint: FINGERPRINT,
    timeouts: { load: 2_000 },
    log: { level: 'error' },
  } as const;
  await using sending = await TransferEngine.create(options);
  await using receiving = await TransferEngine.create(options);
  const producer = new ToyRuntime('producer', sending, sendType);
  const consumer = new ToyRuntime('consumer', receiving, sendType);

  // The transfer id tells each side where the other one is, and KV is keyed by it. Each engine adds a random suffix for itself.
  const idOf = (index: number) => {
    const header = proxyRequestId(sending.address, receiving.address, randomBytes(16).toString('hex'));
    const transferId = transferIdOf(`cmpl-${header}-${index}`);
    const ids = () => ({
      transferId,
      requestId: engineRequestId(transferId, randomBytes(4).toString('hex')),
    });
    return { there: ids(), here: ids() };
  };

  for (const length of [2, 4, 13]) {
    const prompt = Array.from({ length }, (_, i) => 100 + i * i);
    const { there, here } = idOf(0);
    // Side by side: the KV leaves while the producer computes, and the consumer may be asked first.
    const [prefill, decode] = await Promise.all([
      producer.generate(there, prompt),
      consumer.generate(here, prompt),
    ]);
    assert.equal(prefill.computed, length);
    assert.equal(decode.computed, 1, 'the consumer computes the last prompt token alone');
    assert.deepEqual(decode.kv, prefill.kv);
    assert.equal(decode.token, prefill.token);
    const bytes = requestKvBytes(LAYOUT, LAYERS, length);
    console.log(`${sendType}: ${length} tokens, ${bytes} bytes of KV, equal; token ${decode.token}`);
  }

  const { tensors, buffer } = await receiving.state();
  assert.deepEqual([tensors, buffer.usedBytes], [0, 0], 'all memory is free again');

  // KV that no producer sends: after the deadline the consumer computes the prompt itself.
  const prompt = [7, 8, 9];
  const local = await consumer.generate(idOf(1).here, prompt);
  const alone = {
    requestId: engineRequestId('no-peer-in-this-id'),
    transferId: transferIdOf('no-peer-in-this-id'),
  };
  assert.equal(local.computed, prompt.length);
  assert.equal(local.token, (await producer.generate(alone, prompt)).token);
}
