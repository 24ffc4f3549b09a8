/** The result of a part of the benchmark: one JSON document with the numbers and what they were measured on. */
import { PdError } from '../../src/errors.ts';
import { type Environment, type Machine, monotonicMs, readMachine } from '../measure/machine.ts';
import { best } from '../measure/statistics.ts';
import type { BenchOptions, CheckRow } from './bench.ts';
import { JobMaker, messageOf, startPeer } from './bench.ts';
import type { TransferResult } from './transfer.ts';

export const PARTS = ['transfer', 'exchange', 'soak', 'faults', 'interference'] as const;
export type Part = (typeof PARTS)[number];

export interface PartResult {
  readonly part: Part;
  /** Everything moved, every byte was right, no limit was exceeded. */
  readonly ok: boolean;
  readonly startedAt: string;
  readonly seconds: number;
  readonly command: string;
  readonly devices: readonly string[];
  readonly options: Readonly<Record<string, unknown>>;
  readonly machine: Machine;
  readonly environment: Environment;
  /** How well a peer's clock agrees with the benchmark's. */
  readonly clock: ClockCheck;
  readonly transfer?: TransferResult;
  readonly rows?: readonly CheckRow[];
  /** Why the part did not finish. */
  readonly error?: string;
}

export interface ClockCheck {
  /** A peer's reading was between two of ours that are this far apart, milliseconds. */
  readonly withinMs: number;
  readonly agrees: boolean;
}

export type PartWork = () => Promise<{ readonly transfer: TransferResult } | { readonly rows: CheckRow[] }>;

const CLOCK_READINGS = 20;

export async function runPart(
  part: Part,
  command: string,
  options: BenchOptions,
  work: PartWork,
): Promise<PartResult> {
  const startedAt = new Date().toISOString();
  const start = monotonicMs();
  const { environment, clock } = await surroundings(options).catch((error: unknown) => {
    throw withWayOut(PdError.from(error));
  });
  const { progress: _, ...plain } = options;
  const common = {
    part,
    startedAt,
    command,
    devices: options.devices,
    options: plain,
    machine: await readMachine(),
    environment,
    clock,
  };
  const seconds = () => Math.round((monotonicMs() - start) / 100) / 10;
  try {
    const done = await work();
    return { ...common, ok: clock.agrees && isRight(done), seconds: seconds(), ...done };
  } catch (error) {
    return { ...common, ok: false, seconds: seconds(), error: messageOf(error) };
  } finally {
    options.progress.end();
  }
}

function withWayOut(error: PdError): PdError {
  if (error.code !== 'LIBRARY_NOT_FOUND' && error.code !== 'DEVICE_UNAVAILABLE') return error;
  const message = `${error.message}. Without two GPUs: --device host`;
  return new PdError(error.code, message, error.context, { cause: error });
}

function isRight(done: Awaited<ReturnType<PartWork>>): boolean {
  if ('rows' in done) return done.rows.every((row) => row.ok);
  const { native = [], rows } = done.transfer;
  return [...native, ...rows].every((row) => row.error === undefined);
}

/** Found out by a separate process, since it creates a context on every GPU. */
async function surroundings(
  options: BenchOptions,
): Promise<{ readonly environment: Environment; readonly clock: ClockCheck }> {
  const jobs = [new JobMaker('probe', options.shape).flat(1, 256)];
  const peer = await startPeer(options, 'environment probe', { device: 0, jobs });
  try {
    const { environment = { libraries: [], gpus: [] } } = await peer.ask({ do: 'environment' });
    const spans: number[] = [];
    let agrees = true;
    for (let i = 0; i < CLOCK_READINGS; i++) {
      const before = monotonicMs();
      const { at = 0 } = await peer.ask({ do: 'clock' });
      const after = monotonicMs();
      spans.push(after - before);
      agrees &&= before <= at && at <= after;
    }
    return { environment, clock: { withinMs: best(spans), agrees } };
  } finally {
    await peer.quit();
  }
}
