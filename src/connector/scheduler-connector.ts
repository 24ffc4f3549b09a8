/**
 * The scheduler half of the P2P connector. Pure. Whom a request's KV goes to or comes from stands in its id (wire/ids.ts); a request
 * whose id names no peer is served locally. Which wire it takes is decided when it is first seen, by what both ends were told.
 *
 *   frozen     a producer emits a save with the step that schedules the last chunk of the prompt: all prompt blocks, cached ones too, once
 *              per request, also when it is preempted and resumed. A consumer claims all prompt tokens but the last, which it computes
 *              itself, less what the local prefix cache has; once per request.
 *   native     a producer emits a fill with each step that computes some of the prompt, which ends with the token that it draws. A consumer
 *              claims all prompt tokens that it has not, the last one too.
 */

import { PdError } from '../errors.ts';
import { promptDigest } from '../kv/block-hash.ts';
import type { HostPort } from '../net/address.ts';
import { type EngineRequestId, peerAddressOf, type TransferId } from '../wire/ids.ts';
import { MAX_DIGEST } from '../wire/limits.ts';
import type { ConnectorRequest, ScheduledRequest, SchedulerConnector } from './connector.ts';
import type { ConnectorMetadata, FillMeta, LoadMeta, SaveMeta, WantMeta } from './metadata.ts';

export type KvRole = 'producer' | 'consumer';

export interface P2pSchedulerConnectorOptions {
  readonly role: KvRole;
  /** Tokens per block. */
  readonly blockSize: number;
  /** Whether the worker side has a native hand-over; else every request takes the frozen wire, whatever it was told. Default: false. */
  readonly native?: boolean;
}

/** Where the KV of one request stands. `filling`: some of it was announced by fills. `local`: nothing (more) to transfer. */
type TransferStage = 'unsaved' | 'filling' | 'unloaded' | 'loading' | 'local';

interface Transfer {
  readonly transferId: TransferId;
  /** Rank 0 of the other side. */
  readonly peer: HostPort | undefined;
  readonly native: NativeTerms | undefined;
  stage: TransferStage;
}

/** What both ends compare. */
type NativeTerms = Pick<FillMeta, 'promptDigest' | 'samplingDigest'>;

/** Of a request, whichever way it is seen first. */
type Seen = Pick<ConnectorRequest, 'requestId' | 'transferId' | 'promptTokens' | 'wire' | 'samplingDigest'>;

/** One per scheduler. It keeps what it must know of a request until `requestFinished`, which must come for every request. */
export class P2pSchedulerConnector implements SchedulerConnector {
  readonly #role: KvRole;
  readonly #blockSize: number;
  readonly #native: boolean;
  readonly #transfers = new Map<EngineRequestId, Transfer>();
  readonly #loads: LoadMeta[] = [];
  readonly #cancels: EngineRequestId[] = [];
  readonly #lost: TransferId[] = [];
  readonly #wants: WantMeta[] = [];
  readonly #unwanted: { readonly transferId: TransferId; readonly peer: HostPort }[] = [];

  constructor(options: P2pSchedulerConnectorOptions) {
    this.#role = options.role;
    this.#blockSize = options.blockSize;
    this.#native = options.native ?? false;
  }

  transfersKv(transferId: TransferId): boolean {
    return this.#peerOf(transferId) !== undefined;
  }

