/**
 * How long the KV of one request takes from GPU to GPU: by the product's hand-over, and by the frozen wire in every send type, with and
 * without gather and scatter; next to the ceilings.
 */
import { SEND_TYPES, type SendType } from '../../src/wire/messages.ts';
import { best, median } from '../measure/statistics.ts';
import { type BenchOptions, JobMaker, messageOf, moveRow, startPeers } from './bench.ts';
import { type Ceiling, measureCeilings } from './ceilings.ts';
import type { Job } from './messages.ts';
import { measureNative, type NativeRow, type NativeSettings, STARTED_ROUNDS } from './native.ts';
import type { Peer } from './peer.ts';
import { type KvShape, tensorBytesOf } from './shape.ts';

export const SOURCES = ['paged', 'flat'] as const;
/** `paged`: blocks gathered at the producer and scattered at the consumer. `flat`: dense tensors, with neither. */
export type SourceKind = (typeof SOURCES)[number];

const TOKENS = [16, 256, 1_024, 4_096, 16_384] as const;

export const WIRES = ['native', 'frozen'] as const;

export interface TransferSettings {
  readonly wires: readonly (typeof WIRES)[number][];
  readonly sendTypes: readonly SendType[];
  readonly sources: readonly SourceKind[];
  readonly tokens: readonly number[];
  /** Timed. */
  readonly rounds: number;
  /** Before them, without a pause, and checked like them. All of these rounds together are preceded by as many untimed ones. */
  readonly warmUp: number;
  readonly native: Pick<NativeSettings, 'transports' | 'inFlight' | 'manyTokens'>;
}

export const DEFAULT_TRANSFER: Omit<TransferSettings, 'native'> = {
  wires: WIRES,
  sendTypes: SEND_TYPES,
  sources: SOURCES,
  tokens: TOKENS,
  rounds: 5,
  warmUp: 2,
};

export interface TransferRow {
  readonly sendType: SendType;
  readonly source: SourceKind;
  readonly tokens: number;
  readonly bytes: number;
  /** From the first send to the last tensor usable on the consumer, each warm round. */
  readonly milliseconds: readonly number[];
  readonly bestMs: number;
  readonly medianMs: number;
  /** Of the best and the median round, 10^9 bytes per second. */
  readonly bestGbps: number;
  readonly medianGbps: number;
  /** Median until the producer knows that everything has been sent. */
  readonly sentMs: number;
  /** Over all rounds, warm-up included. */
  readonly checkedBytes: number;
  /** Absent if every round moved and every byte was right. */
  readonly error?: string;
}

export interface TransferResult {
  readonly settings: Omit<TransferSettings, 'native'>;
  /** Absent in reports from before there were any. */
  readonly native?: readonly NativeRow[];
  /** By the frozen wire. */
  readonly rows: readonly TransferRow[];
  readonly ceilings: readonly Ceiling[];
  /** Ceilings that could not be measured, and why. */
  readonly ceilingErrors: readonly string[];
}

export async function measureTransfer(
  options: BenchOptions,
  settings: TransferSettings,
): Promise<TransferResult> {
  const { progress } = options;
  const { wires, rounds, warmUp } = settings;
  const total = settings.sendTypes.length * settings.sources.length * settings.tokens.length;
  progress.say('ceilings: raw transport and device copy');
  const { ceilings, errors } = await measureCeilings(options, settings.tokens, settings.rounds);
  const native = wires.includes('native')
    ? {
        native: await measureNative(options, { ...settings.native, tokens: settings.tokens, rounds, warmUp }),
      }
    : undefined;
  const rows: TransferRow[] = [];
  for (const sendType of wires.includes('frozen') ? settings.sendTypes : []) {
    let peers: [Peer, Peer] | undefined;
    const jobs = new JobMaker(sendType.toLowerCase(), options.shape);
    for (const source of settings.sources) {
      for (const tokens of settings.tokens) {
        progress.say(`${sendType}, ${source}, ${tokens} tokens`, rows.length, total);
        try {
          if (!peers) {
            peers = await startPair(options, settings, sendType);
            await getStarted(peers, options.shape, settings, jobs);
          }
          rows.push(await measureRow(peers, options.shape, settings, jobs, { sendType, source, tokens }));
        } catch (error) {
          rows.push(failedRow(options.shape, { sendType, source, tokens }, messageOf(error)));
          // a failed row must not affect the next
          await Promise.all((peers ?? []).map((peer) => peer.kill()));
          peers = undefined;
        }
      }
    }
    await Promise.all((peers ?? []).map((peer) => peer.quit()));
  }
  progress.end();
  return { settings, ...native, rows, ceilings, ceilingErrors: errors };
}

