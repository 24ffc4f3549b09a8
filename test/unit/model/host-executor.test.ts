import { beforeAll, describe, expect, it } from 'vitest';
import { demoModelDir } from '../../../src/config/demo-model.ts';
import type { Device } from '../../../src/device/device.ts';
import { HostDevice } from '../../../src/device/host.ts';
import { runBytes, runOffset } from '../../../src/kv/layout.ts';
import { readModelConfig } from '../../../src/model/config.ts';
import { HostExecutor } from '../../../src/model/host/executor.ts';
import { GREEDY } from '../../../src/model/sampler.ts';
import { Tokenizer } from '../../../src/model/tokenizer.ts';
import { batchOf, generate, sequenceOf } from '../../support/batches.ts';
import { OpaqueDevice } from '../../support/opaque-device.ts';
import { demoReference, TINY_LLAMA3_DIR, tinyLlama3Reference } from '../../support/references.ts';
import { tempDir } from '../../support/temp-dir.ts';
import { type TinyOptions, writeTinyModel } from '../../support/tiny-model.ts';

const BLOCK = 16;

async function open(
  dir: string,
  { blockSize = BLOCK, numBlocks = 64, device = new HostDevice() as Device } = {},
) {
  return HostExecutor.create({ dir, config: await readModelConfig(dir), device, blockSize, numBlocks });
}

async function tiny(options: TinyOptions = {}, device: Device = new HostDevice()) {
  const dir = await tempDir();
  await writeTinyModel(dir, options);
  return open(dir, { blockSize: 4, numBlocks: 40, device });
}

const range = (count: number, from = 0) => Array.from({ length: count }, (_, i) => from + i);
/** Blocks in no order, as a busy worker hands them out. */
const shuffled = (count: number, offset: number) => range(count).map((i) => (offset + i * 7) % 40);
const PROMPT = range(23).map((i) => (i * 11 + 3) % 50);
const OTHER = range(9).map((i) => (i * 5 + 1) % 50);

describe('host Llama against transformers', () => {
  it('computes the same logits with Llama 3 RoPE scaling, grouped heads and an untied head', async () => {
    const { ids, every, logits, greedy } = tinyLlama3Reference();
    const executor = await open(TINY_LLAMA3_DIR);
    for (const [i, expected] of logits.entries()) {
      const prefix = ids.slice(0, (i + 1) * every);
      const found = await executor.logits(batchOf(sequenceOf({ tokens: prefix, blocks: range(13) })));
      expected.forEach((value, id) => {
        expect(Math.abs(found[id]! - value)).toBeLessThan(1e-3);
      });
    }
    expect(await generate(executor, ids, greedy.length, { blocks: range(14) })).toEqual(greedy);
  });

  describe('demo model', () => {
    const reference = demoReference();
    let executor: HostExecutor;
    let tokenizer: Tokenizer;
    beforeAll(async () => {
      executor = await open(demoModelDir(), { numBlocks: 128 });
      tokenizer = await Tokenizer.load(demoModelDir());
    });

    it.each(reference.completions)(
      'continues $prompt with the same tokens',
      async ({ ids, greedy, text, logits }) => {
        const found = await generate(executor, ids, greedy.length, { blocks: range(12, 40) });
        expect(found).toEqual(greedy);
        expect(tokenizer.decode(found)).toBe(text);
        if (!logits) return;
        const ours = await executor.logits(batchOf(sequenceOf({ tokens: ids, blocks: range(12, 40) })));
        const worst = logits.reduce((most, value, id) => Math.max(most, Math.abs(ours[id]! - value)), 0);
        expect(worst).toBeLessThan(1e-3);
      },
    );

    it('answers the runbook with sense', () => {
      const texts = reference.completions.slice(0, 4).map(({ prompt, text }) => prompt + text);
      expect(texts[1]).toContain('Paris is the capital of France.');
      expect(texts[2]).toContain('return fibonacci(n-1) + fibonacci(n-2)');
      expect(tokenizer.decode(reference.chats[0]!.greedy)).toContain('Paris');
    });

    it('computes the same far into its context, in chunks', async () => {
      const { ids, every, top } = reference.long;
      const found: { ids: number[]; logits: number[] }[] = [];
      for (let start = 0; start + every <= 600; start += every) {
        const tokens = ids.slice(start, start + every);
        const logits = await executor.logits(batchOf(sequenceOf({ tokens, start, blocks: range(128) })));
        const best = [...logits.keys()].sort((a, b) => logits[b]! - logits[a]!).slice(0, 5);
        found.push({ ids: best, logits: best.map((id) => logits[id]!) });
      }
      found.forEach(({ ids: best, logits }, i) => {
        expect(best[0]).toBe(top[i]!.ids[0]);
        logits.forEach((value, k) => {
          expect(Math.abs(value - top[i]!.logits[k]!)).toBeLessThan(1e-3);
        });
      });
    });
  });
});

