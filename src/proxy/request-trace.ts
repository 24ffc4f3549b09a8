/** The spans of a request at the proxy, made of its receipt. Loaded only where traces are asked for. */
import type { ProxyConfig } from '../config/proxy-config.ts';
import type { Logger } from '../observability/log.ts';
import {
  type InnerSpan,
  newSpanId,
  type Span,
  type SpanResult,
  type TraceContext,
  Tracing,
  traceparentOf,
} from '../observability/tracing.ts';
import type { ProxyMetrics } from './metrics.ts';
import type { AttemptReceipt, AttemptSpans, Receipt } from './receipts.ts';
import type { Instance, InstanceRole } from './registry.ts';

/** What OpenTelemetry calls what a route does. */
const OPERATIONS: Readonly<Record<string, string>> = {
  '/v1/completions': 'text_completion',
  '/v1/chat/completions': 'chat',
  '/v1/responses': 'chat',
};

export class RequestTraces {
  readonly #tracing: Tracing;

  constructor(tracing: Tracing) {
    this.#tracing = tracing;
  }

  static open(
    { otlpEndpoint }: ProxyConfig,
    metrics: Pick<ProxyMetrics, 'traceSpans'>,
    log: Logger,
  ): RequestTraces {
    const count = (result: SpanResult, spans: number) => metrics.traceSpans.inc({ result }, spans);
    return new RequestTraces(new Tracing({ endpoint: otlpEndpoint!, service: 'pd-proxy', log, count }));
  }

  begin(headers: Parameters<Tracing['begin']>[0]): TraceContext | undefined {
    return this.#tracing.begin(headers);
  }

  attempt(): AttemptSpans {
    return { producer: newSpanId(), consumer: newSpanId() };
  }

  /** What the instance is told, in place of what the client sent. */
  headers(trace: TraceContext, spanId: string): Record<string, string> {
    return {
      traceparent: traceparentOf(trace, spanId),
      ...(trace.state !== undefined && { tracestate: trace.state }),
    };
  }

  ended(receipt: Receipt): void {
    if (receipt.trace) this.#tracing.add(receipt.trace, spansOf(receipt, receipt.trace));
  }

  close(): Promise<void> {
    return this.#tracing.close();
  }
}

export function spansOf(receipt: Receipt, { spanId, parentId }: TraceContext): readonly Span[] {
  const { route, receivedAt, readAt, placedAt, endedAt, queuedMs, status, code, attempts } = receipt;
  const root: Span = {
    id: spanId,
    parentId,
    name: `POST ${route}`,
    kind: 'server',
    from: receivedAt,
    to: endedAt,
    attributes: {
      'http.request.method': 'POST',
      'http.route': route,
      'http.response.status_code': status,
      'gen_ai.operation.name': OPERATIONS[route],
      'gen_ai.request.model': receipt.model,
      'error.type': code ?? (status >= 500 ? String(status) : undefined),
      'pd.request_id': receipt.id,
      'pd.key': receipt.holder,
      'pd.prompts': receipt.prompts,
      'pd.prompt_tokens': receipt.promptTokens,
      'pd.prompt_tokens_counted': receipt.tokensKnown,
      'pd.attempts': attempts.length,
    },
    error: status >= 500 ? (attempts.at(-1)?.failure ?? code ?? `status ${status}`) : undefined,
  };
  const own = (span: InnerSpan): Span => ({ id: newSpanId(), parentId: spanId, kind: 'internal', ...span });
  const turnAt = placedAt > 0 ? readAt + queuedMs : endedAt;
  return [
    root,
    ...(readAt > 0 ? [own({ name: 'pd.queue', from: readAt, to: turnAt })] : []),
    ...(placedAt > 0
      ? [own({ name: 'pd.placement', from: turnAt, to: placedAt, attributes: placementOf(attempts[0]) })]
      : []),
    ...attempts.flatMap((attempt, at) => attemptSpans(attempt, at, spanId)),
  ];
}

function placementOf(attempt: AttemptReceipt | undefined): InnerSpan['attributes'] {
  if (!attempt) return {};
  const { choices, alone } = attempt.placement;
  return {
    'pd.alone': alone,
    'pd.policy.producer': choices.producer?.policy,
    'pd.policy.consumer': choices.consumer?.policy,
    'pd.considered.producer': choices.producer?.considered,
    'pd.considered.consumer': choices.consumer?.considered,
  };
}

function attemptSpans(attempt: AttemptReceipt, number: number, parentId: string): Span[] {
  const { requestId, placement, native, overlapped, at, refusedBy, failure, spans } = attempt;
  const { pair, alone, cachedTokens } = placement;
  const span = (role: InstanceRole, name: string, from: number, to: number): Span[] => {
    if (from === 0) return [];
    const instance = pair[role];
    return [
      {
        id: spans![role],
        parentId,
        name,
        kind: 'client',
        from,
        to,
        attributes: {
          'server.address': instance.http.host,
          'server.port': instance.http.port,
          'pd.attempt': number,
          'pd.attempt_id': requestId,
          ...pairOf(pair),
          'pd.wire': alone ? undefined : native ? 'native' : 'frozen',
          'pd.asked_early': overlapped,
          'pd.cached_tokens': cachedTokens[role],
          'pd.ms_to_first_event': role === 'consumer' && at.relayed > 0 ? at.relayed - from : undefined,
        },
        // Of a pair that failed as a whole, where nobody is known to be at fault, the one that was to answer the client.
        error: (refusedBy ?? 'consumer') === role ? failure : undefined,
      },
    ];
  };
  return [
    ...span('producer', 'pd.prefill', at.prefill, at.prefilled || at.end),
    ...span('consumer', 'pd.decode', at.decode, at.end),
  ];
}

function pairOf({ producer, consumer }: Readonly<Record<InstanceRole, Instance>>) {
  return { 'pd.producer': producer.zmqAddress, 'pd.consumer': consumer.zmqAddress };
}
