/** What the page at /ui (ui.ts) is told: the fleet and the latest requests, first whole, then what has changed. Pure. */
import type { BreakerState } from './breaker.ts';
import type { PromptCaches } from './caches.ts';
import type { AttemptReceipt, Receipt } from './receipts.ts';
import type { Instance, InstanceRegistry, InstanceRole } from './registry.ts';

/** Requests that the page is told of. */
export const MOST_UI_REQUESTS = 256;
/** Pings come every three. */
const OVERDUE_SECONDS = 5;

export interface UiProxy {
  readonly status: 'ok' | 'draining';
  readonly version: string;
  /** Milliseconds since 1970. */
  readonly startedAt: number;
  /** Requests under way, and those of them that wait for their turn. */
  readonly running: number;
  readonly queued: number;
  /** There are a producer and a consumer that fit each other. */
  readonly paired: boolean;
  /** Requests that are remembered. */
  readonly kept: number;
}

export interface UiInstance {
  /** Of its HTTP server. */
  readonly address: string;
  readonly kvAddress: string;
  readonly role: InstanceRole;
  /** The checkpoint's; null for a vLLM worker. */
  readonly model: string | null;
  /** Ids that it serves; null until known. */
  readonly models: readonly string[] | null;
  readonly sendType: string | null;
  /** It speaks the native hand-over. */
  readonly native: boolean;
  readonly tls: boolean;
  /** Requests there, and prompt tokens to be computed, as the proxy takes them to be. */
  readonly requests: number;
  readonly queuedTokens: number;
  /** Share of its KV cache that is in use, 0 to 1, and its blocks; null where it does not tell. */
  readonly kvUse: number | null;
  readonly kvBlocks: number | null;
  /** Blocks that it has said it has cached; null where it does not tell. */
  readonly cachedBlocks: number | null;
  readonly breaker: BreakerState;
  readonly draining: boolean;
  /** It refused a connection, and has not pinged since. */
  readonly refused: boolean;
  /** Whole seconds since its last ping, where that is overdue; else 0. */
  readonly silentSeconds: number;
}

/** In the order in which a request passes them. `retry`: attempts with pairs of which one did not take it. */
export type UiStage = 'queue' | 'placement' | 'retry' | 'prefill' | 'hand-over' | 'decode';

export interface UiAttempt {
  readonly producer: string;
  readonly consumer: string;
  readonly refusedBy: InstanceRole | null;
  readonly failure: string | null;
}

export interface UiRequest {
  readonly id: string;
  readonly route: string;
  readonly model: string | null;
  /** When it came, milliseconds since 1970. */
  readonly at: number;
  readonly promptTokens: number;
  /** They were counted, not guessed. */
  readonly tokensKnown: boolean;
  /** With when each began and ended, in milliseconds since it came; null: not yet. */
  readonly stages: readonly (readonly [UiStage, from: number, to: number | null])[];
  /** The last is what came of it. */
  readonly attempts: readonly UiAttempt[];
  /** How its pair handed KV over; `none`: the consumer computed the prompt itself. */
  readonly wire: 'native' | 'frozen' | 'none';
  /** Its consumer was asked while the producer was at work. */
  readonly overlapped: boolean;
  /** HTTP status; 499: the client went away. 0 while it is under way. */
  readonly status: number;
  readonly code: string | null;
}

export interface UiSnapshot {
  readonly proxy: UiProxy;
  readonly instances: readonly UiInstance[];
  /** The latest last. */
  readonly requests: readonly UiRequest[];
}

/** An event of /ui/events: everything (`state`), or what is new or has changed since the last (`change`). */
export interface UiMessage {
  /** The proxy's clock, milliseconds since 1970. */
  readonly now: number;
  readonly proxy?: UiProxy;
  readonly instances?: readonly UiInstance[];
  /** Addresses of instances that are there no more. */
  readonly gone?: readonly string[];
  readonly requests?: readonly UiRequest[];
}

/** As the proxy takes it to be: what the instance tells, and what it has been given since. */
export function uiInstance(instance: Instance, registry: InstanceRegistry, caches: PromptCaches): UiInstance {
  const { httpAddress: address, load } = instance;
  const work = registry.standing(instance)?.work;
  const silentSeconds = Math.floor(registry.age(instance) / 1_000);
  return {
    address,
    kvAddress: instance.zmqAddress,
    role: instance.role,
    model: instance.fingerprint?.model ?? null,
    models: instance.models ?? null,
    sendType: instance.sendType ?? null,
    native: instance.native ?? false,
    tls: instance.tls ?? false,
    requests: work?.requests ?? 0,
    queuedTokens: Math.round(work?.queuedTokens ?? 0),
    kvUse: load && work ? Math.round(work.kvUse * 1_000) / 1_000 : null,
    kvBlocks: load?.kvBlocks ?? null,
    cachedBlocks: caches.blocksOf(address) ?? null,
    breaker: registry.standing(instance)?.breaker.state ?? 'closed',
    draining: registry.standing(instance)?.draining ?? false,
    refused: registry.quarantined(instance),
    silentSeconds: silentSeconds >= OVERDUE_SECONDS ? silentSeconds : 0,
  };
}

