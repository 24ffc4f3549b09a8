/** What every part of the benchmark shares: options, peers on their devices, and one checked move from one peer to another. */

import type { TransferTimeouts } from '../../src/config/transfer-options.ts';
import { PdError } from '../../src/errors.ts';
import type { LogLevel } from '../../src/observability/log-options.ts';
import type { SendType } from '../../src/wire/messages.ts';
import type { Progress } from '../measure/progress.ts';
import { BenchKv } from './kv.ts';
import type { EndSetup, FlatJob, Job, PagedJob } from './messages.ts';
import { Peer } from './peer.ts';
import type { KvShape } from './shape.ts';

export interface BenchOptions {
  /** Of producers and of consumers: two GPUs, since NCCL refuses both ranks of a pair on one; by `direct` alone also one GPU twice; or `host` twice. */
  readonly devices: readonly [string, string];
  readonly shape: KvShape;
  /** Device memory for received KV, per engine, bytes. */
  readonly kvBufferSize: number;
  readonly memPoolSize: number;
  readonly ncclNumChannels: number;
  readonly timeouts: TransferTimeouts;
  readonly logLevel: LogLevel;
  readonly progress: Progress;
}

/** One line of a part's result. */
export interface CheckRow {
  readonly name: string;
  readonly ok: boolean;
  /** For people. */
  readonly value: string;
  /** For programs. */
  readonly data?: Readonly<Record<string, number | string | boolean>>;
}

export interface PeerWants {
  readonly device: 0 | 1;
  readonly sendType?: SendType;
  readonly port?: number;
  readonly compute?: boolean;
  /** Instead of `sendType`: an end of the product's hand-over. */
  readonly end?: Pick<EndSetup, 'role' | 'transport' | 'blocks'>;
  /** The largest jobs that it will have to hold. */
  readonly jobs: readonly Job[];
  readonly timeouts?: Partial<TransferTimeouts>;
  readonly kvBufferSize?: number;
}

export function startPeer(options: BenchOptions, name: string, wants: PeerWants): Promise<Peer> {
  const { shape, ncclNumChannels } = options;
  const largest = (of: (shape: KvShape, job: Job) => number) =>
    Math.max(...wants.jobs.map((job) => of(shape, job)));
  return Peer.start(name, {
    device: options.devices[wants.device],
    shape,
    areaBytes: largest(BenchKv.areaBytes),
    largestBytes: largest(BenchKv.largestBytes),
    ncclNumChannels,
    compute: wants.compute ?? false,
    ...(wants.end && {
      end: {
        ...wants.end,
        // what a worker takes by default, unless there is less
        kvBufferSize: Math.min(options.kvBufferSize, 1e9),
        timeouts: options.timeouts,
        logLevel: options.logLevel,
      },
    }),
    ...(wants.sendType && {
      engine: {
        sendType: wants.sendType,
        port: wants.port ?? 0,
        kvBufferSize: wants.kvBufferSize ?? options.kvBufferSize,
        memPoolSize: options.memPoolSize,
        timeouts: { ...options.timeouts, ...wants.timeouts },
        logLevel: options.logLevel,
      },
    }),
  });
}

/** Starts several at once; if one fails, all are killed. */
export async function startPeers(
  options: BenchOptions,
  wanted: Readonly<Record<string, PeerWants>>,
): Promise<Peer[]> {
  const started = await Promise.allSettled(
    Object.entries(wanted).map(([name, wants]) => startPeer(options, name, wants)),
  );
  const peers = started.flatMap((one) => (one.status === 'fulfilled' ? [one.value] : []));
  const failed = started.find((one) => one.status === 'rejected');
  if (!failed) return peers;
  await Promise.all(peers.map((peer) => peer.kill()));
  throw failed.reason;
}

export interface Moved {
  /** From the first send to the last tensor usable. */
  readonly milliseconds: number;
  /** From the first send until the producer knows that everything has been sent. */
  readonly sentMs: number;
  readonly movedBytes: number;
}

