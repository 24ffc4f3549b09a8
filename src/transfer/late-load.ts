/** What the log is told of a load at half of its deadline: whoever reads it then can still look at the other end. */
import type { PdError } from '../errors.ts';
import type { TransferContext } from './context.ts';
import type { Intake } from './intake.ts';
import type { Load } from './load.ts';
import type { PairState } from './types.ts';

export interface PairsOfPeer {
  /** Why the last pair that this peer had with us is over, if it is and it has not sent NEW since. */
  lostPair(peer: string): PdError | undefined;
  /** Pairs with it, both directions. */
  pairs(peer: string): PairState[];
}

export function warnLate(
  { memory, log }: TransferContext,
  intake: Intake,
  peers: PairsOfPeer,
  load: Load,
  timeoutMs: number,
): void {
  if (load.decided) return;
  const { requestId, transferId, peer, missing } = load;
  const near = load.nearMisses();
  const pairs = peers.pairs(peer);
  log.warn(
    {
      requestId,
      transferId,
      peer,
      missing: missing.length,
      layers: load.request.layers.length,
      nearMisses: near,
      lostPair: peers.lostPair(peer)?.message,
      held: intake.store.size,
      pairs,
      bufferUsed: memory.bufferUsed,
      bufferThreshold: memory.thresholdBytes,
      poolUsed: memory.poolUsed,
      poolLimit: memory.limitBytes,
    },
    `KV of ${requestId} from ${peer} is not here after half of its ${timeoutMs} ms: waiting for ` +
      `${load.tensorId(missing[0] ?? '')}; ${pairWords(pairs)}; ` +
      (near.length > 0 ? `held instead: ${near.join(', ')}` : 'nothing of a similar id is held'),
  );
}

function pairWords(pairs: readonly PairState[]): string {
  if (pairs.length === 0) return 'there is no pair with it';
  return pairs
    .map(
      ({ direction, state, sinceMs, queued, outstanding }) =>
        `${direction} pair ${state} since ${sinceMs} ms, ${queued} queued, ${outstanding} outstanding`,
    )
    .join(', ');
}
