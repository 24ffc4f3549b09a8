/**
 * The product's own path: connector to connector, with WANT, DONE and the bytes between. In each round all requests of a row are asked for
 * at once, and the round ends when the consumer has the last of them and knows it.
 *
 *   kept     computed before it is asked for: from WANT bound, all layers at once
 *   layers   asked for before it is computed, each layer written behind its event: from the last layer computed
 */
import { PdError } from '../../src/errors.ts';
import type { HostPort } from '../../src/net/address.ts';
import type { NativeTransport } from '../../src/transfer/native/messages.ts';
import { proxyRequestId, type TransferId, transferIdOf } from '../../src/wire/ids.ts';
import { best, median } from '../measure/statistics.ts';
import { type BenchOptions, JobMaker, messageOf, startPeers } from './bench.ts';
import type { FlagTimes, Reply } from './messages.ts';
import type { Peer } from './peer.ts';
import { blocksOf, cacheBlocks, iterationsOf, type KvShape, tensorBytesOf } from './shape.ts';

export interface NativeSettings {
  readonly transports: readonly NativeTransport[];
  readonly tokens: readonly number[];
  /** Requests asked for at once, of `manyTokens` each. */
  readonly inFlight: readonly number[];
  readonly manyTokens: number;
  readonly rounds: number;
  /** Untimed, before them. */
  readonly warmUp: number;
}

interface RowKey {
  readonly transport: NativeTransport;
  readonly path: 'kept' | 'layers';
  readonly tokens: number;
  readonly inFlight: number;
  /** What the consumer's GPU does meanwhile: `decode`, a stand-in that reads memory. */
  readonly beside: 'nothing' | 'decode';
}

export interface NativeRow extends RowKey {
  /** Of all requests of a round. */
  readonly bytes: number;
  /** As above, each timed round. */
  readonly milliseconds: readonly number[];
  readonly bestMs: number;
  readonly medianMs: number;
  /** From the connector's call to the KV in place, median: with WANT's way, and with the prompt's computing in `layers`. */
  readonly wantedMs: number;
  /**
   * One request by `direct`, from the GPU's own clock, medians: how long the write that set the flag took (in `layers` that of the last layer),
   * and from its begin, which is when the last layer was computed, until the consumer's core thread knew that the KV is there (`kvMs`; absent in
   * reports from before it was told), and until it knew that and the first token.
   */
  readonly stamped?: { readonly writeMs: number; readonly kvMs?: number; readonly knownMs: number };
  /** `layers` on a GPU: a step that nobody has asked for takes this fraction of one that is handed over, median. */
  readonly keeps?: number;
  readonly error?: string;
}

/** Of a round beside a decoding consumer, so that the stand-in runs on to the end of the last: its two steps, for each iteration, and the rest. */
const STEPS_MS = 65;
const ROUND_MS = 55;
/** Rounds of one block that nobody counts, for programs that have just started: a worker has served for a while. */
export const STARTED_ROUNDS = 40;
/** Pattern streams of the two ends. */
const SOURCE = 1;
const POISON = 10_001;

export async function measureNative(options: BenchOptions, settings: NativeSettings): Promise<NativeRow[]> {
  const rows: NativeRow[] = [];
  const keys = settings.transports.flatMap((transport) => keysOf(transport, settings, options));
  for (const transport of settings.transports) {
    let ends: [Peer, Peer] | undefined;
    for (const key of keys.filter((one) => one.transport === transport)) {
      const { path, tokens, inFlight, beside } = key;
      const what = `${transport}, ${path}, ${inFlight} x ${tokens} tokens, beside ${beside}`;
      options.progress.say(what, rows.length, keys.length);
      try {
        ends ??= await startEnds(options, settings, transport);
        rows.push(await measureRow(ends, options.shape, settings, key));
      } catch (error) {
        const nothing = { milliseconds: [], bestMs: 0, medianMs: 0, wantedMs: 0 };
        rows.push({ ...key, bytes: bytesOf(options.shape, key), ...nothing, error: messageOf(error) });
        // a failed row must not affect the next
        await Promise.all((ends ?? []).map((end) => end.kill()));
        ends = undefined;
      }
    }
    await Promise.all((ends ?? []).map((end) => end.quit()));
  }
  options.progress.end();
  return rows;
}

