import { describe, expect, test } from 'vitest';
import { createLogger } from '../../../src/observability/log.ts';
import { parseTraceparent, Tracing, traceparentOf } from '../../../src/observability/tracing.ts';

const TRACE = '4bf92f3577b34da6a3ce929d0e0e4736';
const PARENT = '00f067aa0ba902b7';
const tracing = new Tracing({
  endpoint: 'http://127.0.0.1:9',
  service: 'test',
  log: createLogger({ level: 'silent', format: 'json' }, 'test'),
  count: () => {},
  env: {},
});

describe('a trace context', () => {
  test.each([
    ['sampled', `00-${TRACE}-${PARENT}-01`, { traceId: TRACE, parentId: PARENT, sampled: true }],
    ['not sampled', `00-${TRACE}-${PARENT}-00`, { traceId: TRACE, parentId: PARENT, sampled: false }],
    [
      'of a later version',
      `cc-${TRACE}-${PARENT}-03-more`,
      { traceId: TRACE, parentId: PARENT, sampled: true },
    ],
    ['that says more than its version knows', `00-${TRACE}-${PARENT}-01-more`, undefined],
    ['of the version that is none', `ff-${TRACE}-${PARENT}-01`, undefined],
    ['without a trace', `00-${'0'.repeat(32)}-${PARENT}-01`, undefined],
    ['without a parent', `00-${TRACE}-${'0'.repeat(16)}-01`, undefined],
    ['in capitals', `00-${TRACE.toUpperCase()}-${PARENT}-01`, undefined],
    ['cut off', `00-${TRACE}-${PARENT}`, undefined],
    ['twice', [`00-${TRACE}-${PARENT}-01`, `00-${TRACE}-${PARENT}-01`], undefined],
    ['that is missing', undefined, undefined],
  ])('%s', (_, header, expected) => {
    expect(parseTraceparent(header)).toEqual(expected);
  });

  test("of a caller is gone on with, under a span of its own and with others' state", () => {
    const begun = tracing.begin({ traceparent: `00-${TRACE}-${PARENT}-01`, tracestate: 'a=1' });
    expect(begun).toMatchObject({ traceId: TRACE, parentId: PARENT, state: 'a=1' });
    expect(begun!.spanId).toMatch(/^[0-9a-f]{16}$/);
    expect(traceparentOf(begun!, begun!.spanId)).toBe(`00-${TRACE}-${begun!.spanId}-01`);
  });

  test('of a caller that does not record is left alone', () => {
    expect(tracing.begin({ traceparent: `00-${TRACE}-${PARENT}-00` })).toBeUndefined();
  });

  test('is new where there is none, or one that cannot be read, whose state is not taken', () => {
    for (const traceparent of [undefined, 'nonsense']) {
      const begun = tracing.begin({ ...(traceparent && { traceparent }), tracestate: 'a=1' });
      expect(begun).toMatchObject({ parentId: undefined, state: undefined });
      expect(begun!.traceId).toMatch(/^[0-9a-f]{32}$/);
      expect(begun!.traceId).not.toBe(tracing.begin({})!.traceId);
    }
  });
});