type RowKey = Pick<TransferRow, 'sendType' | 'source' | 'tokens'>;

async function startPair(
  options: BenchOptions,
  settings: TransferSettings,
  sendType: SendType,
): Promise<[Peer, Peer]> {
  const samples = new JobMaker('sample', options.shape);
  const jobs = settings.sources.map((source) =>
    jobOf(samples, options.shape, source, Math.max(...settings.tokens)),
  );
  // every round goes to its own caches, so that each can be checked afterwards
  const rows = jobs.flatMap((job) => samples.row(job, settings.warmUp + settings.rounds));
  const [producer, consumer] = await startPeers(options, {
    producer: { device: 0, sendType, jobs },
    consumer: { device: 1, sendType, jobs: rows },
  });
  return [producer!, consumer!];
}

/** Nobody counts these. */
async function getStarted(
  [producer, consumer]: readonly [Peer, Peer],
  shape: KvShape,
  { sources, tokens, warmUp, rounds }: TransferSettings,
  jobs: JobMaker,
): Promise<void> {
  const few = Math.min(shape.blockSize, ...tokens);
  for (const source of sources) {
    for (let round = 0; round < STARTED_ROUNDS; round += warmUp + rounds) {
      await moveRow(producer, consumer, jobs.row(jobOf(jobs, shape, source, few), warmUp + rounds));
    }
  }
}

function jobOf(jobs: JobMaker, shape: KvShape, source: SourceKind, tokens: number): Job {
  return source === 'paged' ? jobs.paged(tokens) : jobs.flat(shape.layers, tensorBytesOf(shape, tokens));
}

async function measureRow(
  [producer, consumer]: readonly [Peer, Peer],
  shape: KvShape,
  settings: TransferSettings,
  jobs: JobMaker,
  key: RowKey,
): Promise<TransferRow> {
  const row = () => {
    const job = jobOf(jobs, shape, key.source, key.tokens);
    // without a pause between them, as under load; a GPU that has been idle is slower by itself
    return moveRow(producer, consumer, jobs.row(job, settings.warmUp + settings.rounds));
  };
  // the first row touches all the memory that the second, timed one will use
  const untimed = await row();
  const moves = await row();
  const warm = moves.slice(settings.warmUp);
  const milliseconds = warm.map((moved) => moved.milliseconds);
  const bytes = shape.layers * tensorBytesOf(shape, key.tokens);
  const bestMs = best(milliseconds);
  const medianMs = median(milliseconds);
  return {
    ...key,
    bytes,
    milliseconds,
    bestMs,
    medianMs,
    bestGbps: bytes / bestMs / 1e6,
    medianGbps: bytes / medianMs / 1e6,
    sentMs: median(warm.map((moved) => moved.sentMs)),
    checkedBytes: [...untimed, ...moves].reduce((sum, moved) => sum + moved.checkedBytes, 0),
  };
}

function failedRow(shape: KvShape, key: RowKey, error: string): TransferRow {
  const bytes = shape.layers * tensorBytesOf(shape, key.tokens);
  const nothing = { bestMs: 0, medianMs: 0, bestGbps: 0, medianGbps: 0, sentMs: 0, checkedBytes: 0 };
  return { ...key, bytes, milliseconds: [], ...nothing, error };
}
