/** What the log is told of a load at half of its deadline: whoever reads it then can still look at the other end. */
import type { ErrorContext, PdError } from '../../errors.ts';
import type { PortAnswer } from '../../net/knock.ts';
import type { TransferContext } from '../context.ts';
import type { PairState } from '../types.ts';
import type { Intake } from './intake.ts';
import type { Load } from './load.ts';

export interface PairsOfPeer {
  /** Why the last pair that this peer had with us is over, if it is and it has not sent NEW since. */
  lostPair(peer: string): PdError | undefined;
  /** Pairs with it, both directions. */
  pairs(peer: string): PairState[];
}

/** What is known, at its deadline, of KV that has not come: it tells the ways apart in which that happens. */
export interface Evidence {
  readonly context: Pick<
    ErrorContext,
    'announced' | 'pair' | 'nearMiss' | 'kvKey' | 'peerIsOurs' | 'peerPort'
  >;
  readonly words: string;
  /** Why the last pair with the producer is over. */
  readonly cause: PdError | undefined;
}

/** `peerPort`: what the producer's KV port did when it was last tried. */
export function evidenceOf(
  { options, self }: TransferContext,
  peers: PairsOfPeer,
  load: Load,
  peerPort: PortAnswer | undefined,
): Evidence {
  const { sendType, kvKey } = options;
  const pairs = peers.pairs(load.peer);
  // The end that announces opens the pair: who asks in GET, who sends otherwise.
  const bringing = pairs.filter(
    ({ direction }) => direction === (sendType === 'GET' ? 'outgoing' : 'incoming'),
  );
  const is = (...states: PairState['state'][]) => bringing.find(({ state }) => states.includes(state));
  const lost = peers.lostPair(load.peer);
  const open = is('open');
  const pair = open
    ? 'open'
    : is('opening')
      ? 'opening'
      : is('connecting')
        ? 'connecting'
        : lost
          ? 'lost'
          : 'none';
  const [nearMiss] = load.nearMisses();
  return {
    context: {
      pair,
      kvKey,
      ...(sendType !== 'GET' && { announced: self }),
      ...(nearMiss !== undefined && { nearMiss }),
      ...(open && { peerIsOurs: open.ours }),
      ...(peerPort && { peerPort }),
    },
    words: pairWords(bringing),
    cause: open ? undefined : lost,
  };
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
