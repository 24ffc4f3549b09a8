/**
 * How fast direct writes reach a consumer: a short write into the scratch memory behind its blocks, timed on the GPU, beside what the link
 * should give. Once for each mapping, when this worker has nothing to do: it takes a few milliseconds of the core thread, and beside work it
 * would measure that. It begins with small writes that nobody counts: V8 compiles by them what a request's launches run through (rehearsal.ts).
 * A path below half of what its link should give such a write is tried again, since the other GPU may have been busy, and then warned about.
 *
 *   waiting --idle--> measured, or tried again --> measured
 *           \--never idle within a minute--> not measured
 */
import { readFileSync } from 'node:fs';
import type { CudaDevice } from '../../device/cuda/device.ts';
import type { EventPoller } from '../../device/poller.ts';
import { PdError } from '../../errors.ts';
import type { Logger } from '../../observability/log.ts';
import type { CacheClaims } from '../../transport/direct/claims.ts';
import type { WriterPage } from '../../transport/direct/page.ts';
import { type ExpectedPath, expectedPath, rateOfWrite } from '../../transport/direct/path.ts';
import type { DirectWriter } from '../../transport/direct/writer.ts';
import type { PathState } from './hand-over-api.ts';

/** A mapped cache. */
export interface TestedPath {
  readonly peer: string;
  readonly claims: CacheClaims;
  readonly writer: DirectWriter;
  readonly page: WriterPage;
}

interface SelfTestOptions {
  readonly device: CudaDevice;
  readonly poller: EventPoller;
  readonly log: Logger;
  /** Nothing is computed or written here. */
  readonly idle: () => boolean;
  /** A state has changed. */
  readonly onChange: () => void;
}

interface Measured {
  readonly bytesPerSecond: number;
  readonly latencySeconds: number;
  /** What its link should give a write of as many bytes. */
  readonly should: number | undefined;
}

interface Path {
  readonly tested: TestedPath;
  readonly expected: ExpectedPath;
  readonly since: number;
  /** Of the best so far. */
  best: Measured | undefined;
  tries: number;
  state: PathState;
}

const LOOK_MS = 250;
const PATIENCE_MS = 60_000;
/** Of one measurement; the best counts. */
const ROUNDS = 3;
/** Of a path that seems too slow. */
const TRIES = 3;
/** Not counted, before the first of them. */
const WARM_UP = 40;
/** Of the write that tells the latency: one block is the least. */
const SMALL = 1;
const TOO_SLOW = 0.5;
const WRITE_MS = 2_000;
const GB = 1e9;

export class SelfTests {
  readonly #options: SelfTestOptions;
  readonly #paths = new Map<TestedPath, Path>();
  #timer: NodeJS.Timeout | undefined;
  #testing = false;

  constructor(options: SelfTestOptions) {
    this.#options = options;
  }

  add(tested: TestedPath): void {
    const expected = expectedOf(this.#options.device, tested.claims);
    const state: PathState = { state: 'waiting' };
    const path: Path = {
      tested,
      expected,
      since: performance.now(),
      best: undefined,
      tries: 0,
      state,
    };
    this.#paths.set(tested, path);
    if (tested.claims.scratch) this.#arm();
    else this.#notMeasured(path, 'the consumer is of a version without memory for it');
  }

  /** Before its writer is closed. */
  remove(tested: TestedPath): void {
    this.#paths.delete(tested);
  }

  stateOf(tested: TestedPath): PathState | undefined {
    return this.#paths.get(tested)?.state;
  }

  close(): void {
    clearTimeout(this.#timer);
    this.#timer = undefined;
    this.#paths.clear();
  }

  #arm(): void {
    if (this.#timer || this.#testing) return;
    this.#timer = setTimeout(() => {
      this.#timer = undefined;
      void this.#look();
    }, LOOK_MS);
  }

