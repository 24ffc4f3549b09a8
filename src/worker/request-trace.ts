/**
 * The spans of a request at a worker, made of what its threads remember of it. Loaded only where traces are asked for.
 *
 *   POST /v1/...                                    main thread
 *     pd.queue, pd.prefill, pd.hand_over, pd.decode   core thread, of each prompt
 *       pd.prefill.chunk                              of pd.prefill, one a step
 */
import type { WorkerConfig } from '../config/worker-config.ts';
import { PdError } from '../errors.ts';
import type { Logger } from '../observability/log.ts';
import type { MetricsPage } from '../observability/metrics.ts';
import type { Timeline } from '../observability/timelines.ts';
import {
  type InnerSpan,
  newSpanId,
  type Span,
  type TraceContext,
  Tracing,
} from '../observability/tracing.ts';
import type { TransferId } from '../wire/ids.ts';
import type { CoreClient } from './core-client.ts';
import type { CoreStage } from './core-messages.ts';
import { type AnswerStage, GENERATION_ROUTES, type GenerationRoute } from './server/in-flight.ts';

/** A request that is over. */
export interface EndedRequest {
  readonly trace: TraceContext;
  readonly route: GenerationRoute;
  /** As the main thread saw it, to its end. */
  readonly timeline: Timeline<AnswerStage>;
  /** Of its prompts. */
  readonly transferIds: readonly TransferId[];
  readonly model: string | undefined;
  readonly failure: PdError | undefined;
}

/** Whose spans they are. */
export interface TracedWorker {
  readonly role: WorkerConfig['role'];
  /** `host:port` of its ROUTER. */
  readonly kvAddress: string | undefined;
}

/** KV may land a little after the answer. */
const LINGER_MS = 500;
/** Requests whose core stages are asked for together; the core remembers 256. */
const MOST_LINGERING = 64;

const PATHS = Object.fromEntries(
  Object.entries(GENERATION_ROUTES).map(([path, route]) => [route, path]),
) as Readonly<Record<GenerationRoute, string>>;
const OPERATIONS = { completions: 'text_completion', chat: 'chat', responses: 'chat' } as const;

export class WorkerTraces {
  readonly #tracing: Tracing;
  readonly #core: Pick<CoreClient, 'timelines'>;
  readonly #worker: TracedWorker;
  readonly #log: Logger;
  readonly #lingering: EndedRequest[] = [];
  #timer: NodeJS.Timeout | undefined;
  #telling: Promise<void> = Promise.resolve();

  constructor(tracing: Tracing, core: Pick<CoreClient, 'timelines'>, worker: TracedWorker, log: Logger) {
    this.#tracing = tracing;
    this.#core = core;
    this.#worker = worker;
    this.#log = log;
  }

  static open(
    { otlpEndpoint, role }: WorkerConfig,
    core: Pick<CoreClient, 'timelines' | 'info'>,
    metrics: MetricsPage,
    log: Logger,
  ): WorkerTraces {
    const { kvAddress } = core.info;
    const tracing = new Tracing({
      endpoint: otlpEndpoint!,
      service: `pd-worker-${role}`,
      resource: { 'pd.role': role, 'pd.kv_address': kvAddress },
      log,
      count: (result, spans) => metrics.inc('pd_trace_spans_total', spans, result),
    });
    return new WorkerTraces(tracing, core, { role, kvAddress }, log);
  }

  begin(headers: Parameters<Tracing['begin']>[0]): TraceContext | undefined {
    return this.#tracing.begin(headers);
  }

