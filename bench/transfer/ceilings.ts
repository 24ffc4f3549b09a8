/** What the link itself achieves with the same bytes: the raw transport, flat and grouped, and the device's copy. No engine, no checks. */

import { best, median } from '../measure/statistics.ts';
import { type BenchOptions, JobMaker, messageOf, startPeers } from './bench.ts';
import type { Peer } from './peer.ts';
import { tensorBytesOf } from './shape.ts';

export const CEILINGS = ['raw-flat', 'raw-grouped', 'device-copy'] as const;
/**
 * `raw-flat`: one send of all bytes. `raw-grouped`: one group, a region per layer. Both from the sender's call to the receiver's
 * completion. `device-copy`: cudaMemcpyPeerAsync from GPU to GPU, or memcpy on the host.
 */
export type CeilingKind = (typeof CEILINGS)[number];

export interface Ceiling {
  readonly kind: CeilingKind;
  readonly tokens: number;
  readonly bytes: number;
  readonly bestMs: number;
  readonly medianMs: number;
  readonly bestGbps: number;
}

/** The first operations set links up. */
const WARM_UP = 3;

export async function measureCeilings(
  options: BenchOptions,
  tokens: readonly number[],
  rounds: number,
): Promise<{ readonly ceilings: Ceiling[]; readonly errors: string[] }> {
  const ceilings: Ceiling[] = [];
  const errors: string[] = [];
  const { shape } = options;
  const largest = new JobMaker('raw', shape).flat(shape.layers, tensorBytesOf(shape, Math.max(...tokens)));
  let peers: Peer[] = [];
  try {
    peers = await startPeers(options, {
      'raw sender': { device: 0, jobs: [largest] },
      'raw receiver': { device: 1, jobs: [largest] },
    });
    const [sender, receiver] = peers as [Peer, Peer];
    await openRaw(sender, receiver);
    const add = (kind: CeilingKind, count: number, times: readonly number[]) => {
      const warm = times.slice(WARM_UP);
      const bytes = shape.layers * tensorBytesOf(shape, count);
      const bestMs = best(warm);
      ceilings.push({
        kind,
        tokens: count,
        bytes,
        bestMs,
        medianMs: median(warm),
        bestGbps: bytes / bestMs / 1e6,
      });
    };
    for (const count of tokens) {
      const regions = Array<number>(shape.layers).fill(tensorBytesOf(shape, count));
      const whole = [shape.layers * tensorBytesOf(shape, count)];
      add('raw-flat', count, await rawTimes(sender, receiver, whole, rounds));
      add('raw-grouped', count, await rawTimes(sender, receiver, regions, rounds));
    }
    const copied = { target: options.devices[1], rounds: rounds + WARM_UP };
    for (const count of tokens) {
      const bytes = shape.layers * tensorBytesOf(shape, count);
      const { times = [] } = await sender.ask({ do: 'device-copy', bytes, ...copied });
      add('device-copy', count, times);
    }
  } catch (error) {
    errors.push(messageOf(error));
  } finally {
    await Promise.all(peers.map((peer) => peer.quit()));
  }
  return { ceilings, errors };
}

async function openRaw(sender: Peer, receiver: Peer): Promise<void> {
  const { uniqueId } = await sender.ask({ do: 'raw-id' });
  if (!uniqueId) return;
  await Promise.all([
    sender.ask({ do: 'raw-open', uniqueId, rank: 0 }),
    receiver.ask({ do: 'raw-open', uniqueId, rank: 1 }),
  ]);
}

/** Both processes read one clock, so that the difference is the time of the operation. */
async function rawTimes(
  sender: Peer,
  receiver: Peer,
  regions: readonly number[],
  rounds: number,
): Promise<number[]> {
  const receiving = receiver.ask({ do: 'raw-receive', regions, rounds: rounds + WARM_UP });
  receiving.catch(() => undefined);
  const { times: begun = [] } = await sender.ask({ do: 'raw-send', regions, rounds: rounds + WARM_UP });
  const { times: ended = [] } = await receiving;
  return begun.map((start, round) => (ended[round] ?? start) - start);
}
