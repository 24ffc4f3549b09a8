/** Engines that send to each other at once: in both directions between two, and crosswise between two producers and two consumers. */

import { monotonicMs } from '../measure/machine.ts';
import { type BenchOptions, type CheckRow, JobMaker, messageOf, move, startPeers } from './bench.ts';
import type { Job } from './messages.ts';
import type { Peer } from './peer.ts';

const MIB = 2 ** 20;

export interface ExchangeSettings {
  /** Tensors in each direction. */
  readonly tensors: number;
  readonly tensorBytes: number;
  /** One tensor of the crossing: large, so that NCCL's own buffers cannot hide a deadlock. */
  readonly crossingBytes: number;
  readonly crossingTensors: number;
  readonly crossingRounds: number;
}

export const DEFAULT_EXCHANGE: ExchangeSettings = {
  tensors: 1_000,
  tensorBytes: 64 * 1_024,
  crossingBytes: 256 * MIB,
  crossingTensors: 2,
  crossingRounds: 3,
};

export async function exchange(options: BenchOptions, settings: ExchangeSettings): Promise<CheckRow[]> {
  return [await bothWays(options, settings), ...(await crossing(options, settings))];
}

async function bothWays(options: BenchOptions, settings: ExchangeSettings): Promise<CheckRow> {
  const { tensors, tensorBytes } = settings;
  const name = `two engines PUT ${tensors} tensors of ${sizeOf(tensorBytes)} to each other at once`;
  options.progress.say(name);
  const there = new JobMaker('there', options.shape).flat(tensors, tensorBytes);
  const back = new JobMaker('back', options.shape).flat(tensors, tensorBytes);
  let peers: Peer[] = [];
  try {
    peers = await startPeers(options, {
      'engine A': { device: 0, sendType: 'PUT_ASYNC', jobs: [there] },
      'engine B': { device: 1, sendType: 'PUT_ASYNC', jobs: [back] },
    });
    const [a, b] = peers as [Peer, Peer];
    return await together(name, [
      [a, b, there],
      [b, a, back],
    ]);
  } catch (error) {
    return { name, ok: false, value: messageOf(error) };
  } finally {
    await Promise.all(peers.map((peer) => peer.quit()));
  }
}

async function crossing(options: BenchOptions, settings: ExchangeSettings): Promise<CheckRow[]> {
  const { crossingBytes, crossingTensors, crossingRounds } = settings;
  const name = `2 producers x 2 consumers, ${4 * crossingTensors} tensors of ${sizeOf(crossingBytes)} in crossing order`;
  const rows: CheckRow[] = [];
  let peers: Peer[] = [];
  const sample = new JobMaker('sample', options.shape).flat(crossingTensors, crossingBytes);
  const buffer = Math.min(options.kvBufferSize, 8 * crossingTensors * crossingBytes);
  try {
    const wants = { sendType: 'PUT_ASYNC', jobs: [sample], kvBufferSize: buffer } as const;
    peers = await startPeers(options, {
      'producer A': { device: 0, ...wants },
      'producer B': { device: 0, ...wants },
      'consumer C': { device: 1, ...wants },
      'consumer D': { device: 1, ...wants },
    });
    const [a, b, c, d] = peers as [Peer, Peer, Peer, Peer];
    for (let round = 1; round <= crossingRounds; round++) {
      options.progress.say(`${name}, round ${round}`);
      // A sends to C first and B to D first; crosswise the last tensor goes first. Both jobs of a producer have the same source, so the same bytes
      const half = (id: string, order?: 'reverse') => ({
        ...sample,
        id: `${id}.${round}`,
        stream: round * crossingTensors,
        ...(order && { order }),
      });
      const one = `${name}, round ${round}`;
      const [ac, ad, bd, bc] = [half('ac'), half('ad', 'reverse'), half('bd'), half('bc', 'reverse')];
      rows.push(
        await together(one, [
          [a, c, ac],
          [a, d, ad],
          [b, d, bd],
          [b, c, bc],
        ]),
      );
    }
  } catch (error) {
    rows.push({ name, ok: false, value: messageOf(error) });
  } finally {
    await Promise.all(peers.map((peer) => peer.quit()));
  }
  return rows;
}

/** Moves all at once. The time is that of the longest, from its first send to its last tensor usable, without checks. */
async function together(name: string, moves: readonly (readonly [Peer, Peer, Job])[]): Promise<CheckRow> {
  const start = monotonicMs();
  const done = await Promise.allSettled(moves.map(([from, to, job]) => move(from, to, job)));
  const failed = done.flatMap((one) => (one.status === 'rejected' ? [messageOf(one.reason)] : []));
  if (failed.length > 0) return { name, ok: false, value: failed.join('; ') };
  const moved = done.flatMap((one) => (one.status === 'fulfilled' ? [one.value] : []));
  const bytes = moved.reduce((sum, one) => sum + one.movedBytes, 0);
  const longest = Math.max(...moved.map((one) => one.milliseconds));
  const value = `${longest.toFixed(1)} ms for the longest, ${sizeOf(bytes)} in all, every byte right`;
  return { name, ok: true, value, data: { milliseconds: longest, bytes, wholeMs: monotonicMs() - start } };
}

export function sizeOf(bytes: number): string {
  if (bytes >= MIB) return `${(bytes / MIB).toFixed(bytes % MIB === 0 ? 0 : 1)} MiB`;
  return bytes >= 1_024 ? `${(bytes / 1_024).toFixed(0)} KiB` : `${bytes} bytes`;
}
