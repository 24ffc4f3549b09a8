import { afterAll, describe, expect, it } from 'vitest';
import { engineRequestId } from '../../src/wire/ids.ts';
import { CoreHarness, greedy, textOf } from '../support/core-harness.ts';

const prompt = (length: number, first = 3) =>
  Array.from({ length }, (_, i) => 10 + ((first * 37 + i * 11) % 500));

describe('an undivided core thread', () => {
  const started = CoreHarness.start();
  afterAll(async () => {
    const { core } = await started;
    expect(await core.shutdown()).toBe(0);
  });

  it('says what it is', async () => {
    const { info } = await started;
    expect(info).toMatchObject({ numBlocks: 128, blockSize: 16 });
    expect(info.kvAddress).toBeUndefined();
    expect(info.fingerprint.digest).toMatch(/^[0-9a-f]{64}$/);
  });

  it('says the same for one prompt alone, beside others, again from the cache, and as the fork of another', async () => {
    const { core } = await started;
    const tokens = prompt(45);
    const alone = textOf(await core.generate(greedy(engineRequestId('a'), tokens)));
    expect(alone).toHaveLength(8);
    const [again, other, several] = await Promise.all([
      core.generate(greedy(engineRequestId('b'), tokens)),
      core.generate(greedy(engineRequestId('c'), prompt(70, 5), { promptLogprobs: 0 })),
      core.generate(greedy(engineRequestId('d'), tokens, { n: 3 })),
    ]);
    expect(textOf(again)).toEqual(alone);
    expect(again[0]?.promptSource?.cached).toBe(32);
    expect(other.find((output) => output.promptLogprobs)?.promptLogprobs?.tokens).toHaveLength(69);
    for (const index of [0, 1, 2]) expect(textOf(several, index)).toEqual(alone);
  });

  it('hears an abort between steps and frees what it held', async () => {
    const { core } = await started;
    const request = greedy(engineRequestId('e'), prompt(10), { maxTokens: 1_000 });
    const begun = core.next((message) => (message.type === 'outputs' ? true : undefined));
    const ended = core.generate(request);
    await begun;
    core.post({ type: 'abort', requestId: request.requestId });
    expect((await ended).at(-1)?.finishReason).toBe('abort');
    expect(await core.state()).toMatchObject({ running: 0, waiting: 0, blocks: { used: 0 }, integrity: [] });
  });
});

it('a core thread that cannot start says why and ends', async () => {
  await expect(CoreHarness.start({ modelDir: '/nonexistent' })).rejects.toThrow(
    /^CHECKPOINT_INVALID: .*\/nonexistent/,
  );
});
