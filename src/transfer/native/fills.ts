/**
 * What this end hands to others: the producer's half of a hand-over (hand-over.ts). It carries out what the ledger decides (grants.ts), and
 * tells it what has landed (writes.ts).
 */

import type { EventRef } from '../../device/device.ts';
import { type ErrorCode, PdError, unreachable } from '../../errors.ts';
import type { MetricsPage } from '../../observability/metrics.ts';
import { NO_TOKEN } from '../../transport/direct/page.ts';
import type { TransferId } from '../../wire/ids.ts';
import type { GrantAction } from './actions.ts';
import type { FromWire, NativeInit, ToWire } from './channel.ts';
import { isTokenId } from './codec.ts';
import type { DirectWays } from './direct.ts';
import { Grants } from './grants.ts';
import type { Drawn, HandOverUser, MovedKv } from './hand-over-api.ts';
import type { ConsumerMessage, Nonce, ProducerMessage } from './messages.ts';
import { digestForPage } from './page-watch.ts';
import { Writes } from './writes.ts';

export interface FillsOptions {
  readonly init: NativeInit;
  readonly direct: Pick<DirectWays, 'begin' | 'targetPage' | 'release'> | undefined;
  readonly metrics: MetricsPage;
  /** How long KV that nobody asks for is kept, ms. */
  readonly leaseMs: number;
  /** Whether the id of a request says that its KV is for `peer`. */
  readonly names: (id: TransferId, peer: string) => boolean;
  readonly tell: (command: ToWire) => void;
  /** Of the one queue of both halves (`HandOver`). */
  readonly work: (task: () => void) => void;
  readonly user: () => HandOverUser;
  readonly onStage: (id: TransferId, stage: 'bound' | 'launched' | 'landed', moved?: MovedKv) => void;
}

/** How long a WANT may wait for its request, which may stand in the producer's queue; whoever gives up earlier says DROP. */
const UNBOUND_MS = 600_000;

export class Fills {
  readonly #options: FillsOptions;
  readonly #grants: Grants;
  readonly #writes: Writes;