export function uiRequest(receipt: Receipt): UiRequest {
  const { attempts } = receipt;
  const last = attempts.at(-1);
  return {
    id: receipt.id,
    route: receipt.route,
    model: receipt.model ?? null,
    at: receipt.receivedEpochMs,
    promptTokens: receipt.promptTokens,
    tokensKnown: receipt.tokensKnown,
    stages: stagesOf(receipt),
    attempts: attempts.map(({ placement: { pair }, refusedBy, failure }) => ({
      producer: pair.producer.httpAddress,
      consumer: pair.consumer.httpAddress,
      refusedBy: refusedBy ?? null,
      failure: failure ?? null,
    })),
    wire: last?.placement.alone ? 'none' : last?.native ? 'native' : 'frozen',
    overlapped: last?.overlapped ?? false,
    status: receipt.endedAt > 0 ? receipt.status : 0,
    code: receipt.code ?? null,
  };
}

/**
 * One after the other, by the marks that `GET /v1/requests/ID/route` has too. What an answer that is not streamed takes after its prompt
 * has been computed is all `decode`: nothing is seen of its first token.
 */
function stagesOf({ receivedAt, readAt, placedAt, endedAt, queuedMs, attempts, streamed }: Receipt) {
  const begun: [UiStage, number][] = [['queue', receivedAt]];
  if (placedAt > 0) begun.push(['placement', readAt + queuedMs]);
  const [first, last] = [attempts[0], attempts.at(-1)];
  if (first && last !== first) begun.push(['retry', askedAt(first)]);
  if (last && askedAt(last) > 0) {
    begun.push(['prefill', askedAt(last)]);
    const { prefilled, decode, relayed } = last.at;
    const computed = prefilled > 0 && decode > 0 ? Math.max(prefilled, decode) : 0;
    if (computed > 0 && (relayed === 0 || computed < relayed))
      begun.push([streamed ? 'hand-over' : 'decode', computed]);
    if (relayed > 0) begun.push(['decode', relayed]);
  }
  const since = (ms: number) => Math.max(0, Math.round((ms - receivedAt) * 100) / 100);
  return begun.map(([stage, from], index): UiRequest['stages'][number] => {
    const to = begun[index + 1]?.[1] ?? endedAt;
    return [stage, since(from), to > 0 ? since(Math.max(from, to)) : null];
  });
}

function askedAt({ at: { prefill, decode } }: AttemptReceipt): number {
  return prefill > 0 && decode > 0 ? Math.min(prefill, decode) : Math.max(prefill, decode);
}

/** All watchers are told the same, so what each item was last is kept once, as JSON. */
export class UiState {
  #proxy = '';
  #instances = new Map<string, string>();
  #requests = new Map<string, string>();

  /** The change from the last snapshot as JSON; undefined where there is none. */
  update({ proxy, instances, requests }: UiSnapshot, now: number): string | undefined {
    const parts: string[] = [];
    const proxyText = JSON.stringify(proxy);
    if (proxyText !== this.#proxy) parts.push(`"proxy":${proxyText}`);
    this.#proxy = proxyText;

    const fleet = new Map(instances.map((instance) => [instance.address, JSON.stringify(instance)]));
    const gone = [...this.#instances.keys()].filter((address) => !fleet.has(address));
    if (gone.length > 0) parts.push(`"gone":${JSON.stringify(gone)}`);
    pushChanged(parts, 'instances', this.#instances, fleet);
    this.#instances = fleet;

    const latest = new Map(requests.map((request) => [request.id, JSON.stringify(request)]));
    pushChanged(parts, 'requests', this.#requests, latest);
    this.#requests = latest;
    return parts.length > 0 ? `{"now":${now},${parts.join()}}` : undefined;
  }

  /** The last snapshot as JSON. */
  whole(now: number): string {
    const list = (items: Map<string, string>) => `[${[...items.values()].join()}]`;
    const [instances, requests] = [list(this.#instances), list(this.#requests)];
    return `{"now":${now},"proxy":${this.#proxy},"instances":${instances},"requests":${requests}}`;
  }
}

function pushChanged(parts: string[], name: string, before: Map<string, string>, now: Map<string, string>) {
  const changed = [...now].filter(([key, text]) => before.get(key) !== text).map(([, text]) => text);
  if (changed.length > 0) parts.push(`"${name}":[${changed.join()}]`);
}