export interface Checked extends Moved {
  readonly checkedBytes: number;
}

/** One job from one peer to another, every byte checked. Throws KV_SHAPE_MISMATCH if bytes differ, else the errors of the engines. */
export async function move(from: Peer, to: Peer, job: Job, timeoutMs?: number): Promise<Checked> {
  const [moved] = await moveRow(from, to, [job], timeoutMs);
  return moved!;
}

/** Jobs with the same content, one after another without a pause; then every byte of each is checked. Throws as `move`. */
export async function moveRow(
  from: Peer,
  to: Peer,
  jobs: readonly Job[],
  timeoutMs?: number,
): Promise<Checked[]> {
  const [first] = jobs;
  if (!first) return [];
  const filling = jobs.map((job) => to.ask({ do: 'fill', job, side: 'target' }));
  await Promise.all([from.ask({ do: 'fill', job: first, side: 'source' }), ...filling]);
  try {
    const moved: Moved[] = [];
    for (const job of jobs) moved.push(await moveOnce(from, to, job, timeoutMs));
    const checked: Checked[] = [];
    for (const [i, job] of jobs.entries()) {
      const { bytes = 0, wrong } = await to.ask({ do: 'check', job });
      if (wrong !== undefined)
        throw new PdError('KV_SHAPE_MISMATCH', `bytes differ from what was sent: ${wrong}`);
      checked.push({ ...moved[i]!, checkedBytes: bytes });
    }
    return checked;
  } finally {
    for (const { id } of jobs) {
      for (const peer of [from, to]) {
        if (peer.alive) await peer.ask({ do: 'finish', id }).catch(() => undefined);
      }
    }
  }
}

/** Neither filled nor checked. */
async function moveOnce(from: Peer, to: Peer, job: Job, timeoutMs?: number): Promise<Moved> {
  await to.ask({ do: 'arm', job, peer: from.address, ...(timeoutMs === undefined ? {} : { timeoutMs }) });
  const [sent, came] = await Promise.allSettled([
    from.ask({ do: 'send', job, peer: to.address }),
    to.ask({ do: 'wait', id: job.id }),
  ]);
  if (sent.status === 'rejected') throw sent.reason;
  if (came.status === 'rejected') throw came.reason;
  const { firstSendAt = 0, sentAt = 0, bytes = 0 } = sent.value;
  return {
    milliseconds: (came.value.usableAt ?? 0) - firstSendAt,
    sentMs: sentAt - firstSendAt,
    movedBytes: bytes,
  };
}

export function messageOf(error: unknown): string {
  const { code, message } = PdError.from(error);
  return `${code}: ${message}`;
}

/** Creates jobs; no two share an id, a block table or bytes. */
export class JobMaker {
  readonly #prefix: string;
  readonly #layers: number;
  #stream = 1;

  constructor(prefix: string, shape: KvShape) {
    this.#prefix = prefix;
    this.#layers = shape.layers;
  }

  paged(tokens: number): PagedJob {
    // for the layers of the source, and as many for what the target holds before
    const stream = this.#take(2 * this.#layers);
    return { kind: 'paged', id: `${this.#prefix}.${stream}`, tokens, stream, seed: stream, slot: 0 };
  }

  flat(count: number, bytes: number, order?: 'reverse'): FlatJob {
    const stream = this.#take(count);
    return { kind: 'flat', id: `${this.#prefix}.${stream}`, count, bytes, stream, ...(order && { order }) };
  }

  /** `count` jobs that send what `first` sends, from and to different blocks in separate slots: each can be checked when all are done. */
  row<T extends Job>(first: T, count: number): T[] {
    return Array.from({ length: count }, (_, n) => {
      const id = `${first.id}.${n}`;
      return first.kind === 'flat' ? { ...first, id } : { ...first, id, slot: n, seed: first.seed + n };
    });
  }

  #take(streams: number): number {
    const first = this.#stream;
    this.#stream += streams;
    return first;
  }
}
