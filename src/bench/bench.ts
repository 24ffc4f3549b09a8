/** What every part of the benchmark shares: options, peers on their devices, and one checked move from one peer to another. */
import type { ErrorCode } from '../errors.ts';
import { PdError } from '../errors.ts';
import type { LogLevel, SendType, TransferTimeouts } from '../transfer/types.ts';
import { BenchKv } from './kv.ts';
import type { FlatJob, Job, PagedJob } from './messages.ts';
import { Peer } from './peer.ts';
import type { Progress } from './progress.ts';
import type { KvShape } from './shape.ts';

export interface BenchOptions {
  /** Producers' and consumers': two GPUs, since NCCL refuses both ranks of a pair on one; or `host` twice. */
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
  /** The largest that it will be asked to hold. */
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

/** Starts several at once; where one fails, all are killed. */
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
  /** From the first send until the producer knows that all has left. */
  readonly sentMs: number;
  readonly movedBytes: number;
  readonly checkedBytes: number;
}

/** One job from one peer to another, every byte checked. Throws KV_SHAPE_MISMATCH where bytes differ, else what the engines fail with. */
export async function move(from: Peer, to: Peer, job: Job, timeoutMs?: number): Promise<Moved> {
  await Promise.all([
    from.ask({ do: 'fill', job, side: 'source' }),
    to.ask({ do: 'fill', job, side: 'target' }),
  ]);
  await to.ask({ do: 'arm', job, peer: from.address, ...(timeoutMs === undefined ? {} : { timeoutMs }) });
  const [sent, came] = await Promise.allSettled([
    from.ask({ do: 'send', job, peer: to.address }),
    to.ask({ do: 'wait', id: job.id }),
  ]);
  try {
    if (sent.status === 'rejected') throw sent.reason;
    if (came.status === 'rejected') throw came.reason;
    const { bytes, wrong } = await to.ask({ do: 'check', job });
    if (wrong !== undefined) throw new PdError('KV_SHAPE_MISMATCH', `bytes are not what was sent: ${wrong}`);
    const { firstSendAt = 0, sentAt = 0 } = sent.value;
    return {
      milliseconds: (came.value.usableAt ?? 0) - firstSendAt,
      sentMs: sentAt - firstSendAt,
      movedBytes: sent.value.bytes ?? 0,
      checkedBytes: bytes ?? 0,
    };
  } finally {
    for (const peer of [from, to]) {
      if (peer.alive) await peer.ask({ do: 'finish', id: job.id }).catch(() => undefined);
    }
  }
}

export function codeOf(error: unknown): ErrorCode {
  return PdError.from(error).code;
}

export function messageOf(error: unknown): string {
  const { code, message } = PdError.from(error);
  return `${code}: ${message}`;
}

/** Makes jobs; no two have an id, a block table or bytes in common. */
export class JobMaker {
  readonly #prefix: string;
  readonly #layers: number;
  #stream = 1;

  constructor(prefix: string, shape: KvShape) {
    this.#prefix = prefix;
    this.#layers = shape.layers;
  }

  paged(tokens: number): PagedJob {
    // layers of the source, and as many of what the target holds before
    const stream = this.#take(2 * this.#layers);
    return { kind: 'paged', id: `${this.#prefix}.${stream}`, tokens, stream };
  }

  flat(count: number, bytes: number, order?: 'reverse'): FlatJob {
    const stream = this.#take(count);
    return { kind: 'flat', id: `${this.#prefix}.${stream}`, count, bytes, stream, ...(order && { order }) };
  }

  #take(streams: number): number {
    const first = this.#stream;
    this.#stream += streams;
    return first;
  }
}
