/** Ends of a native hand-over for tests: a cache, its books, the ledgers and a transfer service, in this process. */
import { randomBytes } from 'node:crypto';
import type { PagedLayer } from '../../src/device/device.ts';
import { BlockManager } from '../../src/kv/block-manager.ts';
import { blockBytes } from '../../src/kv/layout.ts';
import { formatHostPort } from '../../src/net/address.ts';
import { createLogger } from '../../src/observability/log.ts';
import { MetricsPage } from '../../src/observability/metrics.ts';
import type { FromWire, NativeInit } from '../../src/transfer/native/channel.ts';
import { HandOver } from '../../src/transfer/native/hand-over.ts';
import type { Drawn, LoadOutcome, WantRequest } from '../../src/transfer/native/hand-over-api.ts';
import type { NativeTransport, Nonce } from '../../src/transfer/native/messages.ts';
import type { ServiceParts, TransferService } from '../../src/transfer/service.ts';
import { type EngineRequestId, proxyRequestId, type TransferId, transferIdOf } from '../../src/wire/ids.ts';
import { LAYOUT, pagedCache, type Services, type TestOptions, until } from './transfer.ts';

export const LAYERS = 3;

export interface End {
  readonly service: TransferService;
  readonly address: string;
  readonly handOver: HandOver;
  readonly blocks: BlockManager;
  readonly cache: readonly PagedLayer[];
  readonly outcomes: LoadOutcome[];
  /** Its ledgers and its books, in words. */
  leftovers(): string[];
}

export async function makeEnd(
  services: Services,
  role: 'producer' | 'consumer',
  options: TestOptions & {
    readonly leaseMs?: number;
    readonly transports?: readonly NativeTransport[];
    /** Absent: on the host. */
    readonly cache?: readonly PagedLayer[];
    readonly wrapTransport?: NonNullable<ServiceParts['wrapTransport']>;
  } = {},
): Promise<End> {
  const { leaseMs = 60_000, transports = ['host'], wrapTransport, cache: given, ...overrides } = options;
  const cache = given ?? pagedCache(LAYERS, role === 'producer').map(({ target }) => target);
  const init: NativeInit = {
    nonce: randomBytes(16).toString('hex') as Nonce,
    layers: cache,
    shape: {
      blocks: LAYOUT.numBlocks,
      blockSize: LAYOUT.blockSize,
      layers: LAYERS,
      blockBytes: blockBytes(LAYOUT),
      family: LAYOUT.family,
    },
    transports,
  };
  let hear: (event: FromWire) => void = () => {};
  const peers = new Set<string>();
  const tell = (event: FromWire) => {
    if ('peer' in event) peers.add(event.peer);
    hear(event);
  };
  const service = await services.make(overrides, {
    native: { init, tell },
    ...(wrapTransport && { wrapTransport }),
  });
  const handOver = new HandOver({
    init,
    wire: (listener) => {
      hear = listener;
      return (command) => service.native(command);
    },
    role,
    rank: 0,
    leaseMs,
    busy: () => false,
    metrics: new MetricsPage(),
    log: createLogger({ level: 'silent', format: 'json' }, 'test'),
  });
  // Else its timer outlives the test, in a process that other files share. Nobody is left to acknowledge anything.
  services.add({
    dispose: () => {
      const error = { code: 'PEER_LOST', message: 'the test is over', context: {} } as const;
      for (const peer of peers)
        for (const way of ['to', 'from'] as const) hear({ kind: 'lost', way, peer, error });
      return handOver.close();
    },
  });
  const blocks = new BlockManager(LAYOUT.numBlocks, LAYOUT.blockSize);
  const outcomes: LoadOutcome[] = [];
  handOver.serve({
    books: {
      hold: (list) => blocks.hold(list),
      unhold: (list) => blocks.unhold(list),
      expose: (key, list) => blocks.expose(key, list),
      retract: (key) => blocks.retract(key),
      lease: (id) => blocks.lease(id, blocks.tableOf(id)),
      endLease: (id) => blocks.endLease(id),
    },
    loadEnded: (outcome) => outcomes.push(outcome),
    freed: () => {},
  });
  const leftovers = () => {
    const { wants, grants } = handOver.state();
    const open =
      wants.waiting + wants.givenUp + wants.ended + wants.receipts + grants.requests + grants.launches;
    return [
      ...handOver.checkIntegrity(),
      ...blocks.checkIntegrity(),
      ...(open > 0 || blocks.numUsed > 0 ? [JSON.stringify({ wants, grants, used: blocks.numUsed })] : []),
    ];
  };
  return { service, address: formatHostPort(service.address), handOver, blocks, cache, outcomes, leftovers };
}

/** The id of a request that a proxy has made for these two. */
export function idFor(producer: End, consumer: End): TransferId {
  const uuid = randomBytes(16).toString('hex');
  return transferIdOf(`cmpl-${proxyRequestId(producer.service.address, consumer.service.address, uuid)}-0`);
}

/** A want of a whole prompt, its blocks allocated. */
export function wantOf(
  producer: End,
  consumer: End,
  transferId: TransferId,
  tokens: number,
  extra: Partial<WantRequest> = {},
): WantRequest {
  const blocks = consumer.blocks.allocate(transferId, tokens);
  const given = {
    peer: producer.address,
    promptDigest: 'prompt',
    samplingDigest: 'sampling',
    skip: 0,
    blocks,
  };
  return {
    requestId: `${transferId}-01234567` as EngineRequestId,
    transferId,
    tokens,
    withinMs: 60_000,
    ...given,
    ...extra,
  };
}

const DRAWN: Drawn = { tokens: [7], samplingDigest: 'sampling' };

/** A step that ends the prompt from where it stands. */
export async function compute(producer: End, id: TransferId, tokens: number): Promise<void> {
  producer.handOver.progress(id, tokens, producer.blocks.tableOf(id));
  for (let layer = 0; layer < LAYERS; layer++) producer.handOver.layer(layer);
  await producer.handOver.stepEnded();
}

/** Its prompt is computed and its request over. */
export function finish({ handOver, blocks }: End, id: TransferId, drawn: Drawn = DRAWN): void {
  handOver.finish(id, drawn);
  blocks.free(id);
}

export async function outcomeOf({ outcomes }: End): Promise<LoadOutcome> {
  await until('an outcome', () => outcomes.length > 0);
  return outcomes.shift()!;
}