describe('host executor', () => {
  it('computes bit for bit the same alone, in a batch, in chunks and in other blocks', async () => {
    const executor = await tiny();
    const alone = await executor.logits(batchOf(sequenceOf({ tokens: PROMPT, blocks: range(6) })));
    const batched = await executor.logits(
      batchOf(
        sequenceOf({ id: 'b', tokens: OTHER, blocks: shuffled(3, 30) }),
        sequenceOf({ tokens: PROMPT, blocks: shuffled(6, 8) }),
        sequenceOf({ id: 'c', tokens: [7], blocks: [6] }),
      ),
    );
    expect(batched.slice(50, 100)).toEqual(alone);
    for (const chunk of [1, 3, 4, 22]) {
      let logits = new Float32Array();
      for (let start = 0; start < PROMPT.length; start += chunk) {
        const tokens = PROMPT.slice(start, start + chunk);
        logits = new Float32Array(
          await executor.logits(batchOf(sequenceOf({ tokens, start, blocks: shuffled(6, 3) }))),
        );
      }
      expect(logits).toEqual(alone);
    }
  });

  it.each<[string, TinyOptions]>([
    ['shards of float32', { type: 'F32', shards: 3 }],
    ['float16', { type: 'F16' }],
    ['bfloat16 in shards', { type: 'BF16', shards: 2 }],
  ])('computes about the same from %s', async (_, options) => {
    const expected = await (await tiny()).logits(batchOf(sequenceOf({ tokens: PROMPT, blocks: range(6) })));
    const found = await (await tiny(options)).logits(
      batchOf(sequenceOf({ tokens: PROMPT, blocks: range(6) })),
    );
    const worst = expected.reduce((most, value, i) => Math.max(most, Math.abs(found[i]! - value)), 0);
    expect(worst).toBeLessThan(options.type === 'F32' ? 1e-9 : 0.1);
  });

  it('uses the embedding as head where tied', async () => {
    const executor = await tiny({ tied: true });
    const logits = await executor.logits(batchOf(sequenceOf({ tokens: PROMPT, blocks: range(6) })));
    expect(logits.every(Number.isFinite)).toBe(true);
    expect(logits).not.toEqual(
      await (await tiny()).logits(batchOf(sequenceOf({ tokens: PROMPT, blocks: range(6) }))),
    );
  });

  it('tells of each layer once, in order, when its KV is in the cache', async () => {
    const executor = await tiny();
    expect(executor.layers.map(({ name }) => name)).toEqual([
      'model.layers.0.self_attn.attn',
      'model.layers.1.self_attn.attn',
    ]);
    const events: string[] = [];
    const kvOf = (index: number) => {
      const { memory, layout } = executor.layers[index]!.cache;
      if (memory.kind !== 'host') throw new Error('host memory expected');
      return new Uint8Array(memory.buffer, runOffset(layout, layout.numBlocks, 9, 0), runBytes(layout)).some(
        (byte) => byte !== 0,
      );
    };
    await executor.forward(batchOf(sequenceOf({ tokens: OTHER.slice(0, 4), blocks: [9] })), {
      afterLayer: (index, ready) => void events.push(`after ${index} ${kvOf(index)} ${ready}`),
    });
    expect(events).toEqual(['after 0 true undefined', 'after 1 true undefined']);
  });

  it('copies blocks before it computes', async () => {
    const executor = await tiny();
    const expected = await generate(executor, PROMPT, 6, { blocks: range(8) });
    await executor.forward(batchOf(sequenceOf({ tokens: PROMPT.slice(0, 22), blocks: range(6) })), {});
    const forked = sequenceOf({
      id: 'fork',
      tokens: PROMPT.slice(22),
      start: 22,
      blocks: [0, 1, 2, 3, 4, 20],
      position: 0,
    });
    const { sampled } = await executor.forward(
      { sequences: [forked], blockCopies: [{ source: 5, target: 20 }] },
      {},
    );
    expect(sampled).toEqual([{ sequenceId: 'fork', token: expected[0] }]);
  });

  it('samples for those that asked, in batch order', async () => {
    const executor = await tiny();
    const { sampled } = await executor.forward(
      batchOf(
        sequenceOf({
          id: 'x',
          tokens: OTHER,
          blocks: [0, 1, 2],
          position: 0,
          params: { ...GREEDY, logprobs: 3 },
        }),
        sequenceOf({ id: 'chunk', tokens: PROMPT.slice(0, 8), blocks: [3, 4] }),
        sequenceOf({ id: 'y', tokens: [5], blocks: [5], position: 0 }),
      ),
      {},
    );
    expect(sampled.map(({ sequenceId }) => sequenceId)).toEqual(['x', 'y']);
    expect(sampled[0]!.logprob).toMatchObject({ token: sampled[0]!.token, top: { length: 3 } });
    expect(sampled[1]!.logprob).toBeUndefined();
  });

  it('draws under the mask of each sequence, and fails alone what no token is left for', async () => {
    const executor = await tiny();
    const mask = Uint32Array.of(1 << 7, 0);
    const { sampled, failed } = await executor.forward(
      batchOf(
        ...['free', 'masked', 'late', 'dead', 'broken'].map((id, i) =>
          sequenceOf({ id, tokens: [i], blocks: [i], position: 0 }),
        ),
      ),
      {
        mask: ({ sequenceId }) => {
          if (sequenceId === 'masked') return mask;
          if (sequenceId === 'late') return Promise.resolve(mask);
          if (sequenceId === 'dead') return new Uint32Array(2);
          return sequenceId === 'broken' ? Promise.reject(new Error('no grammar')) : undefined;
        },
      },
    );
    expect(sampled.map(({ sequenceId }) => sequenceId)).toEqual(['free', 'masked', 'late']);
    expect(sampled.slice(1).map(({ token }) => token)).toEqual([7, 7]);
    expect(failed?.get('dead')).toMatchObject({ code: 'REQUEST_INVALID', context: { sequenceId: 'dead' } });
    expect(failed?.get('dead')?.message).not.toContain('dead');
    expect(failed?.get('broken')).toMatchObject({ message: expect.stringContaining('no grammar') });
  });

  it('gives the log-probability of every prompt token, in chunks as at once', async () => {
    const executor = await tiny();
    const of = async (from: number, to: number) => {
      const targets = Int32Array.from(PROMPT.slice(from + 1, to + 1));
      const step = {
        ...sequenceOf({ tokens: PROMPT.slice(from, to), start: from, blocks: range(6) }),
        promptLogprobs: { count: 1, targets },
      };
      const { promptLogprobs } = await executor.forward(
        batchOf(sequenceOf({ id: 'other', tokens: OTHER, blocks: range(3, 10) }), step),
        {},
      );
      return promptLogprobs.get('a')!;
    };
    const whole = await of(0, PROMPT.length);
    expect(whole.map(({ token }) => token)).toEqual(PROMPT.slice(1));
    expect(whole.every(({ logprob, top }) => logprob <= top[0]!.logprob)).toBe(true);
    expect([...(await of(0, 10)), ...(await of(10, PROMPT.length))]).toEqual(whole);
  });

  it('refuses tokens and positions that have no place, by name', async () => {
    const executor = await tiny();
    await expect(executor.logits(batchOf(sequenceOf({ tokens: [50], blocks: [0] })))).rejects.toThrow(
      /token 50 at position 0/,
    );
    await expect(
      executor.logits(batchOf(sequenceOf({ tokens: [1], start: 4, blocks: [0] }))),
    ).rejects.toThrow(/position 4 has no block/);
  });
});

