/** A pair that hands KV over natively answers as an undivided worker, to the token, and computes nothing twice. */
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import type { CoreState } from '../../src/worker/core-messages.ts';
import {
  metricsOf,
  type ProxyHandle,
  startProxy,
  startWorker,
  untilListed,
  type WorkerHandle,
} from '../support/cluster.ts';
import { OtlpReceiver } from '../support/otlp-receiver.ts';
import { CAPITAL, complete, eventually, mixedRequests } from '../support/requests.ts';

const STORY = 'Once upon a time in a magical forest, there lived a wise old dragon who told the children of';

/** What a client may ask for of a first token; each answered by both, and compared whole. */
const BODIES: readonly (readonly [what: string, body: object])[] = [
  ['greedy, with log-probabilities', { prompt: STORY, max_tokens: 6, temperature: 0, logprobs: 3 }],
  ['drawn by a seed', { prompt: STORY, max_tokens: 6, temperature: 0.9, top_p: 0.8, seed: 11, logprobs: 2 }],
  ['one token', { prompt: STORY, max_tokens: 1, temperature: 0 }],
  ['none, echoed', { prompt: STORY, max_tokens: 0, echo: true, logprobs: 1 }],
  [
    'a first token that would stop',
    { prompt: STORY, max_tokens: 5, temperature: 1.5, seed: 3, min_tokens: 4 },
  ],
  [
    'drawn under penalties',
    {
      prompt: STORY,
      max_tokens: 6,
      temperature: 0.9,
      seed: 4,
      repetition_penalty: 1.3,
      frequency_penalty: 0.5,
      min_p: 0.05,
      logit_bias: { 100: 2 },
      logprobs: 1,
    },
  ],
  [
    'a text of a grammar',
    { prompt: STORY, max_tokens: 8, temperature: 0, structured_outputs: { regex: ' [a-z]{3,9} [a-z]+' } },
  ],
  [
    'a choice of one token',
    { prompt: STORY, max_tokens: 8, temperature: 0, structured_outputs: { choice: [' the', ' a'] } },
  ],
  ['a stop string', { prompt: STORY, max_tokens: 20, temperature: 0, stop: ['the'] }],
  ['two completions', { prompt: STORY, max_tokens: 5, temperature: 0.7, seed: 5, n: 2 }],
  ['three prompts', { prompt: [STORY, 'Hello world', 'def fibonacci(n):'], max_tokens: 4, temperature: 0 }],
  [
    'a form',
    {
      prompt: STORY,
      max_tokens: 30,
      temperature: 0.9,
      seed: 2,
      n: 2,
      logprobs: 2,
      structured_outputs: { regex: '[a-z]{3,8}( [0-9]+)?' },
    },
  ],
  // How much is left depends on what is to be generated, of which the producer's copy asks for one token.
  [
    'a text cut off where it does not fit',
    { prompt: STORY.repeat(120), truncate_prompt_tokens: -1, max_tokens: 6, temperature: 0 },
  ],
  ['the same prompt again', { prompt: STORY, max_tokens: 6, temperature: 0 }],
];

/** Of `GET /v1/requests/ID/route`, as far as it is read here. */
interface WorkerTold {
  readonly server: { readonly prompt_tokens: number; readonly completion_tokens: number };
  readonly prompts: readonly {
    readonly stages: readonly { readonly stage: string; readonly tokens?: number }[];
    readonly kv_bytes: number;
    readonly cached_tokens: number;
  }[];
}
type RouteAttempt = Readonly<Record<'producer' | 'consumer', { readonly worker: WorkerTold | null }>>;

