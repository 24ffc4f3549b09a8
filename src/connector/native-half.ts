/** What of the worker side belongs to the native hand-over: prompts that are filled from here, prompts that are wanted here, and leases. */
import type { EventRef } from '../device/device.ts';
import { formatHostPort, type HostPort } from '../net/address.ts';
import type { FirstTokens, HandOverApi } from '../transfer/native/hand-over-api.ts';
import type { EngineRequestId, TransferId } from '../wire/ids.ts';
import type { FinishedRequest, LoadOutcome } from './connector.ts';
import type { ConnectorMetadata, FillMeta, WantMeta } from './metadata.ts';

/** A block manager, as far as it keeps blocks for other processes (kv/block-manager.ts is one). */
export interface SharedBlocks {
  /** Blocks that nobody has. */
  readonly numFree: number;
  /** These blocks have owners, and are taken by nobody else until as many `unhold`, whatever becomes of those. */
  hold(blocks: readonly number[]): void;
  unhold(blocks: readonly number[]): void;
  /** Another process may write to these blocks of one request until `retract`: they go to nobody else meanwhile. */
  expose(key: string, blocks: readonly number[]): void;
  retract(key: string): void;
  /** The blocks of a prompt stay until `endLease`, whatever becomes of its request. */
  lease(key: string, blocks: readonly number[]): void;
  /** Does nothing where there is none. */
  endLease(key: string): void;
}

/** The native hand-over of a worker, and the blocks that it keeps for other processes. */
export interface NativeParts {
  readonly handOver: HandOverApi;
  readonly blocks: SharedBlocks;
  /** From asking for KV to having it, ms. KV that nobody has asked for is kept at least so long. */
  readonly loadMs: number;
}

/** Who is told. */
interface Told {
  loadEnded(outcome: LoadOutcome): void;
  freed(): void;
  readonly ownRankOf: (rank0: HostPort) => HostPort;
}

/**
 * Of the time that KV is kept, where its consumer has waited as long for a prompt that cannot begin here. It may have no blocks left to ask by,
 * and this end none to compute with: each would wait for the other.
 */
const CROSSED_SHARE = 0.25;

/** How far a request is that is handed over, by its id here: of those a producer fills, of those a consumer has wanted. */
type Stage = 'filling' | 'drawn' | 'wanted' | 'settled';

export class NativeHalf {
  readonly #parts: NativeParts;
  readonly #told: Told;
  readonly #stages = new Map<EngineRequestId, Stage>();
  /** When each lease began; the oldest first. */
  readonly #leases = new Map<TransferId, number>();
  #fills: readonly FillMeta[] = [];

  constructor(parts: NativeParts, told: Told) {
    this.#parts = parts;
    this.#told = told;
    const { handOver, blocks } = parts;
    handOver.serve({
      books: {
        hold: (ids) => blocks.hold(ids),
        unhold: (ids) => blocks.unhold(ids),
        expose: (key, ids) => blocks.expose(key, ids),
        retract: (key) => blocks.retract(key),
        lease: (transferId) => this.#lease(transferId),
        endLease: (transferId) => this.#endLease(transferId),
      },
      loadEnded: (outcome) => {
        this.#stages.set(outcome.requestId, 'settled');
        told.loadEnded(outcome);
      },
      freed: () => told.freed(),
    });
  }

  start({ lost, fills, wants, cancels, unwanted }: ConnectorMetadata): void {
    const { handOver } = this.#parts;
    for (const transferId of lost) handOver.progress(transferId, 0, []);
    for (const { transferId, peer } of unwanted) handOver.unwanted(transferId, this.#addressOf(peer));
    for (const want of wants) this.#want(want);
    for (const requestId of cancels) {
      if (this.#stages.get(requestId) === 'wanted') handOver.cancel(requestId);
    }
    for (const fill of fills) {
      const { requestId, transferId, promptDigest, numTokens: tokens, numComputed, blockIds } = fill;
      if (!this.#stages.has(requestId)) {
        this.#stages.set(requestId, 'filling');
        handOver.begin({ transferId, promptDigest, tokens });
      }
      handOver.progress(transferId, numComputed, blockIds);
    }
    this.#fills = fills;
  }

  /** Layer `index` of the step's fills is written, or will be when `ready` fires. */
  layer(index: number, ready?: EventRef): void {
    if (this.#fills.length > 0) this.#parts.handOver.layer(index, ready);
  }

  stepEnded(): Promise<void> | undefined {
    return this.#fills.length > 0 ? this.#parts.handOver.stepEnded() : undefined;
  }

  promptsDrawn(draws: ReadonlyMap<EngineRequestId, FirstTokens>): void {
    for (const { requestId, transferId, numTokens, numComputed, samplingDigest } of this.#fills) {
      if (numComputed < numTokens) continue;
      this.#stages.set(requestId, 'drawn');
      this.#parts.handOver.finish(transferId, { tokens: [], ...draws.get(requestId), samplingDigest });
    }
    this.#fills = [];
  }

  /** False where it was none of the native hand-over's. */
  requestFinished({ requestId, transferId, aborted }: FinishedRequest): boolean {
    const stage = this.#stages.get(requestId);
    this.#stages.delete(requestId);
    const why =
      stage === 'filling' && !aborted
        ? 'its prompt could not be computed'
        : 'its request was given up, and nobody will decode it';
    // What has been drawn stays to be asked for.
    const isOver = stage === 'filling' || (stage === 'drawn' && aborted);
    if (isOver) this.#parts.handOver.fail(transferId, 'KV_SEND_FAILED', why);
    return stage !== undefined;
  }

  makeRoom(numBlocks: number): true | number | undefined {
    const { handOver, blocks, loadMs } = this.#parts;
    const before = blocks.numFree;
    const now = performance.now();
    const crossedMs = loadMs * CROSSED_SHARE;
    let soonest: number | undefined;
    for (const [transferId, since] of this.#leases) {
      if (blocks.numFree - before >= numBlocks) break;
      const left = since + (handOver.consumerWaits(transferId) >= crossedMs ? crossedMs : loadMs) - now;
      if (left > 0) {
        soonest = Math.min(soonest ?? crossedMs, left);
        continue;
      }
      handOver.fail(
        transferId,
        'KV_SEND_FAILED',
        'it was not asked for in time, and made room for another prompt',
      );
      this.#endLease(transferId);
    }
    return blocks.numFree > before || soonest;
  }

  #want(want: WantMeta): void {
    const { requestId, transferId, promptDigest, samplingDigest, peer, prefillWithinMs } = want;
    this.#stages.set(requestId, 'wanted');
    this.#parts.handOver.want({
      requestId,
      transferId,
      peer: this.#addressOf(peer),
      promptDigest,
      samplingDigest,
      tokens: want.numTokens,
      skip: want.skipBlocks,
      blocks: want.blockIds,
      withinMs: this.#parts.loadMs,
      ...(prefillWithinMs !== undefined && { prefillWithinMs }),
    });
  }

  /** Within `finish`: the blocks of the prompt whose last step this is. */
  #lease(transferId: TransferId): void {
    const fill = this.#fills.find((one) => one.transferId === transferId);
    if (!fill) return;
    this.#parts.blocks.lease(transferId, fill.blockIds);
    this.#leases.set(transferId, performance.now());
  }

  #endLease(transferId: TransferId): void {
    this.#parts.blocks.endLease(transferId);
    this.#leases.delete(transferId);
  }

  #addressOf(rank0: HostPort): string {
    return formatHostPort(this.#told.ownRankOf(rank0));
  }
}
