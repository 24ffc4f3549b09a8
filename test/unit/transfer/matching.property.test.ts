/**
 * Whose KV is whose: requests with ids of every kind, ends that randomize or do not, KV that comes before its request or after. Nobody
 * ever gets the KV of another, and who can be matched is.
 */
import fc from 'fast-check';
import pino from 'pino';
import { describe, expect, it } from 'vitest';
import { HostDevice } from '../../../src/device/host.ts';
import { RateLimitedLog } from '../../../src/observability/log.ts';
import { MetricsPage } from '../../../src/observability/metrics.ts';
import { standsFor, type TransferContext } from '../../../src/transfer/context.ts';
import { Deadlines } from '../../../src/transfer/deadlines.ts';
import type { Claimant } from '../../../src/transfer/frozen/claims.ts';
import { Intake } from '../../../src/transfer/frozen/intake.ts';
import { SendStore } from '../../../src/transfer/frozen/send-store.ts';
import type { StoreEntry } from '../../../src/transfer/frozen/store.ts';
import { KvMemory } from '../../../src/transfer/kv-memory.ts';
import type { Pair } from '../../../src/transport/transport.ts';
import {
  type EngineRequestId,
  engineRequestId,
  kvKeyOf,
  proxyRequestId,
  type SuffixedIds,
  suffixedFor,
  type TensorId,
  type TransferId,
  tensorIdOf,
} from '../../../src/wire/ids.ts';
import { transferOptions } from '../../support/transfer.ts';

const LAYERS = ['l0', 'l1'];

const hexOf = (digits: number, from = '0123456789abcdef') =>
  fc.string({ unit: fc.constantFrom(...from), minLength: digits, maxLength: digits });
/** Two suffixes of engines are never alike, nor like the end of an id that a client has made: that takes 2^32 tries. */
const suffix = hexOf(7).map((digits) => `f${digits}`);
const lookalike = hexOf(7).map((digits) => `0${digits}`);
const address = (port: number) => ({ host: '10.0.0.1', port });
const proxyMade = hexOf(32).map((uuid) => proxyRequestId(address(8082), address(8084), uuid));
const clientMade = fc.oneof(
  fc.constantFrom('a', 'order', 'order-20261128', 'order-20261129', 'x-deadbeef'),
  fc.uuid(),
  lookalike.map((end) => `order-${end}`),
);
/** What clients and proxies send, and ids made of those by putting something behind: prefixes of each other. */
const headers = fc
  .uniqueArray(fc.oneof(proxyMade, clientMade), { minLength: 1, maxLength: 4 })
  .chain((ids) =>
    fc.tuple(
      fc.constant(ids),
      fc.array(fc.tuple(fc.nat(), fc.oneof(lookalike, fc.constantFrom('0', '1', '00000000'))), {
        maxLength: 4,
      }),
    ),
  )
  .map(([ids, ends]) => [...new Set([...ids, ...ends.map(([at, end]) => `${ids[at % ids.length]}-${end}`)])]);

interface Told {
  readonly serverId: string;
  /** As the engine of either end calls it. */
  readonly producer: EngineRequestId;
  readonly consumer: EngineRequestId;
}

const requests: fc.Arbitrary<readonly Told[]> = headers.chain((ids) =>
  fc
    .tuple(
      fc.array(fc.boolean(), { minLength: ids.length, maxLength: ids.length }),
      fc.uniqueArray(suffix, { minLength: ids.length * 2, maxLength: ids.length * 2 }),
      fc.boolean(),
      fc.boolean(),
    )
    .map(([chats, suffixes, producerRandomizes, consumerRandomizes]) =>
      ids.map((id, index) => {
        const serverId = chats[index] ? `chatcmpl-${id}` : `cmpl-${id}-0`;
        const [a, b] = [suffixes[index * 2], suffixes[index * 2 + 1]];
        return {
          serverId,
          producer: engineRequestId(serverId, producerRandomizes ? a : undefined),
          consumer: engineRequestId(serverId, consumerRandomizes ? b : undefined),
        };
      }),
    ),
);

const settings = fc.record({
  ours: fc.boolean(),
  kvKey: fc.constantFrom('transfer' as const, 'engine' as const),
  suffixedIds: fc.constantFrom<SuffixedIds>('proxy', 'proxy', 'any'),
});
type Settings = { readonly ours: boolean; readonly kvKey: 'transfer' | 'engine'; suffixedIds: SuffixedIds };

function contextOf({ kvKey, suffixedIds }: Settings): TransferContext {
  const log = pino({ level: 'silent' });
  const [metrics, deadlines] = [new MetricsPage(), new Deadlines()];
  const parts = { device: new HostDevice(), metrics, deadlines, log };
  const memory = new KvMemory({ ...parts, bufferBytes: 2 ** 20, poolLimitBytes: 0 });
  const context = { ...parts, memory, limited: new RateLimitedLog() };
  return { ...context, options: transferOptions({ kvKey, suffixedIds }) } as unknown as TransferContext;
}

/** A pair on which everything has come as soon as it is waited for. */
const PAIR = { receive: async () => undefined, over: new Promise(() => undefined) } as unknown as Pair;

