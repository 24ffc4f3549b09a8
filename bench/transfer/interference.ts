/** How much transfers slow down computation on the same GPU: iterations per second of a loop alone, and during continuous transfers. */
import { setTimeout as sleep } from 'node:timers/promises';
import { PdError } from '../../src/errors.ts';
import { monotonicMs } from '../measure/machine.ts';
import { type BenchOptions, type CheckRow, JobMaker, messageOf, startPeers } from './bench.ts';
import { COMPUTE_LOOPS, type ComputeLoop } from './messages.ts';
import type { Peer } from './peer.ts';

export interface InterferenceSettings {
  readonly loops: readonly ComputeLoop[];
  /** Duration of each measurement. */
  readonly ms: number;
  readonly tokens: number;
  /** Requests in flight. */
  readonly window: number;
}

export const DEFAULT_INTERFERENCE: InterferenceSettings = {
  loops: COMPUTE_LOOPS,
  ms: 2_000,
  tokens: 1_024,
  window: 2,
};

/** A loop must keep at least this fraction of its speed. */
const KEPT = 0.85;
/** Transfers run this long before the loop does. */
const RUN_UP_MS = 500;

export async function interference(
  options: BenchOptions,
  settings: InterferenceSettings,
): Promise<CheckRow[]> {
  if (options.devices.includes('host')) {
    throw new PdError('CONFIG_INVALID', '--devices: the compute loop needs GPUs: cuda:N,cuda:M');
  }
  const jobs = new JobMaker('beside', options.shape);
  const wants = { sendType: 'PUT_ASYNC', compute: true, jobs: [jobs.paged(settings.tokens)] } as const;
  const peers = await startPeers(options, {
    producer: { device: 0, ...wants },
    consumer: { device: 1, ...wants },
  });
  const rows: CheckRow[] = [];
  try {
    for (const loop of settings.loops) {
      for (const at of peers) {
        options.progress.say(`${loop} loop on the ${at.name}'s GPU`);
        rows.push(await measure(peers as [Peer, Peer], at, loop, settings, jobs));
      }
    }
  } finally {
    options.progress.end();
    await Promise.all(peers.map((peer) => peer.quit()));
  }
  return rows;
}

async function measure(
  [producer, consumer]: readonly [Peer, Peer],
  at: Peer,
  loop: ComputeLoop,
  { ms, tokens, window }: InterferenceSettings,
  jobs: JobMaker,
): Promise<CheckRow> {
  const name = `${loop} loop on the ${at.name}'s GPU`;
  try {
    const speed = async () => {
      const { iterations = 0, ms: took = 1 } = await at.ask({ do: 'compute', loop, ms });
      return (1_000 * iterations) / took;
    };
    const before = await speed();
    const job = jobs.paged(tokens);
    const draining = consumer.ask({ do: 'drain', job, peer: producer.address, window });
    const began = monotonicMs();
    const pumping = producer.ask({ do: 'pump', job, peer: consumer.address, window });
    // a failure of either is reported below
    draining.catch(() => undefined);
    pumping.catch(() => undefined);
    await sleep(RUN_UP_MS);
    const beside = await speed();
    await producer.ask({ do: 'stop' });
    const { count = 0, bytes = 0 } = await pumping;
    const gbps = bytes / (monotonicMs() - began) / 1e6;
    await consumer.ask({ do: 'stop', count });
    await draining;
    const after = await speed();
    // a GPU that warms up slows down by itself: compared with the mean of before and after
    const kept = beside / ((before + after) / 2);
    return {
      name,
      ok: kept >= KEPT,
      value: `keeps ${(100 * kept).toFixed(1)} % of its speed during ${gbps.toFixed(0)} GB/s of transfers (${count} requests of ${tokens} tokens); alone ${before.toFixed(0)} and ${after.toFixed(0)} per second, during them ${beside.toFixed(0)}`,
      data: { kept, before, beside, after, gbps, requests: count },
    };
  } catch (error) {
    return { name, ok: false, value: messageOf(error) };
  }
}
