/**
 * What the link itself achieves with the same bytes: the raw transport, flat and grouped, the device's copy, and one kernel that writes
 * paged blocks into the other GPU. No engine, no checks.
 */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';

import { CTAS_ALONE } from '../../src/transport/direct/writer.ts';
import { best, median } from '../measure/statistics.ts';
import { type BenchOptions, JobMaker, messageOf, startPeers } from './bench.ts';
import { DirectPeer, pair } from './direct-rig.ts';
import type { Peer } from './peer.ts';
import { blocksOf, blockTable, cacheBlocks, layoutOf, tensorBytesOf } from './shape.ts';

export const CEILINGS = ['raw-flat', 'raw-grouped', 'device-copy', 'kernel'] as const;
/**
 * `raw-flat`: one send of all bytes. `raw-grouped`: one group, a region per layer. Both from the sender's call to the receiver's
 * completion. `device-copy`: cudaMemcpyPeerAsync from GPU to GPU, or memcpy on the host. `kernel`: all layers by one launch, from the call
 * to the flag that the other process's CPU sees; between GPUs alone.
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
/** For a process to begin to watch. */
const WATCH_MS = 3;

export async function measureCeilings(
  options: BenchOptions,
  tokens: readonly number[],
  rounds: number,
): Promise<{ readonly ceilings: Ceiling[]; readonly errors: string[] }> {
  const ceilings: Ceiling[] = [];
  const errors: string[] = [];
  const { shape } = options;
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
  const [from, to] = options.devices;
  const onOne = from === to && from !== 'host';
  if (onOne) errors.push(`raw NCCL and cudaMemcpyPeerAsync are between GPUs, and both ends are on ${from}`);
  else errors.push(...(await measureRaw(options, tokens, rounds, add)));
  try {
    for (const [count, times] of await kernelTimes(options, tokens, rounds)) add('kernel', count, times);
  } catch (error) {
    errors.push(messageOf(error));
  }
  return { ceilings, errors };
}

/** Why it ended before its time. */
async function measureRaw(
  options: BenchOptions,
  tokens: readonly number[],
  rounds: number,
  add: (kind: CeilingKind, count: number, times: readonly number[]) => void,
): Promise<string[]> {
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
    return [];
  } catch (error) {
    return [messageOf(error)];
  } finally {
    await Promise.all(peers.map((peer) => peer.quit()));
  }
}

async function openRaw(sender: Peer, receiver: Peer): Promise<void> {
  const { uniqueId } = await sender.ask({ do: 'raw-id' });
  if (!uniqueId) return;
  await Promise.all([
    sender.ask({ do: 'raw-open', uniqueId, rank: 0 }),
    receiver.ask({ do: 'raw-open', uniqueId, rank: 1 }),
  ]);
}

/** By size; empty where a device is none that such a kernel reaches. */
async function kernelTimes(
  { devices, shape }: BenchOptions,
  tokens: readonly number[],
  rounds: number,
): Promise<Map<number, number[]>> {
  const times = new Map<number, number[]>();
  if (devices[0] === 'host') return times;
  const folder = mkdtempSync(join(tmpdir(), 'pd-bench-'));
  const [writer, owner] = devices.map(
    (name) => new DirectPeer(Number(name.replace('cuda:', '')), folder),
  ) as [DirectPeer, DirectPeer];
  try {
    const layout = layoutOf(shape, cacheBlocks(blocksOf(shape, Math.max(...tokens))));
    const { layers } = shape;
    for (const one of [writer, owner]) await one.ask({ do: 'cache', layout, layers });
    await pair(writer, owner);
    for (const [size, count] of tokens.entries()) {
      const blocks = blocksOf(shape, count);
      const [source, target] = [1, 2].map((seed) => [...blockTable(seed, blocks, layout.numBlocks)]);
      await writer.ask({ do: 'tables', source: source!, target: target! });
      const { slot = 0 } = await owner.ask({ do: 'grant', seq: size + 1 });
      const took: number[] = [];
      for (let mark = 1; mark <= rounds + WARM_UP; mark++) {
        const place = { seq: size + 1, slot, mark };
        const watching = owner.ask({ do: 'watch', ...place });
        watching.catch(() => undefined);
        await sleep(WATCH_MS);
        const { at = 0n } = await writer.ask({ do: 'write', ...place, each: layers, ctas: CTAS_ALONE });
        const seen = await watching;
        took.push(Number((seen.at ?? 0n) - at) / 1e6);
      }
      times.set(count, took);
    }
    return times;
  } finally {
    await Promise.all([writer, owner].map((one) => one.kill()));
    rmSync(folder, { recursive: true, force: true });
  }
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