function keysOf(transport: NativeTransport, settings: NativeSettings, { devices }: BenchOptions): RowKey[] {
  const common = { transport, inFlight: 1, beside: 'nothing' } as const;
  const { tokens, inFlight, manyTokens } = settings;
  return [
    ...tokens.map((count) => ({ ...common, path: 'kept' as const, tokens: count })),
    ...tokens.map((count) => ({ ...common, path: 'layers' as const, tokens: count })),
    ...(devices[0] === 'host'
      ? []
      : tokens.map((count) => ({
          ...common,
          path: 'layers' as const,
          tokens: count,
          beside: 'decode' as const,
        }))),
    ...inFlight
      .filter((count) => count > 1)
      .map((count) => ({ ...common, path: 'kept' as const, tokens: manyTokens, inFlight: count })),
  ];
}

async function startEnds(
  options: BenchOptions,
  { tokens, inFlight, manyTokens }: NativeSettings,
  transport: NativeTransport,
): Promise<[Peer, Peer]> {
  const { shape, devices } = options;
  const most = Math.max(
    blocksOf(shape, Math.max(...tokens)),
    Math.max(...inFlight) * blocksOf(shape, manyTokens),
  );
  const blocks = cacheBlocks(most);
  const compute = devices[0] !== 'host';
  // the size of what is filled and compared at once: a layer of the cache
  const layer = new JobMaker('layer', shape).flat(1, blocks * tensorBytesOf(shape, shape.blockSize));
  const [producer, consumer] = await startPeers(options, {
    producer: { device: 0, compute, jobs: [layer], end: { role: 'producer', transport, blocks } },
    consumer: { device: 1, compute, jobs: [layer], end: { role: 'consumer', transport, blocks } },
  });
  await producer!.ask({ do: 'fill-cache', stream: SOURCE });
  const few = {
    transport,
    path: 'kept',
    tokens: shape.blockSize,
    inFlight: 1,
    beside: 'nothing',
  } as const;
  for (let round = 0; round < STARTED_ROUNDS; round++) await keptRound([producer!, consumer!], few);
  return [producer!, consumer!];
}

async function measureRow(
  ends: readonly [Peer, Peer],
  shape: KvShape,
  { rounds, warmUp }: NativeSettings,
  key: RowKey,
): Promise<NativeRow> {
  const [, consumer] = ends;
  const compute = consumer.setup.compute && key.path === 'layers';
  const all = warmUp + rounds;
  const loop = { loop: 'memory', ms: all * (ROUND_MS + STEPS_MS * iterationsOf(key.tokens)) } as const;
  const beside = key.beside === 'decode' ? consumer.ask({ do: 'compute', ...loop }) : undefined;
  // where it fails, so do the rounds
  beside?.catch(() => undefined);
  const took: Round[] = [];
  const alone: number[] = [];
  for (let round = 0; round < all; round++) {
    if (compute) alone.push(await unwantedStep(ends, key));
    took.push(await (key.path === 'kept' ? keptRound(ends, key) : layersRound(ends, key, compute)));
  }
  await beside;
  // once more, into blocks that hold something else, and every byte checked
  await consumer.ask({ do: 'fill-cache', stream: POISON });
  const { source, target } = await (key.path === 'kept'
    ? keptRound(ends, key)
    : layersRound(ends, key, compute));
  const { wrong } = await consumer.ask({ do: 'check-cache', stream: SOURCE, source, target });
  if (wrong !== undefined)
    throw new PdError('KV_SHAPE_MISMATCH', `bytes differ from what was sent: ${wrong}`);
  const timed = took.slice(warmUp);
  const milliseconds = timed.map((round) => round.ms);
  return {
    ...key,
    bytes: bytesOf(shape, key),
    milliseconds,
    bestMs: best(milliseconds),
    medianMs: median(milliseconds),
    wantedMs: median(timed.map((round) => round.wantedMs)),
    ...stampsOf(took, warmUp),
    ...(compute && { keeps: median(alone.slice(warmUp)) / median(timed.map((round) => round.stepMs)) }),
  };
}

