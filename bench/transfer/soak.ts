/** Many requests of mixed sizes through one pair of engines: memory of device and process must not grow. */
import type { SendType } from '../../src/wire/messages.ts';
import { type BenchOptions, type CheckRow, JobMaker, messageOf, move, startPeers } from './bench.ts';
import type { Peer } from './peer.ts';
import { xorshift } from './shape.ts';

export interface SoakSettings {
  readonly sendType: SendType;
  readonly requests: number;
  /** Largest request, tokens. */
  readonly maxTokens: number;
  /** Requests before the readings that the end is compared with: device memory after the first of them, resident memory after all. */
  readonly settled: number;
}

export const DEFAULT_SOAK: SoakSettings = {
  sendType: 'PUT_ASYNC',
  requests: 1_000,
  maxTokens: 1_024,
  settled: 200,
};

/** Allowed growth of resident memory after `settled` requests. */
const RESIDENT_GROWTH = 0.05;
/** Without CUDA a process is so small that its JavaScript heaps vary by more than that between two collections. Bytes. */
const HEAP_SWING = 64 * 2 ** 20;

interface Reading {
  readonly device: number;
  readonly resident: number;
}

export async function soak(options: BenchOptions, settings: SoakSettings): Promise<CheckRow[]> {
  const { requests, settled, sendType, maxTokens } = settings;
  const name = `${requests} requests of 1 to ${maxTokens} tokens, ${sendType}`;
  const jobs = new JobMaker('soak', options.shape);
  const largest = jobs.paged(maxTokens);
  const flat = (tokens: number) => jobs.flat(options.shape.layers, tokens * 256 + 13);
  const random = xorshift(7);
  let peers: Peer[] = [];
  let done = 0;
  let bytes = 0;
  try {
    peers = await startPeers(options, {
      producer: { device: 0, sendType, jobs: [largest, flat(maxTokens)] },
      consumer: { device: 1, sendType, jobs: [largest, flat(maxTokens)] },
    });
    const [producer, consumer] = peers as [Peer, Peer];
    let before: Reading[] = [];
    let steady: Reading[] = [];
    for (; done < requests; done++) {
      if (done % 10 === 0) options.progress.say(name, done, requests);
      // the pair, its buffers and the kernels exist after the first one
      if (done === 1) before = await readings(peers);
      if (done === settled) steady = await readings(peers);
      const tokens = 1 + (random() % maxTokens);
      // now and then flat tensors of odd sizes
      const job = done % 8 === 7 ? flat(tokens) : jobs.paged(tokens);
      bytes += (await move(producer, consumer, job)).checkedBytes;
    }
    const after = await readings(peers);
    return [
      { name, ok: true, value: `${(bytes / 1e9).toFixed(1)} GB compared, every byte right`, data: { bytes } },
      ...peers.map((peer, i) => row(options, peer.name, before[i], steady[i], after[i], settings)),
    ];
  } catch (error) {
    return [{ name, ok: false, value: `after ${done}: ${messageOf(error)}` }];
  } finally {
    options.progress.end();
    await Promise.all(peers.map((peer) => peer.quit()));
  }
}

async function readings(peers: readonly Peer[]): Promise<Reading[]> {
  const replies = await Promise.all(peers.map((peer) => peer.ask({ do: 'memory' })));
  return replies.map(({ deviceUsedBytes = 0, residentBytes = 0 }) => ({
    device: deviceUsedBytes,
    resident: residentBytes,
  }));
}

function row(
  options: BenchOptions,
  name: string,
  before: Reading | undefined,
  steady: Reading | undefined,
  after: Reading | undefined,
  { requests, settled }: SoakSettings,
): CheckRow {
  if (!before || !steady || !after) {
    return {
      name: `${name}: memory`,
      ok: false,
      value: `no readings: ${requests} requests, settled after ${settled}`,
    };
  }
  const growth = after.resident / steady.resident - 1;
  const onHost = options.devices[0] === 'host';
  const allowed = onHost ? Math.max(RESIDENT_GROWTH, HEAP_SWING / steady.resident) : RESIDENT_GROWTH;
  const device = onHost ? 'no device memory' : `device memory ${signed(after.device - before.device)} bytes`;
  return {
    name: `${name}: memory after ${requests} requests`,
    ok: after.device === before.device && growth <= allowed,
    value: `${device} since the first; resident ${mib(after.resident)} MiB, ${signed(Number((growth * 100).toFixed(1)))} % since request ${settled} (allowed ${(100 * allowed).toFixed(0)} %)`,
    data: {
      deviceBefore: before.device,
      deviceAfter: after.device,
      residentSettled: steady.resident,
      residentAfter: after.resident,
    },
  };
}

const mib = (bytes: number) => (bytes / 2 ** 20).toFixed(0);
const signed = (value: number) => (value > 0 ? `+${value}` : String(value));
