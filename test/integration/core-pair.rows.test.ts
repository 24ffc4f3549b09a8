/** Two core threads, a producer and a consumer, over the real transfer engine: their text must be that of an undivided one. */
import { randomBytes } from 'node:crypto';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { requestKvBytes } from '../../src/kv/layout.ts';
import { parseHostPort } from '../../src/net/address.ts';
import { readMetric } from '../../src/observability/metrics.ts';
import type { CoreRequest, RequestOutput, SamplingParams } from '../../src/scheduler/types.ts';
import { engineRequestId, proxyRequestId } from '../../src/wire/ids.ts';
import type { SendType } from '../../src/wire/messages.ts';
import type { CoreInfo } from '../../src/worker/core-messages.ts';
import { CoreHarness, greedy, textOf } from '../support/core-harness.ts';
import { eventually } from '../support/requests.ts';
import { rows } from '../support/rows.ts';
import { PATIENT_TIMEOUTS } from '../support/transfer.ts';

const suffix = () => randomBytes(4).toString('hex');
let serial = 0;
/** No two begin alike, so that no prefix cache has any part of them. */
const prompt = (length: number) => {
  const first = serial++;
  return Array.from({ length }, (_, i) => 10 + ((first * 131 + i * 17) % 700));
};

describe.each(rows<SendType>(['PUT_ASYNC'], ['PUT', 'GET']))('%s', (sendType) => {
  let reference: CoreHarness;
  let producer: { core: CoreHarness; info: CoreInfo };
  let consumer: { core: CoreHarness; info: CoreInfo };
  // In GET a producer answers within half of it, so what was given up is forgotten soon.
  const timeouts = sendType === 'GET' ? { ...PATIENT_TIMEOUTS, answer: 1_000 } : PATIENT_TIMEOUTS;

  beforeAll(async () => {
    [{ core: reference }, producer, consumer] = await Promise.all([
      CoreHarness.start(),
      CoreHarness.start({ role: 'producer', sendType, timeouts }),
      CoreHarness.start({ role: 'consumer', sendType, timeouts: { ...PATIENT_TIMEOUTS, load: 300 } }),
    ]);
  });
  afterAll(async () => {
    const codes = await Promise.all([reference, producer.core, consumer.core].map((core) => core.shutdown()));
    expect(codes).toEqual([0, 0, 0]);
  });

  const serverId = () => {
    const addresses = [producer, consumer].map(({ info }) => parseHostPort(info.kvAddress!)) as [
      { host: string; port: number },
      { host: string; port: number },
    ];
    return `cmpl-${proxyRequestId(...addresses, randomBytes(16).toString('hex'))}-0`;
  };
  const prefill = (id: string, tokens: readonly number[]) =>
    producer.core.generate(greedy(engineRequestId(id, suffix()), tokens, { maxTokens: 1 }));
  /** KV that should come has all the time it needs, other than what never comes. */
  const patient = (request: CoreRequest): CoreRequest => ({ ...request, prefillWithinMs: 60_000 });
  const decode = (id: string, tokens: readonly number[], more: { n?: number } = {}): CoreRequest =>
    patient(greedy(engineRequestId(id, suffix()), tokens, more));

  async function split(tokens: readonly number[], more: { n?: number } = {}): Promise<RequestOutput[]> {
    const id = serverId();
    await prefill(id, tokens);
    return consumer.core.generate(decode(id, tokens, more));
  }

  const loads = (result: 'ok' | 'recomputed' | 'failed') =>
    readMetric([consumer.core.pages.core], 'pd_kv_loads_total', result);

  it('says what an undivided worker says, from KV that truly moved', async () => {
    const lengths = [2, 15, 16, 17, 33, 70, 100, 64];
    const prompts = lengths.map(prompt);
    const received = readMetric([consumer.core.pages.transfer], 'pd_kv_received_bytes_total');
    const before = loads('ok');
    const texts = await Promise.all(prompts.map(async (tokens) => textOf(await split(tokens))));
    const expected = await Promise.all(
      prompts.map(async (tokens) => textOf(await reference.generate(decode('ref', tokens)))),
    );
    expect(texts).toEqual(expected);
    expect(loads('ok') - before).toBe(prompts.length);
    const { fingerprint, blockSize } = consumer.info;
    const layout = { ...fingerprint, family: 'kv-first', numBlocks: 1, blockSize } as const;
    const bytes = lengths.reduce(
      (sum, tokens) => sum + requestKvBytes(layout, fingerprint.layers, tokens),
      0,
    );
    expect(readMetric([consumer.core.pages.transfer], 'pd_kv_received_bytes_total') - received).toBe(bytes);
    const computed = readMetric([consumer.core.pages.core], 'pd_prompt_tokens_total', 'computed');
    expect(computed).toBe(prompts.length);
  });

  it.each([
    ['neither end', false, false],
    ['the producer', true, false],
    ['the consumer', false, true],
    ['both ends', true, true],
  ])('finds KV where %s randomizes ids', async (_, producerDoes, consumerDoes) => {
    const before = loads('ok');
    const tokens = prompt(35);
    const id = serverId();
    const engineId = (randomizes: boolean) => engineRequestId(id, randomizes ? suffix() : undefined);
    await producer.core.generate(greedy(engineId(producerDoes), tokens, { maxTokens: 1 }));
    const text = textOf(await consumer.core.generate(patient(greedy(engineId(consumerDoes), tokens))));
    expect(text).toEqual(textOf(await reference.generate(decode('ref', tokens))));
    expect(loads('ok') - before).toBe(1);
  });

  it('draws what an undivided worker draws, whatever shapes the draw', async () => {
    const ways: readonly Partial<SamplingParams>[] = [
      { temperature: 1, seed: 5, minP: 0.05, topK: 20, topP: 0.9 },
      { repetitionPenalty: 1.5, presencePenalty: 0.4, frequencyPenalty: 0.4, logprobs: 3 },
      { allowedTokenIds: [20, 30, 40, 50], logitBias: [[30, 4]], badWords: [[20, 30], [40]] },
    ];
    const outcomes = ways.map(async (sampling) => {
      const tokens = prompt(20);
      const id = serverId();
      await prefill(id, tokens);
      const asked = { temperature: 0, ...sampling };
      const split = await consumer.core.generate(
        patient(greedy(engineRequestId(id, suffix()), tokens, asked)),
      );
      const whole = await reference.generate(greedy(engineRequestId('ref', suffix()), tokens, asked));
      const of = (outputs: readonly RequestOutput[]) =>
        outputs.map(({ tokens: drawn, logprobs }) => ({ drawn, logprobs }));
      expect(of(split)).toEqual(of(whole));
      return textOf(split);
    });
    const [, , allowed] = await Promise.all(outcomes);
    expect(allowed?.every((token) => [20, 30, 50].includes(token))).toBe(true);
  });

  it('forks n completions of loaded KV', async () => {
    const tokens = prompt(40);
    const outputs = await split(tokens, { n: 3 });
    const expected = textOf(await reference.generate(decode('ref', tokens)));
    for (const index of [0, 1, 2]) expect(textOf(outputs, index)).toEqual(expected);
  });

  it('frees everything of a request whose client leaves while its KV is on its way', async () => {
    const request = decode(serverId(), prompt(30)); // never prefilled
    const ended = consumer.core.generate(request);
    await eventually('loading', 60_000, async () => (await consumer.core.state()).loading > 0);
    consumer.core.post({ type: 'abort', requestId: request.requestId });
    expect((await ended).at(-1)?.finishReason).toBe('abort');
    await eventually('let go', 60_000, async () => (await consumer.core.state()).loading === 0);
    expect(await consumer.core.state()).toMatchObject({ blocks: { used: 0 }, integrity: [] });
  });

  it('fails a request whose KV never comes at its deadline, and only that one', async () => {
    const lost = consumer.core.generate(greedy(engineRequestId(serverId(), suffix()), prompt(30)));
    const tokens = prompt(20);
    const good = textOf(await split(tokens));
    expect(good).toEqual(textOf(await reference.generate(decode('ref', tokens))));
    const [output] = await lost;
    expect(output).toMatchObject({
      finishReason: 'error',
      error: { code: expect.stringMatching(/^KV_LOAD_/) },
    });
    expect(loads('failed')).toBe(1);
  });

  it('holds nothing when all is done', async () => {
    // A GET given up is forgotten once the producer has answered it, at the latest at its own deadline.
    await eventually('no memory is held', 60_000, async () => {
      const { transfer } = await consumer.core.state();
      return transfer?.buffer.usedBytes === 0;
    });
    const state = await consumer.core.state();
    expect(state).toMatchObject({ running: 0, waiting: 0, loading: 0, blocks: { used: 0 }, integrity: [] });
    expect(state.transfer).toMatchObject({ buffer: { usedBytes: 0 }, pool: { usedBytes: 0 }, waiting: [] });
    const { integrity, blocks } = await producer.core.state();
    expect({ integrity, used: blocks.used }).toEqual({ integrity: [], used: 0 });
  });
});