/** The two clocks are read together when the flag is seen; the soonest look of all tells how far they are apart. */
function stampsOf(rounds: readonly Round[], warmUp: number): Pick<NativeRow, 'stamped'> {
  const all = rounds.flatMap(({ flag }) => flag ?? []);
  const apart = Math.min(...all.map(({ seen, ended }) => seen - ended));
  const timed = rounds.slice(warmUp).flatMap(({ flag, at }) => (flag ? [{ ...flag, at }] : []));
  if (timed.length === 0) return {};
  return {
    stamped: {
      writeMs: median(timed.map(({ began, ended }) => ended - began)),
      kvMs: median(timed.map(({ began, seen }) => seen - (began + apart))),
      knownMs: median(timed.map(({ began, at }) => at - (began + apart))),
    },
  };
}

interface Round {
  /** The KV was there. */
  readonly at: number;
  /** Of the one request, by `direct`. */
  readonly flag: FlagTimes | undefined;
  readonly ms: number;
  readonly wantedMs: number;
  /** The producer's step, to its last layer computed. */
  readonly stepMs: number;
  /** Blocks of all requests, in one order. */
  readonly source: readonly number[];
  readonly target: readonly number[];
}

async function keptRound([producer, consumer]: readonly [Peer, Peer], key: RowKey): Promise<Round> {
  const ids = newIds(producer, consumer, key.inFlight);
  const { tokens } = key;
  const computed = await producer.ask({ do: 'prefill', ids, tokens, compute: false, abandon: false });
  const [wanted, loaded] = await wantAndLoad(consumer, ids, tokens, producer.address);
  const { timelines = [] } = await producer.ask({ do: 'timelines' });
  const bound = timelines
    .filter(({ id }) => ids.includes(id as TransferId))
    .flatMap(({ stages }) => stages.filter(({ stage }) => stage === 'bound').map(({ at }) => at));
  return roundOf(Math.min(...bound), { computed, wanted, loaded });
}

async function layersRound(
  [producer, consumer]: readonly [Peer, Peer],
  key: RowKey,
  compute: boolean,
): Promise<Round> {
  const ids = newIds(producer, consumer, key.inFlight);
  const { tokens } = key;
  const loading = wantAndLoad(consumer, ids, tokens, producer.address);
  // it may fail first
  loading.catch(() => undefined);
  await producer.ask({ do: 'asked', count: ids.length });
  const computed = await producer.ask({ do: 'prefill', ids, tokens, compute, abandon: false });
  const [wanted, loaded] = await loading;
  return roundOf(computed.at ?? 0, { computed, wanted, loaded });
}

/** Both said at once: a message to this end that came while its KV does would take of the time that is measured. */
export function wantAndLoad(
  consumer: Peer,
  ids: readonly TransferId[],
  tokens: number,
  peer: HostPort,
): Promise<[Reply, Reply]> {
  return Promise.all([consumer.ask({ do: 'want', ids, tokens, peer }), consumer.ask({ do: 'loaded', ids })]);
}

/** Milliseconds. */
async function unwantedStep([producer, consumer]: readonly [Peer, Peer], key: RowKey): Promise<number> {
  const ids = newIds(producer, consumer, key.inFlight);
  const step = { ids, tokens: key.tokens, compute: true, abandon: true };
  const { firstSendAt = 0, at = 0 } = await producer.ask({ do: 'prefill', ...step });
  return at - firstSendAt;
}

function roundOf(
  from: number,
  { computed, wanted, loaded }: { readonly computed: Reply; readonly wanted: Reply; readonly loaded: Reply },
): Round {
  const { at: to = 0, flags = [] } = loaded;
  return {
    at: to,
    flag: flags.length === 1 ? flags[0] : undefined,
    ms: to - from,
    wantedMs: to - (wanted.at ?? 0),
    stepMs: (computed.at ?? 0) - (computed.firstSendAt ?? 0),
    source: (computed.blocks ?? []).flat(),
    target: (wanted.blocks ?? []).flat(),
  };
}

let count = 0;

export function newIds(producer: Peer, consumer: Peer, inFlight: number): TransferId[] {
  return Array.from({ length: inFlight }, () => {
    const uuid = (++count).toString(16).padStart(32, '0');
    return transferIdOf(`cmpl-${proxyRequestId(producer.address, consumer.address, uuid)}-0`);
  });
}

function bytesOf(shape: KvShape, { tokens, inFlight }: RowKey): number {
  return inFlight * shape.layers * tensorBytesOf(shape, tokens);
}
