/**
 * Whose KV a request gets when ids look alike, by real workers asked without a proxy: the consumer is told to fail rather than compute a
 * prompt itself, so that a right answer means right KV.
 */
import { randomBytes } from 'node:crypto';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { demoModelDir } from '../../src/config/demo-model.ts';
import { parseHostPort } from '../../src/net/address.ts';
import type { PairState } from '../../src/transfer/types.ts';
import { proxyRequestId } from '../../src/wire/ids.ts';
import type { CoreState } from '../../src/worker/core-messages.ts';
import { kvBlockBytes, readKvShape } from '../../support/kv-shape.ts';
import { metricsOf, startWorker, type WorkerHandle } from '../support/cluster.ts';
import { eventually } from '../support/requests.ts';
import { rows } from '../support/rows.ts';

const FRANCE = 'What is the capital of France?';
const ITALY = 'What is the capital of Italy?';

describe.each(rows(['PUT_ASYNC'], ['GET']))('%s, ids not randomized', (sendType) => {
  let producer: WorkerHandle;
  let consumer: WorkerHandle;

  beforeAll(async () => {
    const args = [
      ...['--send-type', sendType, '--kv-load-failure', 'fail', '--no-randomize-request-ids'],
      // What nobody fetches here would be waited for.
      ...['--drain-timeout', '1s', '--debug-state'],
    ];
    [producer, consumer] = await Promise.all([
      startWorker('producer', undefined, args),
      startWorker('consumer', undefined, [...args, '--kv-load-timeout', '1s']),
    ]);
    // Whoever announces takes a listener that has not greeted it within 300 ms for one that knows no prompts by their digest.
    const id = newId();
    await prefill(id, FRANCE);
    await decode(id, FRANCE);
    await eventually('the two know each other', 60_000, async () => {
      const pairs = await Promise.all([producer, consumer].map(pairsOf));
      return pairs.flat().some(({ direction, native }) => direction === 'outgoing' && native);
    });
  });
  afterAll(async () => {
    await Promise.all([producer, consumer].map(({ program }) => program.stop()));
  });

  /** As a proxy would make it. */
  const newId = () => {
    const [prefill, decode] = [producer, consumer].map(({ kvAddress }) => parseHostPort(kvAddress));
    return proxyRequestId(prefill!, decode!, randomBytes(16).toString('hex'));
  };
  const prefill = (id: string, question: string) => ask(producer, id, question, 1);
  const decode = (id: string, question: string, patient = true) => ask(consumer, id, question, 8, patient);

  it('a request never gets the KV of another prompt, by its own id or one with something behind, and the rightful one does', async () => {
    const prefix = newId();
    const other = newId();
    const loads = async () => (await metricsOf(consumer)).get('pd_kv_loads_total{result="ok"}')!;
    const before = await loads();
    await Promise.all([prefill(`${prefix}-bbbbbbbb`, ITALY), prefill(other, ITALY)]);
    const [wrong, stale] = await Promise.all([
      decode(`${prefix}-aaaaaaaa`, FRANCE, false),
      decode(other, FRANCE, false), // the very id, and another prompt
    ]);
    expect(wrong).toMatchObject({ status: 504, code: 'KV_LOAD_TIMEOUT' });
    expect(stale.status).toBeGreaterThanOrEqual(500);
    expect(stale.text).toBeUndefined();
    expect(await decode(`${prefix}-bbbbbbbb`, ITALY)).toMatchObject({ status: 200 });
    expect((await loads()) - before).toBe(1);
  });

  it('an id that is given to another prompt brings the KV of that prompt, or none', async () => {
    const id = newId();
    const received = async () => (await metricsOf(consumer)).get('pd_kv_received_bytes_total') ?? 0;
    const before = await received();
    const { promptTokens = 0 } = await prefill(id, ITALY);
    const shape = readKvShape(demoModelDir(), 4, 16);
    const bytes = sendType === 'GET' ? 0 : kvBlockBytes(shape) * Math.ceil(promptTokens / shape.blockSize);
    await eventually('KV of Italy', 60_000, async () => (await received()) >= before + bytes);
    // Nobody has come for it; now the same id is France's.
    await prefill(id, FRANCE);
    const answer = await decode(id, FRANCE);
    expect(answer.status).toBe(200);
    const fresh = newId();
    await prefill(fresh, FRANCE);
    expect(answer.text).toBe((await decode(fresh, FRANCE)).text);
  });
});

async function pairsOf({ url }: WorkerHandle): Promise<readonly PairState[]> {
  const { core } = (await (await fetch(`${url}/debug/state`)).json()) as { core?: CoreState };
  return core?.transfer?.pairs ?? [];
}

async function ask({ url }: WorkerHandle, id: string, question: string, maxTokens: number, patient = false) {
  const response = await fetch(`${url}/v1/chat/completions`, {
    method: 'POST',
    headers: {
      'content-type': 'application/json',
      'x-request-id': id,
      // Added to the deadline of its KV where that is to come, as for a prompt that may still be being computed.
      ...(patient && { 'x-pd-prefill-within': '60000' }),
    },
    body: JSON.stringify({
      messages: [{ role: 'user', content: question }],
      max_tokens: maxTokens,
      temperature: 0,
    }),
  });
  const body = (await response.json()) as {
    readonly choices?: readonly { readonly message: { readonly content: string } }[];
    readonly usage?: { readonly prompt_tokens: number };
    readonly error?: { readonly code: string; readonly message: string };
  };
  const text = body.choices?.[0]?.message.content;
  return { status: response.status, text, promptTokens: body.usage?.prompt_tokens, ...body.error };
}