  /** Returns at once. */
  ended(request: EndedRequest): void {
    this.#lingering.push(request);
    if (this.#lingering.length >= MOST_LINGERING) this.#tell();
    else this.#timer ??= setTimeout(() => this.#tell(), LINGER_MS).unref();
  }

  /** Before the core ends: its last requests have not been asked for. */
  async close(): Promise<void> {
    this.#tell();
    await this.#telling;
    await this.#tracing.close();
  }

  #tell(): void {
    clearTimeout(this.#timer);
    this.#timer = undefined;
    const requests = this.#lingering.splice(0);
    if (requests.length > 0) this.#telling = this.#telling.then(() => this.#add(requests));
  }

  /** Never rejects. */
  async #add(requests: readonly EndedRequest[]): Promise<void> {
    const prompts = new Map<string, Timeline<CoreStage>>();
    try {
      for (const one of await this.#core.timelines(requests.flatMap(({ transferIds }) => transferIds)))
        prompts.set(one.id, one);
    } catch (error) {
      this.#log.debug(`traces without the core: ${PdError.from(error).message}`);
    }
    for (const request of requests) {
      const known = request.transferIds.flatMap((id) => prompts.get(id) ?? []);
      this.#tracing.add(request.trace, spansOf(request, known, this.#worker));
    }
  }
}

/** `prompts`: of those that the core knows. */
export function spansOf(
  { trace, route, timeline, model, failure }: EndedRequest,
  prompts: readonly Timeline<CoreStage>[],
  worker: TracedWorker,
): readonly Span[] {
  const { stages, facts = {} } = timeline;
  const [from, to] = [stages[0]!.at, stages.at(-1)!.at];
  const code = failure?.code ?? facts['error'];
  const root: Span = {
    id: trace.spanId,
    parentId: trace.parentId,
    name: `POST ${PATHS[route]}`,
    kind: 'server',
    from,
    to,
    attributes: {
      'http.request.method': 'POST',
      'http.route': PATHS[route],
      'http.response.status_code': failure?.status ?? 200,
      'gen_ai.operation.name': OPERATIONS[route],
      'gen_ai.request.model': model,
      'gen_ai.response.id': timeline.id,
      'gen_ai.usage.input_tokens': facts['prompt_tokens'],
      'gen_ai.usage.output_tokens': facts['completion_tokens'],
      'error.type': code,
      'pd.role': worker.role,
    },
    error: code === undefined ? undefined : (failure?.message ?? String(code)),
  };
  const several = prompts.length > 1;
  return [
    root,
    ...prompts.flatMap((prompt, at) => promptSpans(root, prompt, several ? at : undefined, worker)),
  ];
}

type Stages = Timeline<CoreStage>['stages'];

function promptSpans(
  root: Span,
  { stages, facts = {} }: Timeline<CoreStage>,
  number: number | undefined,
  worker: TracedWorker,
): Span[] {
  const spans: Span[] = [];
  const add = ({ attributes, ...span }: InnerSpan, parentId = root.id): string => {
    const id = newSpanId();
    const own = { ...attributes, 'pd.prompt': number };
    spans.push({ id, parentId, kind: 'internal', ...span, attributes: own });
    return id;
  };
  const at = (...wanted: readonly CoreStage[]) => stages.find(({ stage }) => wanted.includes(stage))?.at;
  const begun = at('step', 'wanted', 'loading');
  const [received, posted] = [stages[0]!.at, at('posted')];
  add({ name: 'pd.queue', from: received, to: begun ?? posted ?? root.to });
  const steps = stages.filter(({ stage }) => stage === 'step');
  const drawn = at('drawn') ?? posted ?? root.to;
  if (steps.length > 0) {
    const prefill = add({
      name: 'pd.prefill',
      from: steps[0]!.at,
      to: drawn,
      attributes: {
        'pd.computed_tokens': facts['computed_tokens'],
        'pd.cached_tokens': facts['cached_tokens'],
        'pd.loaded_tokens': facts['loaded_tokens'],
        'pd.chunks': steps.length,
      },
    });
    for (const [i, { at: from, tokens }] of steps.entries()) {
      const attributes = { 'pd.chunk': i, 'pd.tokens': tokens };
      add({ name: 'pd.prefill.chunk', from, to: steps[i + 1]?.at ?? drawn, attributes }, prefill);
    }
  }
  const moved = handedOver(stages, facts['wire'] === 'frozen', root.to);
  if (moved) {
    const { kv_from, kv_to, kv_error } = facts;
    const tokens = Number(facts['computed_tokens'] ?? 0) + Number(facts['cached_tokens'] ?? 0);
    add({
      name: 'pd.hand_over',
      ...moved,
      attributes: {
        'pd.kv.wire': facts['wire'],
        'pd.kv.transport': facts['transport'],
        'pd.kv.bytes': facts['kv_bytes'],
        'pd.kv.from': kv_from ?? worker.kvAddress,
        'pd.kv.to': kv_to ?? worker.kvAddress,
        'pd.kv.tokens': worker.role === 'consumer' ? facts['loaded_tokens'] : tokens,
      },
      error: kv_error === undefined ? undefined : String(kv_error),
    });
  }
  if (worker.role !== 'producer' && posted !== undefined)
    add({ name: 'pd.decode', from: posted, to: root.to });
  return spans;
}

/** When the KV was on its way, at this end; undefined: none was. */
function handedOver(stages: Stages, frozen: boolean, end: number): Pick<Span, 'from' | 'to'> | undefined {
  const at = (...wanted: readonly CoreStage[]) => stages.findLast(({ stage }) => wanted.includes(stage))?.at;
  const asked = at('wanted', 'loading');
  if (asked !== undefined) return { from: asked, to: at('load ended') ?? end };
  const bound = at('bound');
  if (bound !== undefined) return { from: bound, to: at('landed') ?? end };
  const saved = frozen ? at('saved') : undefined;
  return saved === undefined ? undefined : { from: at('drawn') ?? saved, to: saved };
}