  async #look(): Promise<void> {
    this.#testing = true;
    for (const path of this.#waiting()) {
      try {
        if (this.#options.idle()) await this.#test(path);
      } catch (error) {
        this.#notMeasured(path, PdError.from(error).message);
      }
      const late = performance.now() - path.since > PATIENCE_MS;
      if (path.state.state !== 'waiting' || !late) continue;
      if (path.best) this.#conclude(path, path.best);
      else this.#notMeasured(path, `this GPU was busy for ${PATIENCE_MS / 1_000} s`);
    }
    this.#testing = false;
    if (this.#waiting().length > 0) this.#arm();
  }

  #waiting(): Path[] {
    return [...this.#paths.values()].filter(({ state }) => state.state === 'waiting');
  }

  async #test(path: Path): Promise<void> {
    const { idle } = this.#options;
    const { claims } = path.tested;
    for (let round = 0; round < WARM_UP && path.tries === 0; round++) {
      if (!(await this.#write(path.tested, SMALL)) || !idle() || !this.#paths.has(path.tested)) return;
    }
    let [bytesPerSecond, latencySeconds] = [0, Number.POSITIVE_INFINITY];
    let should: number | undefined;
    for (let round = 0; round < ROUNDS; round++) {
      const large = await this.#write(path.tested, claims.scratch?.bytes ?? 0);
      const small = large && (await this.#write(path.tested, SMALL));
      if (large && large.gpuSeconds <= 0)
        throw new PdError('INTERNAL', 'the write of the self-test told no times');
      // what came meanwhile was measured too
      if (!large || !small || !idle() || !this.#paths.has(path.tested)) return;
      bytesPerSecond = Math.max(bytesPerSecond, large.bytes / large.gpuSeconds);
      latencySeconds = Math.min(latencySeconds, small.seconds);
      should = rateOfWrite(path.expected, large.bytes);
    }
    if (bytesPerSecond > (path.best?.bytesPerSecond ?? 0))
      path.best = { bytesPerSecond, latencySeconds, should };
    path.tries++;
    if (!path.best) return;
    if (path.tries === TRIES || !isSlow(path.best)) this.#conclude(path, path.best);
  }

  async #write({ writer, page }: TestedPath, atMost: number) {
    const began = performance.now();
    const bytes = writer.probe(atMost);
    if (bytes === undefined) return undefined;
    const { poller } = this.#options;
    await poller.drained(writer, WRITE_MS, "the self-test of a path into a consumer's cache");
    const gpuSeconds = Number(page.probeNanoseconds) / 1e9;
    return { bytes, gpuSeconds, seconds: (performance.now() - began) / 1_000 };
  }

  #conclude(path: Path, measured: Measured): void {
    const { should, ...best } = measured;
    const { link } = path.expected;
    const { peer } = path.tested;
    path.state = {
      state: 'measured',
      ...best,
      ...(should !== undefined && { expectedBytesPerSecond: should }),
      link,
    };
    this.#options.onChange();
    const rate = `${(best.bytesPerSecond / GB).toFixed(1)} GB/s`;
    const expected = should === undefined ? '' : `, which should give about ${(should / GB).toFixed(0)} GB/s`;
    const latency = `${(best.latencySeconds * 1_000).toFixed(3)} ms for a block`;
    const text = `direct writes to ${peer}: ${rate} over ${link}${expected}, ${latency}`;
    const { log } = this.#options;
    if (isSlow(measured))
      log.warn(
        { peer, link, ...best },
        `${text}: less than half. Is the link up, and is the other GPU busy?`,
      );
    else log.info({ peer, link, ...best }, text);
  }

  #notMeasured(path: Path, why: string): void {
    if (!this.#paths.has(path.tested)) return;
    path.state = { state: 'not measured', why };
    this.#options.onChange();
    const { peer } = path.tested;
    this.#options.log.info({ peer }, `direct writes to ${peer}: not measured, ${why}`);
  }
}

function isSlow({ bytesPerSecond, should }: Measured): boolean {
  return should !== undefined && bytesPerSecond < TOO_SLOW * should;
}

function expectedOf({ runtime, index }: CudaDevice, { gpu }: CacheClaims): ExpectedPath {
  if (!gpu) return { link: 'unknown' };
  const own = runtime.pciBusId(index);
  const all = Array.from({ length: runtime.deviceCount() }, (_, i) => i);
  const theirs = all.find((i) => runtime.pciBusId(i) === gpu.busId);
  const slots = [own, gpu.busId].map(pcieGtPerSecond);
  return expectedPath({
    sameGpu: own === gpu.busId,
    gpu: gpu.name,
    peerLink: theirs === undefined || theirs === index ? undefined : runtime.peerLink(index, theirs),
    pcieGtPerSecond: slots.every((rate) => rate !== undefined) ? Math.min(...slots) : undefined,
  });
}

/** Of a slot, as the kernel tells it: undefined where it does not. */
function pcieGtPerSecond(busId: string): number | undefined {
  const read = (name: string) =>
    Number.parseFloat(readFileSync(`/sys/bus/pci/devices/${busId.toLowerCase()}/${name}`, 'utf8'));
  try {
    const rate = read('max_link_speed') * read('max_link_width');
    return Number.isFinite(rate) ? rate : undefined;
  } catch {
    return undefined;
  }
}