  getNumNewMatchedTokens(request: ConnectorRequest, numLocalTokens: number): number {
    if (this.#role === 'producer') return 0;
    const { stage, native } = this.#transferOf(request);
    if (!request.mayLoad || stage !== 'unloaded') return 0;
    const before = Math.max(0, request.numPromptTokens - 1 - numLocalTokens);
    // Where the last token alone is missing, computing it is quicker than asking.
    return before > 0 && native ? before + 1 : before;
  }

  updateStateAfterAlloc(
    request: ConnectorRequest,
    blockIds: readonly number[],
    numLocalTokens: number,
    numExternalTokens: number,
  ): void {
    const { requestId, transferId, numPromptTokens, prefillWithinMs } = request;
    const transfer = this.#transferOf(request);
    const { peer, native } = transfer;
    if (transfer.stage !== 'unloaded' || !peer) return;
    // Once it has begun otherwise it stays so: its KV here may be freed, and the peer's is sent only once.
    transfer.stage = numExternalTokens > 0 ? 'loading' : 'local';
    if (numExternalTokens === 0) {
      if (native) this.#unwanted.push({ transferId, peer });
      return;
    }
    const prompt = blockIds.slice(0, this.#blocksFor(numPromptTokens));
    const skipBlocks = Math.floor(numLocalTokens / this.#blockSize);
    const within = prefillWithinMs === undefined ? {} : { prefillWithinMs };
    if (native) {
      const blocks = prompt.slice(skipBlocks);
      const ids = { requestId, transferId, ...native, peer };
      this.#wants.push({ ...ids, numTokens: numPromptTokens, skipBlocks, blockIds: blocks, ...within });
      return;
    }
    const ids = { requestId, transferId, ...digestOf(request), peer };
    this.#loads.push({ ...ids, numTokens: numExternalTokens, blockIds: prompt, skipBlocks, ...within });
  }

  buildConnectorMeta(scheduled: readonly ScheduledRequest[]): ConnectorMetadata {
    const saves: SaveMeta[] = [];
    const fills: FillMeta[] = [];
    if (this.#role === 'producer') for (const request of scheduled) this.#send(request, saves, fills);
    return {
      saves,
      loads: this.#loads.splice(0),
      cancels: this.#cancels.splice(0),
      lost: this.#lost.splice(0),
      fills,
      wants: this.#wants.splice(0),
      unwanted: this.#unwanted.splice(0),
    };
  }

  loadFailed(requestId: EngineRequestId): void {
    const transfer = this.#transfers.get(requestId);
    if (transfer) transfer.stage = 'local';
  }

  requestPreempted(requestId: EngineRequestId): void {
    // Of a save there is nothing to forget: one that has been emitted stays emitted, one that has not comes with the step that completes
    // the prompt, with all its blocks.
    const transfer = this.#transfers.get(requestId);
    if (transfer?.stage === 'filling') this.#lost.push(transfer.transferId);
  }

  requestFinished(requestId: EngineRequestId): void {
    const transfer = this.#transfers.get(requestId);
    this.#transfers.delete(requestId);
    if (!transfer) return;
    const { stage, native, peer, transferId } = transfer;
    // Also for a load that has ended since or that no metadata has carried yet: the worker side starts loads before it cancels, and
    // every load is answered for, which is what the scheduler waits for.
    if (stage === 'loading') this.#cancels.push(requestId);
    if (stage === 'unloaded' && native && peer) this.#unwanted.push({ transferId, peer });
  }

  /** What of a step's request is to be sent, once the step has run. */
  #send(request: ScheduledRequest, saves: SaveMeta[], fills: FillMeta[]): void {
    const { requestId, transferId, numPromptTokens: numTokens } = request;
    const transfer = this.#transferOf(request);
    const { peer, native, stage } = transfer;
    if (!peer || stage === 'local') return;
    const numComputed = Math.min(numTokens, request.numComputedTokens + request.numScheduledTokens);
    const blockIds = request.blockIds.slice(0, this.#blocksFor(numComputed));
    if (numComputed === numTokens) transfer.stage = 'local';
    else if (native) transfer.stage = 'filling';
    if (native) fills.push({ requestId, transferId, ...native, numTokens, numComputed, blockIds });
    else if (numComputed === numTokens) {
      saves.push({ requestId, transferId, ...digestOf(request), peer, numTokens, blockIds });
    }
  }

  #blocksFor(numTokens: number): number {
    return Math.ceil(numTokens / this.#blockSize);
  }

  #peerOf(transferId: TransferId): HostPort | undefined {
    return peerAddressOf(transferId, this.#role === 'producer' ? 'decode' : 'prefill');
  }

  #transferOf(request: Seen): Transfer {
    const { requestId, transferId } = request;
    const known = this.#transfers.get(requestId);
    if (known) return known;
    const peer = this.#peerOf(transferId);
    const first = this.#role === 'producer' ? 'unsaved' : 'unloaded';
    const native = peer && this.#native && request.wire === 'native' ? termsOf(request) : undefined;
    const transfer: Transfer = { transferId, peer, native, stage: peer ? first : 'local' };
    this.#transfers.set(requestId, transfer);
    return transfer;
  }
}

function termsOf({ requestId, promptTokens, samplingDigest }: Seen): NativeTerms {
  if (samplingDigest !== undefined && samplingDigest.length > MAX_DIGEST) {
    const message = `request ${requestId}: a digest of ${samplingDigest.length} characters, ${MAX_DIGEST} are allowed`;
    throw new PdError('REQUEST_INVALID', message, { requestId });
  }
  if (promptTokens === undefined || samplingDigest === undefined) {
    const message = `request ${requestId}: the native hand-over needs its prompt and the digest of its sampling`;
    throw new PdError('REQUEST_INVALID', message, { requestId });
  }
  return { promptDigest: promptDigest(promptTokens), samplingDigest };
}

function digestOf({ promptTokens }: Pick<ConnectorRequest, 'promptTokens'>): {
  readonly promptDigest?: string;
} {
  return promptTokens === undefined ? {} : { promptDigest: promptDigest(promptTokens) };
}
