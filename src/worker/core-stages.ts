/** What the core thread remembers of the latest requests: when they passed which stage, and what came or went of their KV. */
import type { LoadOutcome } from '../connector/connector.ts';
import type { ConnectorMetadata } from '../connector/metadata.ts';
import { formatHostPort } from '../net/address.ts';
import { monotonicMs, type Timeline, type Timelines } from '../observability/timelines.ts';
import type { StepEntry } from '../scheduler/step.ts';
import type { CoreRequest, RequestOutput } from '../scheduler/types.ts';
import type { EngineRequestId, TransferId } from '../wire/ids.ts';
import type { CoreStage } from './core-messages.ts';

export class CoreStages {
  readonly #timelines: Timelines<CoreStage>;
  /** Bytes of a block, all layers. */
  readonly #blockBytes: number;
  /** By which KV travels on pairs. */
  readonly #pairs: 'host' | 'nccl';
  /** Requests without an output so far. */
  readonly #unanswered = new Map<EngineRequestId, TransferId>();

  /** The hand-over stamps the same `timelines`. */
  constructor(timelines: Timelines<CoreStage>, blockBytes: number, pairs: 'host' | 'nccl') {
    this.#timelines = timelines;
    this.#blockBytes = blockBytes;
    this.#pairs = pairs;
  }

  received({ requestId, transferId }: CoreRequest): void {
    this.#timelines.begin(transferId, 'received');
    this.#unanswered.set(requestId, transferId);
  }

  /** Of prompts. */
  stepped(entries: readonly StepEntry[], stage: 'step' | 'drawn'): void {
    if (entries.length === 0) return;
    const at = monotonicMs();
    for (const { sequence, numTokens } of entries) {
      if (!sequence.isLeader) continue;
      const tokens = stage === 'step' ? numTokens : undefined;
      this.#timelines.stamp(sequence.group.request.transferId, stage, at, tokens);
    }
  }

  /** What the connector is told to move. */
  moving({ loads, wants, fills }: ConnectorMetadata): void {
    for (const { transferId, peer } of loads) {
      const told = { wire: 'frozen', transport: this.#pairs, kv_from: formatHostPort(peer) };
      this.#timelines.stamp(transferId, 'loading');
      this.#timelines.note(transferId, told);
    }
    for (const { transferId, peer } of wants)
      this.#timelines.note(transferId, { wire: 'native', kv_from: formatHostPort(peer) });
    for (const { transferId, numComputed, numTokens } of fills)
      if (numComputed >= numTokens) this.#timelines.note(transferId, { wire: 'native' });
  }

  /** KV of these prompts has been sent, gathered or kept, as the send type has it. */
  saved(saves: ConnectorMetadata['saves']): void {
    for (const { transferId, peer, blockIds } of saves) {
      this.#timelines.stamp(transferId, 'saved');
      this.#timelines.note(transferId, {
        wire: 'frozen',
        transport: this.#pairs,
        kv_to: formatHostPort(peer),
        kv_bytes: blockIds.length * this.#blockBytes,
      });
    }
  }

  loaded(outcome: LoadOutcome): void {
    const id = this.#unanswered.get(outcome.requestId);
    if (id === undefined) return;
    this.#timelines.stamp(id, 'load ended');
    if (outcome.ok) {
      const ms = Math.round(outcome.milliseconds * 1_000) / 1_000;
      this.#timelines.note(id, { kv_bytes: outcome.bytes, load_ms: ms });
    } else this.#timelines.note(id, { kv_error: outcome.error.code });
  }

  posted(outputs: readonly RequestOutput[]): void {
    for (const { requestId, promptSource } of outputs) {
      const id = this.#unanswered.get(requestId);
      if (id === undefined) continue;
      this.#unanswered.delete(requestId);
      this.#timelines.stamp(id, 'posted');
      if (!promptSource) continue;
      const { computed, loaded, cached } = promptSource;
      this.#timelines.note(id, { computed_tokens: computed, loaded_tokens: loaded, cached_tokens: cached });
    }
  }

  /** Of those of these requests that are known. */
  of(transferIds: readonly TransferId[]): readonly Timeline<CoreStage>[] {
    return transferIds.flatMap((id) => this.#timelines.get(id) ?? []);
  }

  recent(): readonly Timeline<CoreStage>[] {
    return this.#timelines.recent();
  }
}