describe('a native pair', () => {
  let proxy: ProxyHandle;
  let workers: WorkerHandle[] = [];
  let receiver: OtlpReceiver;

  beforeAll(async () => {
    receiver = await OtlpReceiver.start();
    const traced = ['--otlp-endpoint', receiver.url];
    proxy = await startProxy(traced);
    // Chunks of 16 tokens: a prompt leaves in several writes.
    const args = [
      '--kv-load-failure',
      'fail',
      '--max-num-batched-tokens',
      '16',
      '--debug-state',
      '--log-level',
      'debug',
      ...traced,
    ];
    workers = await Promise.all([
      startWorker('producer', proxy, args),
      startWorker('consumer', proxy, args),
      startWorker('both', undefined),
    ]);
    await untilListed(proxy, 1, 1);
  });
  afterAll(async () => {
    await Promise.all([...workers, proxy].map(({ program }) => program.stop()));
    await receiver.close();
  });

  const post = async (url: string, body: object) => {
    const response = await fetch(`${url}/v1/completions`, {
      method: 'POST',
      headers: { 'content-type': 'application/json' },
      body: JSON.stringify({ model: 'demo', ...body }),
    });
    const { choices, usage, error } = (await response.json()) as Record<string, unknown>;
    return { choices, usage, error };
  };

  const computed = async () =>
    (await metricsOf(workers[1]!)).get('pd_prompt_tokens_total{source="computed"}') ?? 0;

  it.each(BODIES)('answers %s as the undivided worker', async (_, body) => {
    const before = await computed();
    const [pair, undivided] = await Promise.all([post(proxy.url, body), post(workers[2]!.url, body)]);
    expect(pair).toEqual(undivided);
    // Log-probabilities of a prompt need all of it.
    expect((await computed()) > before).toBe('echo' in body);
  });

  it('answers many at a time, streamed and not, and loads what it was asked for', async () => {
    const [, consumer, both] = workers as [WorkerHandle, WorkerHandle, WorkerHandle];
    const before = await metricsOf(consumer);
    const requests = mixedRequests(12, 7);
    const [pair, undivided] = await Promise.all(
      [proxy.url, both.url].map((url) => Promise.all(requests.map((request) => complete(url, request)))),
    );
    expect(pair!.map(({ text, finishReason }) => [text, finishReason])).toEqual(
      undivided!.map(({ text, finishReason }) => [text, finishReason]),
    );
    const after = await metricsOf(consumer);
    const grown = (name: string) => (after.get(name) ?? 0) - (before.get(name) ?? 0);
    expect(grown('pd_kv_loads_total{result="ok"}')).toBe(12);
    expect(grown('pd_prompt_tokens_total{source="computed"}')).toBe(0);
  });

  it('tells of a request where it went, when it was where, and what moved', async () => {
    const body = JSON.stringify({ model: 'demo', prompt: STORY.repeat(3), max_tokens: 4, stream: true });
    const headers = { 'content-type': 'application/json' };
    const answer = await fetch(`${proxy.url}/v1/completions`, { method: 'POST', headers, body });
    await answer.text();
    const url = `${proxy.url}/v1/requests/${answer.headers.get('x-pd-request-id')}/route`;
    let route: { status: number | null; attempts: RouteAttempt[] } | undefined;
    // Without a worker that does not tell within a second.
    await eventually('its end, told by both', 60_000, async () => {
      route = (await (await fetch(url)).json()) as typeof route;
      const [attempt] = route!.attempts;
      return route!.status !== null && attempt?.producer.worker !== null && attempt?.consumer.worker !== null;
    });
    const [producer, consumer] = workers as [WorkerHandle, WorkerHandle];
    const time = expect.any(Number);
    expect(route).toMatchObject({
      status: 200,
      attempts: [
        {
          producer: { zmq_address: producer.kvAddress, policy: 'kv-aware', considered: 1 },
          consumer: { zmq_address: consumer.kvAddress, policy: 'kv-aware', considered: 1 },
          asked_early: true,
          wire: 'native',
          outcome: 'answered',
          at_ms: { prefill: time, decode: time, answered: time, first_event: time, end: time },
        },
      ],
    });
    const [from, into] = (['producer', 'consumer'] as const).map(
      (role) => route!.attempts[0]![role].worker!,
    ) as [WorkerTold, WorkerTold];
    const { prompt_tokens: tokens, completion_tokens } = into.server;
    expect([tokens > 16, completion_tokens]).toEqual([true, 4]);
    const moved = { wire: 'native', transport: 'host', kv_bytes: into.prompts[0]!.kv_bytes };
    expect(from.prompts).toMatchObject([{ ...moved, kv_to: consumer.kvAddress }]);
    expect(into.prompts).toMatchObject([{ ...moved, kv_from: producer.kvAddress }]);
    expect(into.prompts[0]).toMatchObject({ computed_tokens: 0, loaded_tokens: expect.any(Number) });
    // Chunk by chunk, all of the prompt that was not there already.
    const chunks = from.prompts[0]!.stages.flatMap(({ tokens: own }) => own ?? []);
    const computed = chunks.reduce((sum, own) => sum + own, 0);
    expect(computed).toBe(tokens - from.prompts[0]!.cached_tokens);
    expect(chunks.length).toBeGreaterThan(1);
  });

  it("is one trace, in that of its client, with the proxy's spans and those of both workers", async () => {
    const client = '2'.repeat(16);
    const services = ['pd-proxy', 'pd-worker-producer', 'pd-worker-consumer'];
    const [producer, consumer] = workers as [WorkerHandle, WorkerHandle];
    let traceId = '';
    let answer: Response | undefined;
    const named = (name: string, service: string) =>
      receiver.traceOf(traceId).filter((span) => span.name === name && span.service === service);
    const one = (name: string, service: string) => named(name, service)[0];
    const whole = () => services.slice(1).every((service) => one('pd.hand_over', service));
    // A worker tells all its spans at once, half a second after its end: without the hand-over where a busy machine takes longer for that.
    for (let tries = 1; tries < 10 && !whole(); tries++) {
      traceId = `${tries}`.repeat(32);
      answer = await fetch(`${proxy.url}/v1/completions`, {
        method: 'POST',
        headers: { 'content-type': 'application/json', traceparent: `00-${traceId}-${client}-01` },
        body: JSON.stringify({
          model: 'demo',
          prompt: `${tries} ${STORY.repeat(2)}`,
          max_tokens: 4,
          stream: true,
        }),
      });
      await answer.text();
      await eventually('the spans of all three', 60_000, async () =>
        services.every((service) => one('POST /v1/completions', service)),
      );
    }
    const roots = services.map((service) => one('POST /v1/completions', service)!);
    const [root, prefilled, decoded] = roots;
    const [prefill, decode] = ['pd.prefill', 'pd.decode'].map((name) => one(name, 'pd-proxy')!);
    expect(root!.parentSpanId).toBe(client);
    expect([prefill!.parentSpanId, decode!.parentSpanId]).toEqual([root!.spanId, root!.spanId]);
    expect([prefilled!.parentSpanId, decoded!.parentSpanId]).toEqual([prefill!.spanId, decode!.spanId]);
    for (const name of ['pd.queue', 'pd.placement'])
      expect(one(name, 'pd-proxy')!.parentSpanId).toBe(root!.spanId);
    expect(root!.attributes).toMatchObject({
      'http.route': '/v1/completions',
      'http.response.status_code': 200,
      'gen_ai.operation.name': 'text_completion',
      'gen_ai.request.model': 'demo',
      'pd.request_id': answer!.headers.get('x-pd-request-id'),
    });
    expect(decode!.attributes).toMatchObject({
      'pd.producer': producer.kvAddress,
      'pd.consumer': consumer.kvAddress,
      'pd.wire': 'native',
    });
    // At the producer: its queue, the prompt chunk by chunk, and the KV that left.
    const computed = one('pd.prefill', 'pd-worker-producer')!;
    const chunks = named('pd.prefill.chunk', 'pd-worker-producer');
    expect(chunks.length).toBeGreaterThan(1);
    for (const chunk of chunks) expect(chunk.parentSpanId).toBe(computed.spanId);
    const tokens = chunks.reduce((sum, { attributes }) => sum + Number(attributes['pd.tokens']), 0);
    expect(tokens).toBe(computed.attributes['pd.computed_tokens']);
    const moved = {
      'pd.kv.wire': 'native',
      'pd.kv.transport': 'host',
      'pd.kv.from': producer.kvAddress,
      'pd.kv.to': consumer.kvAddress,
    };
    const sent = one('pd.hand_over', 'pd-worker-producer')!;
    const came = one('pd.hand_over', 'pd-worker-consumer')!;
    expect(sent).toMatchObject({ parentSpanId: prefilled!.spanId, attributes: moved });
    expect(came).toMatchObject({ parentSpanId: decoded!.spanId, attributes: moved });
    expect(came.attributes['pd.kv.bytes']).toBe(sent.attributes['pd.kv.bytes']);
    expect(one('pd.decode', 'pd-worker-consumer')!.parentSpanId).toBe(decoded!.spanId);
    expect(decoded!.attributes['gen_ai.usage.output_tokens']).toBe(4);
    for (const { startTimeUnixNano: from, endTimeUnixNano: to } of receiver.traceOf(traceId))
      expect(BigInt(to)).toBeGreaterThanOrEqual(BigInt(from));
  });

  it.each(['while its KV is handed over', 'in the middle of its answer'])(
    'loses nothing to a client that goes away %s',
    async (when) => {
      const since = workers.map(({ program }) => program.lines.length);
      const client = new AbortController();
      // Far more tokens than the machine can make until this process has seen what it waits for.
      const many = { max_tokens: 1_500, ignore_eos: true, stream: true };
      const asked = fetch(`${proxy.url}/v1/completions`, {
        method: 'POST',
        headers: { 'content-type': 'application/json' },
        body: JSON.stringify({ ...CAPITAL, ...many, model: 'demo', prompt: `${when} ${STORY.repeat(20)}` }),
        signal: client.signal,
      });
      const whole = asked.then(async (answer) => {
        expect(answer.status).toBe(200);
        for await (const _ of answer.body!) if (when.includes('answer')) client.abort();
      });
      const gone = expect(whole).rejects.toThrow('aborted');
      if (when.includes('KV')) {
        for (const [i, { program }] of workers.slice(0, 2).entries())
          await program.line(/request handed to the core/, 60_000, since[i]);
        client.abort();
      }
      await gone;
      expect((await complete(proxy.url, CAPITAL)).text).toContain('Paris');
    },
  );

  it('keeps nothing', async () => {
    for (const { url } of workers.slice(0, 2)) {
      let state: CoreState | undefined;
      await eventually('books at zero', 60_000, async () => {
        state = ((await (await fetch(`${url}/debug/state`)).json()) as { core?: CoreState }).core;
        if (!state) return false; // not within two seconds
        const { wants, grants } = state.handOver!;
        return (
          state.blocks.used + wants.waiting + wants.quarantined + grants.requests + grants.launches === 0
        );
      });
      expect(state).toMatchObject({ running: 0, waiting: 0, loading: 0, integrity: [] });
    }
  });
});