  constructor(options: FillsOptions) {
    const { init, direct, metrics, leaseMs, names, tell, onStage } = options;
    const { nonce, shape } = init;
    this.#options = options;
    this.#grants = new Grants({ nonce, blockSize: shape.blockSize, names, unboundMs: UNBOUND_MS, leaseMs });
    this.#writes = new Writes({
      init,
      direct,
      metrics,
      tell,
      onStage,
      mayLaunch: (launch) => this.#grants.mayLaunch(launch),
      landed: (launch, failure) => this.#grant(() => this.#grants.landed(launch, performance.now(), failure)),
    });
  }

  begin(request: {
    readonly transferId: TransferId;
    readonly promptDigest: string;
    readonly tokens: number;
  }): void {
    const { transferId, promptDigest, tokens } = request;
    this.#grant(() => this.#grants.begin(transferId, promptDigest, tokens, performance.now()));
  }

  progress(transferId: TransferId, computed: number, blocks: readonly number[]): void {
    if (computed > 0) this.#writes.computes(transferId);
    this.#grant(() => this.#grants.progress(transferId, computed, blocks));
  }

  layer(index: number, ready?: EventRef): void {
    this.#writes.layer(index, ready);
  }

  stepEnded(): Promise<void> {
    return this.#writes.stepEnded();
  }

  finish(transferId: TransferId, { tokens, logprobs, samplingDigest }: Drawn): void {
    // of a runtime that is not ours, perhaps: what cannot be said must not reach the wire
    if (!tokens.every((token) => isTokenId(token)))
      throw new PdError(
        'REQUEST_INVALID',
        `${transferId}: drawn are ${tokens.join(', ')}, which are no token ids`,
      );
    const draw = { drawn: tokens, ...(logprobs && { logprobs }), samplingDigest };
    this.#grant(() => this.#grants.finish(transferId, draw, performance.now()));
  }

  fail(transferId: TransferId, code: ErrorCode, why: string): void {
    this.#grant(() => this.#grants.fail(transferId, code, why, performance.now()));
  }

  /** A consumer has said hello. */
  introduced(peer: string, nonce: Nonce, cacheBlocks: number): void {
    this.#grant(() => this.#grants.introduced(peer, nonce, cacheBlocks, performance.now()));
  }

  asked(peer: string, message: ConsumerMessage): void {
    this.#grant(() => this.#grants.message(peer, message, performance.now()));
  }

  /** Its connection is gone. */
  unreachable(peer: string): void {
    this.#grant(() => this.#grants.unreachable(peer, performance.now()));
  }

  died(peer: string, nonce: Nonce): void {
    this.#grant(() => this.#grants.died(peer, nonce, performance.now()));
  }

  /** What the wire says of parts. */
  moved(event: Extract<FromWire, { readonly kind: 'gathered' | 'written' | 'sent' }>): void {
    switch (event.kind) {
      case 'gathered':
        this.#writes.gathered(event.step);
        return;
      case 'written':
        this.#writes.written(event);
        return;
      case 'sent':
        this.#writes.sent();
        return;
      default:
        unreachable(event, 'event of parts');
    }
  }

  tick(): void {
    this.#grant(() => this.#grants.tick(performance.now()));
  }

  /** Nothing more is begun. */
  shutdown(): void {
    this.#grant(() => this.#grants.shutdown(performance.now()));
  }

  knows(peer: string): boolean {
    return this.#grants.knows(peer);
  }

  longestUnbound(peer: string): number {
    return this.#grants.longestUnbound(peer, performance.now());
  }

  /** Nothing is written, or on its way. */
  get hasLanded(): boolean {
    return this.#writes.size === 0;
  }

  /** No WANT that is not acknowledged, no write that the ledger waits for, no lease. */
  get isIdle(): boolean {
    return this.#grants.isIdle;
  }

  stats(): ReturnType<Grants['stats']> {
    return this.#grants.stats();
  }

  checkIntegrity(): string[] {
    return this.#grants.checkIntegrity();
  }

  #grant(told: () => readonly GrantAction[]): void {
    this.#options.work(() => {
      for (const action of told()) this.#doGrant(action);
    });
  }

  #doGrant(action: GrantAction): void {
    switch (action.kind) {
      case 'send':
        // first where its reader spins already
        if (action.slot !== undefined) this.#endInPage(action.slot, action.message);
        this.#options.tell({ kind: 'answer', peer: action.peer, message: action.message });
        return;
      case 'introduce':
        this.#options.tell({ kind: 'introduce', peer: action.peer });
        return;
      case 'write':
        this.#options.user().books.hold(action.sources);
        this.#writes.begin(action);
        return;
      case 'unhold':
        this.#options.user().books.unhold(action.sources);
        this.#options.user().freed();
        return;
      case 'lease':
        this.#options.user().books.lease(action.id);
        return;
      case 'release':
        this.#options.user().books.endLease(action.id);
        this.#options.user().freed();
        return;
      case 'drained':
        this.#options.direct?.release(action.nonce);
        return;
      case 'bound':
        this.#options.onStage(action.id, 'bound');
        return;
      case 'ended':
        return;
      default:
        unreachable(action, 'action of the grants');
    }
  }

  /** What a page has room for; the message says it too. */
  #endInPage(slot: number, message: ProducerMessage): void {
    const page = this.#options.direct?.targetPage(message.to);
    if (!page || message.cmd !== 'DONE' || message.logprobs || message.drawn.length > 1) return;
    if (message.written !== message.promised) return;
    const digest = digestForPage(message.samplingDigest);
    const [token = NO_TOKEN] = message.drawn;
    if (digest) page.end(slot, message.seq, 'done', { token, digest });
  }
}
