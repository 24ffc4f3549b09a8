import { expect, test } from 'vitest';
import type { Facts, Timeline } from '../../../src/observability/timelines.ts';
import type { Span } from '../../../src/observability/tracing.ts';
import type { CoreStage } from '../../../src/worker/core-messages.ts';
import { spansOf, type TracedWorker } from '../../../src/worker/request-trace.ts';

const TRACE = { traceId: 'a'.repeat(32), parentId: 'b'.repeat(16), spanId: 'c'.repeat(16), state: undefined };

function traced(role: TracedWorker['role'], prompts: readonly Timeline<CoreStage>[]): readonly Span[] {
  const timeline = {
    id: 'cmpl-1',
    stages: [
      { stage: 'received', at: 100 },
      { stage: 'written', at: 150 },
      { stage: 'ended', at: 190 },
    ],
    facts: { prompt_tokens: 24, completion_tokens: 5 },
  } as const;
  const ended = { trace: TRACE, timeline, transferIds: [], model: 'm', failure: undefined };
  return spansOf({ ...ended, route: 'completions' }, prompts, { role, kvAddress: '10.0.0.1:1' });
}

/** `stage at [tokens]`. */
function prompt(text: string, facts: Facts): Timeline<CoreStage> {
  const stages = text.split(', ').map((one) => {
    const [, stage, at, tokens] = /^(.+?) (\d+)(?: \[(\d+)\])?$/.exec(one)!;
    return { stage: stage as CoreStage, at: Number(at), ...(tokens && { tokens: Number(tokens) }) };
  });
  return { id: 'cmpl-1-0', stages, facts };
}

const brief = (spans: readonly Span[]) =>
  spans.map(({ name, from, to, parentId }) => {
    const parent = spans.find(({ id }) => id === parentId)?.name ?? parentId;
    return `${name} ${from}-${to} in ${parent}`;
  });

test('a producer that fills its consumer chunk by chunk', () => {
  const spans = traced('producer', [
    prompt(
      'received 101, step 110 [16], bound 112, step 120 [8], launched 125, drawn 130, posted 131, landed 133',
      {
        computed_tokens: 24,
        loaded_tokens: 0,
        cached_tokens: 0,
        wire: 'native',
        transport: 'direct',
        kv_bytes: 4_096,
        kv_to: '10.0.0.2:1',
      },
    ),
  ]);
  const root = 'POST /v1/completions';
  expect(brief(spans)).toEqual([
    `${root} 100-190 in ${TRACE.parentId}`,
    `pd.queue 101-110 in ${root}`,
    `pd.prefill 110-130 in ${root}`,
    'pd.prefill.chunk 110-120 in pd.prefill',
    'pd.prefill.chunk 120-130 in pd.prefill',
    `pd.hand_over 112-133 in ${root}`,
  ]);
  expect(spans[0]!.attributes).toMatchObject({
    'gen_ai.operation.name': 'text_completion',
    'gen_ai.usage.input_tokens': 24,
    'gen_ai.usage.output_tokens': 5,
  });
  expect(spans[3]!.attributes).toMatchObject({ 'pd.chunk': 0, 'pd.tokens': 16 });
  expect(spans.at(-1)!.attributes).toMatchObject({
    'pd.kv.transport': 'direct',
    'pd.kv.bytes': 4_096,
    'pd.kv.from': '10.0.0.1:1',
    'pd.kv.to': '10.0.0.2:1',
    'pd.kv.tokens': 24,
  });
});

test('a consumer that computes nothing', () => {
  const spans = traced('consumer', [
    prompt('received 101, wanted 103, asked 104, loaded 140, load ended 141, posted 142', {
      wire: 'native',
      kv_from: '10.0.0.2:1',
      loaded_tokens: 24,
    }),
  ]);
  expect(brief(spans).slice(1)).toEqual([
    'pd.queue 101-103 in POST /v1/completions',
    'pd.hand_over 103-141 in POST /v1/completions',
    'pd.decode 142-190 in POST /v1/completions',
  ]);
  expect(spans[2]!.attributes).toMatchObject({
    'pd.kv.from': '10.0.0.2:1',
    'pd.kv.to': '10.0.0.1:1',
    'pd.kv.tokens': 24,
  });
});

test('by the frozen wire, at either end', () => {
  const sent = traced('producer', [
    prompt('received 101, step 110 [24], drawn 130, saved 138, posted 139', { wire: 'frozen' }),
  ]);
  expect(brief(sent).at(-1)).toBe('pd.hand_over 130-138 in POST /v1/completions');
  const came = traced('consumer', [
    prompt('received 101, loading 102, load ended 120, step 121 [1], drawn 122, posted 123', {
      wire: 'frozen',
      kv_error: 'KV_LOAD_TIMEOUT',
    }),
  ]);
  const failed = came.find(({ name }) => name === 'pd.hand_over');
  expect(failed).toMatchObject({ from: 102, to: 120, error: 'KV_LOAD_TIMEOUT' });
});

test('without a word from the core there is the request, and of several prompts each has its number', () => {
  expect(brief(traced('both', []))).toEqual([`POST /v1/completions 100-190 in ${TRACE.parentId}`]);
  const one = prompt('received 101, step 102 [3], drawn 103, posted 104', {});
  const numbers = traced('both', [one, one]).map(({ attributes }) => attributes?.['pd.prompt']);
  expect(numbers).toEqual([undefined, 0, 0, 0, 0, 1, 1, 1, 1]);
});