describe('host executor over a device it cannot read', () => {
  it('computes the same, and has each layer on the device when it says so', async () => {
    const device = new OpaqueDevice();
    const [mirrored, plain] = [await tiny({}, device), await tiny()];
    const blocks = shuffled(8, 2);
    expect(await generate(mirrored, PROMPT, 8, { blocks, chunk: 5 })).toEqual(
      await generate(plain, PROMPT, 8, { blocks }),
    );
    await plain.forward(batchOf(sequenceOf({ id: 'n', tokens: OTHER, blocks: [30, 31, 32] })), {});
    let seen = 0;
    await mirrored.forward(batchOf(sequenceOf({ id: 'n', tokens: OTHER, blocks: [30, 31, 32] })), {
      afterLayer: (index) => {
        const { memory, layout } = mirrored.layers[index]!.cache;
        const ours = plain.layers[index]!.cache.memory;
        if (ours.kind !== 'host') throw new Error('host memory expected');
        for (const run of [0, 1]) {
          const at = runOffset(layout, layout.numBlocks, 30, run);
          const onDevice = device.bytesOf(memory).subarray(at, at + runBytes(layout) * 2);
          expect(Buffer.from(onDevice)).toEqual(Buffer.from(ours.buffer, at, runBytes(layout) * 2));
          seen++;
        }
      },
    });
    expect(seen).toBe(4);
  });

  it('reads KV that a transfer put on the device, and copies of it', async () => {
    const producer = await tiny();
    const expected = await generate(producer, PROMPT, 6, { blocks: range(8) });
    const device = new OpaqueDevice();
    const consumer = await tiny({}, device);
    // What a load does: the blocks of the producer go into other blocks of the consumer.
    const blocks = shuffled(8, 5);
    producer.layers.forEach(({ cache: { memory, layout } }, i) => {
      if (memory.kind !== 'host') throw new Error('host memory expected');
      const target = device.bytesOf(consumer.layers[i]!.cache.memory);
      for (const run of [0, 1]) {
        range(6).forEach((block) => {
          const bytes = new Uint8Array(
            memory.buffer,
            runOffset(layout, layout.numBlocks, block, run),
            runBytes(layout),
          );
          target.set(bytes, runOffset(layout, layout.numBlocks, blocks[block]!, run));
        });
      }
    });
    const last = PROMPT.length - 1;
    const first = sequenceOf({ tokens: PROMPT.slice(last), start: last, blocks, position: 0 });
    const forkBlocks = [...blocks.slice(0, 5), 39];
    const fork = sequenceOf({
      id: 'fork',
      tokens: PROMPT.slice(last),
      start: last,
      blocks: forkBlocks,
      position: 0,
    });
    const { sampled } = await consumer.forward(
      { sequences: [first, fork], blockCopies: [{ source: blocks[5]!, target: 39 }] },
      {},
    );
    expect(sampled.map(({ token }) => token)).toEqual([expected[0], expected[0]]);
    consumer.dispose();
  });
});
