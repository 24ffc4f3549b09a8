/** Gathers what is to be sent. The layers of one request that are asked for in one turn of the event loop cost one launch and one event. */
import type { EventRef, LayerTensor } from '../../device/device.ts';
import { PdError } from '../../errors.ts';
import { blockBytes } from '../../kv/layout.ts';
import { tensorBytes } from '../../wire/dtype.ts';
import { logTensor, passed, type TransferContext } from '../context.ts';
import type { Held } from '../kv-memory.ts';
import type { SendRequest } from '../types.ts';
import type { FormedRequest } from './form.ts';

/** Gathered together: what is to be sent next need not wait for all of a long prompt. */
const MAX_GATHER_BYTES = 256 * 2 ** 20;

export interface StageJob {
  readonly request: FormedRequest;
  readonly bytes: number;
  /** False: it is copied even where the transport could send from the source. */
  readonly mayLieInPlace: boolean;
  /** Memory for it alone, waiting if need be. Throws KV_BUFFER_FULL. */
  room(): Promise<Held>;
  /** It is in `held`, and its source may be overwritten; or, undefined, it can be sent from where it lies. */
  staged(held: Held | undefined): void;
  failed(error: unknown): void;
}

interface Placed {
  readonly job: StageJob;
  readonly held: Held | undefined;
}

export class Stager {
  readonly #context: TransferContext;
  #jobs: StageJob[] = [];
  #scheduled = false;

  constructor(context: TransferContext) {
    this.#context = context;
  }

  add(job: StageJob): void {
    this.#jobs.push(job);
    if (this.#scheduled) return;
    this.#scheduled = true;
    // After all messages of this turn, before anything waits.
    setImmediate(() => this.#flush());
  }

  #flush(): void {
    this.#scheduled = false;
    const jobs = this.#jobs;
    this.#jobs = [];
    let group: Placed[] = [];
    let bytes = 0;
    for (const job of jobs) {
      if (job.mayLieInPlace && sendsInPlace(this.#context, job.request)) {
        void this.#stage([{ job, held: undefined }]);
        continue;
      }
      const held = this.#context.memory.tryInTurn(job.bytes);
      if (!held) {
        void this.#placeAlone(job);
        continue;
      }
      const last = group[group.length - 1]?.job.request;
      // Layers wait for events of their own while the model computes: each group leaves as soon as its event has fired.
      if (last && (bytes + job.bytes > MAX_GATHER_BYTES || !sameEvent(last.ready, job.request.ready))) {
        void this.#stage(group);
        group = [];
        bytes = 0;
      }
      group.push({ job, held });
      bytes += job.bytes;
    }
    if (group.length > 0) void this.#stage(group);
  }

  async #placeAlone(job: StageJob): Promise<void> {
    let held: Held;
    try {
      held = await job.room();
    } catch (error) {
      job.failed(error);
      return;
    }
    await this.#stage([{ job, held }]);
  }

  /** All of `group` wait for one event, or for none. */
  async #stage(group: readonly Placed[]): Promise<void> {
    const [{ job: first }] = group as [Placed];
    const inPlace = group.every(({ held }) => !held);
    try {
      if (first.request.ready) this.#context.stream.wait(first.request.ready);
      if (!inPlace) this.#enqueue(group);
      if (!inPlace || first.request.ready) {
        await passed(
          this.#context,
          `${inPlace ? 'waiting for the source' : 'gather'} of ${first.request.tensorId}`,
        );
      }
    } catch (error) {
      for (const { job, held } of group) {
        // The gather may still write: its memory is given up rather than given to somebody else.
        if (this.#context.device.kind === 'host') held?.free();
        job.failed(error);
      }
      return;
    }
    for (const { job, held } of group) job.staged(held);
  }

  #enqueue(group: readonly Placed[]): void {
    const { device, stream } = this.#context;
    let layers: LayerTensor[] = [];
    let blocks: Int32Array | undefined;
    const gather = () => {
      if (blocks && layers.length > 0) device.gatherLayers(layers, blocks, stream);
      layers = [];
    };
    for (const { job, held } of group) {
      const { request } = job;
      const { source } = request;
      if (!held) throw new PdError('INTERNAL', `${request.tensorId} has no memory to be gathered in`);
      logTensor(this.#context, 'gather', request);
      if (source.kind === 'flat') {
        device.copy(held.memory, source.memory, stream);
        continue;
      }
      if (request.plan) {
        device.reblock('gather', source.layer.memory, held.memory, request.plan, stream);
        continue;
      }
      if (!blocks || !sameBlocks(blocks, source.blockIds)) {
        gather();
        blocks = source.blockIds;
      }
      layers.push({ layer: source.layer, tensor: held.memory });
    }
    gather();
  }
}

function sameEvent(a: EventRef | undefined, b: EventRef | undefined): boolean {
  if (!a || !b) return a === b;
  return a.kind === 'host' ? b.kind === 'host' : b.kind === 'cuda' && a.handle === b.handle;
}

function sameBlocks(a: Int32Array, b: Int32Array): boolean {
  return a === b || (a.length === b.length && a.every((id, index) => id === b[index]));
}

/** Throws KV_SHAPE_MISMATCH where shape and source have different sizes. Returns the bytes. */
export function checkSource(request: FormedRequest): number {
  const { tensorId, shape, dtype, source, plan } = request;
  const announced = tensorBytes(shape, dtype);
  if (plan) return announced;
  const there =
    source.kind === 'flat' ? source.memory.bytes : blockBytes(source.layer.layout) * source.blockIds.length;
  if (announced !== there) {
    throw new PdError(
      'KV_SHAPE_MISMATCH',
      `${tensorId}: shape [${shape}] of ${dtype} takes ${announced} bytes, the source has ${there}`,
      { tensorId },
    );
  }
  return announced;
}

/** Can the transport send from where the source lies? */
function sendsInPlace(context: TransferContext, request: SendRequest): boolean {
  const { source } = request;
  return source.kind === 'flat' && (context.device.kind === 'host' || source.memory.kind !== 'host');
}

/** Memory to stage in, waiting in line for it. Throws KV_BUFFER_FULL. */
export async function stagingMemory(
  context: TransferContext,
  request: SendRequest,
  bytes: number,
): Promise<Held> {
  const { memory, options } = context;
  const held = await memory.waitFor(bytes, options.timeouts.transfer);
  if (held) return held;
  throw new PdError(
    'KV_BUFFER_FULL',
    `no memory to gather ${request.tensorId} of ${bytes} bytes within ${options.timeouts.transfer} ms: ` +
      `${memory.bufferUsed} of ${memory.thresholdBytes} bytes of the buffer and ${memory.poolUsed} of ` +
      `${memory.limitBytes} bytes of the host pool are used`,
    { tensorId: request.tensorId },
  );
}