/** Under which id the sender's end shows a request: ours by the transfer id, others by their engine's own. */
const shownBy = (request: Told, end: 'producer' | 'consumer', { ours, kvKey }: Settings): TransferId =>
  ours ? kvKeyOf({ ...request, requestId: request[end] }, kvKey) : (request[end] as string as TransferId);

/** Whether `shown`, of the other end, is the request that this end knows by `key`, by the rule of docs/protocol.md. */
function matches(shown: TransferId, key: TransferId, { ours, kvKey, suffixedIds }: Settings): boolean {
  return shown === key || (!ours && kvKey === 'transfer' && suffixedFor(shown, suffixedIds) === key);
}

class Waiter implements Claimant {
  readonly peer = 'p:1';
  readonly transferId;
  readonly got: string[] = [];
  failed = false;
  constructor(transferId: TransferId) {
    this.transferId = transferId;
  }
  wants(layer: string): boolean {
    return !this.failed && !this.got.some((tensor) => tensor.endsWith(`#${layer}`));
  }
  take(entry: StoreEntry): void {
    this.got.push(entry.tensorId);
  }
  fail(): void {
    this.failed = true;
  }
}

/**
 * Between ours every id is whole. A peer that is not ours and does not randomize shows ids that may look like another's with a suffix: with
 * `any` whatever ends so, else only what somebody has made of an id of the proxy's by putting 8 hex digits behind.
 */
const unmistakable = ({ ours, suffixedIds }: Settings, all: readonly Told[]) =>
  ours || all.every(({ serverId }) => suffixedFor(serverId, suffixedIds) === undefined);

describe('property: nobody gets the KV of another request, and who can be matched is', () => {
  it('where it is sent (PUT)', async () => {
    const told = new Set<string>();
    await fc.assert(
      fc.asyncProperty(
        requests,
        settings,
        fc.infiniteStream(fc.nat()),
        async (all, setting, random: Iterator<number>) => {
          fc.pre(unmistakable(setting, all));
          const context = contextOf(setting);
          const intake = new Intake(context);
          const own = all.map((request) =>
            kvKeyOf({ ...request, requestId: request.consumer }, setting.kvKey),
          );
          const waiters = own.map((key) => new Waiter(key));
          const shown = all.map((request) => shownBy(request, 'producer', setting));
          const events: (() => Promise<void>)[] = [
            ...waiters.map((waiter) => async () => intake.claim(waiter)),
            ...shown.flatMap((id) =>
              LAYERS.map((layer) => async () => {
                const tensor_id = tensorIdOf(id, layer);
                const put = { cmd: 'PUT', tensor_id, shape: [1], dtype: 'uint8' } as const;
                const meant = setting.ours ? undefined : standsFor(context, tensor_id);
                const entry = await intake.admit(put, 'p:1', { standsFor: meant });
                if (entry) await intake.post(entry, PAIR);
              }),
            ),
          ];
          while (events.length > 0) await events.splice(random.next().value % events.length, 1)[0]!();
          for (const [index, waiter] of waiters.entries()) {
            const mine = LAYERS.map((layer) => tensorIdOf(shown[index]!, layer));
            const can = matches(shown[index]!, own[index]!, setting);
            expect(waiter.got.toSorted()).toEqual(can ? mine : []);
            told.add(`${setting.ours} ${setting.kvKey} ${can}`);
          }
          for (const key of own) intake.finish(key);
          context.deadlines.clear();
          expect(intake.store.checkIntegrity()).toEqual([]);
        },
      ),
      { numRuns: 400 },
    );
    // The cases do occur.
    expect([...told].toSorted()).toEqual([
      'false engine false',
      'false engine true',
      'false transfer false',
      'false transfer true',
      'true engine false',
      'true engine true',
      'true transfer true',
    ]);
  });

  it('where it is asked for (GET)', () => {
    fc.assert(
      fc.property(requests, settings, (all, setting) => {
        fc.pre(unmistakable(setting, all));
        const context = contextOf(setting);
        const store = new SendStore();
        const kept = all.map((request) =>
          kvKeyOf({ ...request, requestId: request.producer }, setting.kvKey),
        );
        const held = { memory: context.memory.tryAllocate(1)!.memory, bytes: 1, free: () => {} };
        for (const key of kept) {
          for (const layer of LAYERS) {
            store.keep({ tensorId: tensorIdOf(key, layer), shape: [1], dtype: 'uint8' }, held, 0);
          }
        }
        for (const [index, request] of all.entries()) {
          const asked = shownBy(request, 'consumer', setting);
          const found = LAYERS.map((layer) => {
            const tensorId: TensorId = tensorIdOf(asked, layer);
            const meant = setting.ours ? undefined : standsFor(context, tensorId);
            const answer = store.lookup(tensorId, meant);
            return answer.kind === 'found' ? answer.tensor.requestId : undefined;
          });
          const can = matches(asked, kept[index]!, setting);
          expect(found).toEqual(LAYERS.map(() => (can ? kept[index] : undefined)));
        }
        expect(store.checkIntegrity()).toEqual([]);
      }),
    );
  });
});
