/**
 * The scheduler half of the P2P connector. Pure. Whom a request's KV goes to or comes from stands in its id (wire/ids.ts); a request
 * whose id names no peer is served locally.
 *
 *   producer   emits a save with the step that schedules the last chunk of the prompt: all prompt blocks, cached ones too, once per
 *              request, also when it is preempted and resumed.
 *   consumer   claims all prompt tokens but the last, which it computes itself, less what the local prefix cache has; once per request.
 */

import { promptDigest } from '../kv/block-hash.ts';
import type { HostPort } from '../net/address.ts';
import { type EngineRequestId, peerAddressOf, type TransferId } from '../wire/ids.ts';
import type { ConnectorRequest, ScheduledRequest, SchedulerConnector } from './connector.ts';
import type { ConnectorMetadata, LoadMeta, SaveMeta } from './metadata.ts';

export type KvRole = 'producer' | 'consumer';

export interface P2pSchedulerConnectorOptions {
  readonly role: KvRole;
  /** Tokens per block. */
  readonly blockSize: number;
}

/** Where the KV of one request stands. `local`: nothing (more) to transfer. */
type TransferStage = 'unsaved' | 'unloaded' | 'loading' | 'local';

interface Transfer {
  /** Rank 0 of the other side. */
  readonly peer: HostPort | undefined;
  stage: TransferStage;
}

/** One per scheduler. It keeps what it must know of a request until `requestFinished`, which must come for every request. */
export class P2pSchedulerConnector implements SchedulerConnector {
  readonly #role: KvRole;
  readonly #blockSize: number;
  readonly #transfers = new Map<EngineRequestId, Transfer>();
  #loads: LoadMeta[] = [];
  #cancels: EngineRequestId[] = [];

  constructor(options: P2pSchedulerConnectorOptions) {
    this.#role = options.role;
    this.#blockSize = options.blockSize;
  }

  transfersKv(transferId: TransferId): boolean {
    return this.#peerOf(transferId) !== undefined;
  }

  getNumNewMatchedTokens(request: ConnectorRequest, numLocalTokens: number): number {
    if (this.#role === 'producer') return 0;
    if (!request.mayLoad || this.#transferOf(request).stage !== 'unloaded') return 0;
    return Math.max(0, request.numPromptTokens - 1 - numLocalTokens);
  }

  updateStateAfterAlloc(
    request: ConnectorRequest,
    blockIds: readonly number[],
    numLocalTokens: number,
    numExternalTokens: number,
  ): void {
    const transfer = this.#transferOf(request);
    if (transfer.stage !== 'unloaded') return;
    // Once it has begun otherwise it stays so: its KV here may be freed, and the peer's is sent only once.
    transfer.stage = numExternalTokens > 0 ? 'loading' : 'local';
    if (numExternalTokens === 0 || !transfer.peer) return;
    const numBlocks = Math.ceil(request.numPromptTokens / this.#blockSize);
    this.#loads.push({
      requestId: request.requestId,
      transferId: request.transferId,
      ...digestOf(request),
      peer: transfer.peer,
      numTokens: numExternalTokens,
      blockIds: blockIds.slice(0, numBlocks),
      skipBlocks: Math.floor(numLocalTokens / this.#blockSize),
      ...(request.prefillWithinMs !== undefined && { prefillWithinMs: request.prefillWithinMs }),
    });
  }

  buildConnectorMeta(scheduled: readonly ScheduledRequest[]): ConnectorMetadata {
    const metadata = {
      saves: scheduled.flatMap((request) => this.#saveOf(request) ?? []),
      loads: this.#loads,
      cancels: this.#cancels,
    };
    this.#loads = [];
    this.#cancels = [];
    return metadata;
  }

  loadFailed(requestId: EngineRequestId): void {
    const transfer = this.#transfers.get(requestId);
    if (transfer) transfer.stage = 'local';
  }

  requestPreempted(_requestId: EngineRequestId): void {
    // Scheduled requests bring all their blocks with every step, so there is nothing to forget: a save that has been emitted stays
    // emitted, one that has not comes with the step that completes the prompt.
  }

  requestFinished(requestId: EngineRequestId): void {
    const stage = this.#transfers.get(requestId)?.stage;
    this.#transfers.delete(requestId);
    // Also for a load that has ended since or that no metadata has carried yet: the worker side starts loads before it cancels, and
    // every load is answered for, which is what the scheduler waits for.
    if (stage === 'loading') this.#cancels.push(requestId);
  }

  #saveOf(request: ScheduledRequest): SaveMeta | undefined {
    const { requestId, transferId, numPromptTokens } = request;
    if (request.numComputedTokens + request.numScheduledTokens < numPromptTokens) return undefined;
    const transfer = this.#transferOf(request);
    if (transfer.stage !== 'unsaved' || !transfer.peer) return undefined;
    transfer.stage = 'local';
    const blockIds = request.blockIds.slice(0, Math.ceil(numPromptTokens / this.#blockSize));
    return {
      requestId,
      transferId,
      ...digestOf(request),
      peer: transfer.peer,
      numTokens: numPromptTokens,
      blockIds,
    };
  }

  #peerOf(transferId: TransferId): HostPort | undefined {
    return peerAddressOf(transferId, this.#role === 'producer' ? 'decode' : 'prefill');
  }

  #transferOf({ requestId, transferId }: Pick<ConnectorRequest, 'requestId' | 'transferId'>): Transfer {
    const known = this.#transfers.get(requestId);
    if (known) return known;
    const peer = this.#peerOf(transferId);
    const first = this.#role === 'producer' ? 'unsaved' : 'unloaded';
    const transfer: Transfer = { peer, stage: peer ? first : 'local' };
    this.#transfers.set(requestId, transfer);
    return transfer;
  }
}

function digestOf({ promptTokens }: Pick<ConnectorRequest, 'promptTokens'>): {
  readonly promptDigest?: string;
} {
  return promptTokens === undefined ? {} : { promptDigest: promptDigest(promptTokens) };
}
