/** What a peer does with its engine: sends, loads and receives jobs the way the connector does, and times them. */
import type { Device, Stream } from '../../src/device/device.ts';
import { PdError } from '../../src/errors.ts';
import { wireShape } from '../../src/kv/families.ts';
import type { HostPort } from '../../src/net/address.ts';
import type { TransferEngineApi } from '../../src/transfer/engine.ts';
import type { SendRequest, StoredTensor } from '../../src/transfer/types.ts';
import { type TensorId, type TransferId, tensorIdOf } from '../../src/wire/ids.ts';
import type { SendType } from '../../src/wire/messages.ts';
import { monotonicMs } from '../measure/machine.ts';
import type { BenchKv } from './kv.ts';
import type { FlatJob, Job, PagedJob, Reply } from './messages.ts';

type Arrival =
  | { readonly usableAt: number; readonly tensors: readonly StoredTensor[] }
  | { readonly error: PdError };

export class PeerJobs {
  readonly #engine: TransferEngineApi;
  readonly #sendType: SendType;
  readonly #kv: BenchKv;
  readonly #armed = new Map<string, Promise<Arrival>>();
  readonly #came = new Map<string, readonly StoredTensor[]>();
  /** End of `pump` and `drain`: infinite until `stop`. */
  #last = Number.POSITIVE_INFINITY;
  /** Loads of `drain` in flight: number of the request and its id. */
  readonly #draining = new Map<number, string>();
  /** Sends wait for its work. There is none, since everything was written before. */
  readonly #stream: Stream;

  constructor(device: Device, engine: TransferEngineApi, sendType: SendType, kv: BenchKv) {
    this.#stream = device.createStream();
    this.#engine = engine;
    this.#sendType = sendType;
    this.#kv = kv;
  }

  /** Resolves once the transfer thread has the load, so that it is already waiting when the KV is sent. */
  async arm(job: Job, peer: HostPort, timeoutMs?: number): Promise<void> {
    const arrival = this.#arrival(job, peer, timeoutMs).then(
      (tensors) => ({ usableAt: monotonicMs(), tensors }),
      (error: unknown) => ({ error: PdError.from(error) }),
    );
    this.#armed.set(job.id, arrival);
    await this.#engine.state();
  }

  async wait(id: string): Promise<Reply> {
    const armed = this.#armed.get(id);
    if (!armed) throw new PdError('INTERNAL', `${id} has not been armed`);
    const arrival = await armed;
    this.#armed.delete(id);
    if ('error' in arrival) throw arrival.error;
    this.#came.set(id, arrival.tensors);
    return { usableAt: arrival.usableAt };
  }

  async send(job: Job, peer: HostPort): Promise<Reply> {
    const requests = this.#requests(job, peer);
    const firstSendAt = monotonicMs();
    const bytes = await this.#sendAll(requests);
    return { firstSendAt, sentAt: monotonicMs(), bytes };
  }

  check(job: Job): Promise<Reply> {
    if (job.kind === 'paged') return this.#kv.checkPaged(job);
    const tensors = (this.#came.get(job.id) ?? []).map(({ memory }) => memory);
    return this.#kv.checkFlat(job, job.order === 'reverse' ? tensors.reverse() : tensors);
  }

  finish(id: string): void {
    this.#came.delete(id);
    this.#engine.finish(id as TransferId);
  }

  /** Request after request until `stop`. */
  async pump(job: PagedJob, peer: HostPort, window: number): Promise<Reply> {
    this.#last = Number.POSITIVE_INFINITY;
    let bytes = 0;
    const count = await windowed(
      window,
      () => this.#last,
      async (n) => {
        const id = `${job.id}.${n}`;
        bytes += await this.#sendAll(this.#requests({ ...job, id }, peer));
        // in GET the consumer fetches it later
        this.#engine.finish(id as TransferId, { keepSends: true });
      },
    );
    return { count, bytes };
  }

  /** Loads what `pump` sends. Requests that were never sent are cancelled at `stop`. */
  async drain(job: PagedJob, peer: HostPort, window: number): Promise<Reply> {
    this.#last = Number.POSITIVE_INFINITY;
    let count = 0;
    await windowed(
      window,
      () => this.#last,
      async (n) => {
        const id = `${job.id}.${n}`;
        this.#draining.set(n, id);
        try {
          await this.#arrival({ ...job, id }, peer);
          count++;
        } catch (error) {
          if (n < this.#last) throw error;
        } finally {
          this.#draining.delete(n);
          this.#engine.finish(id as TransferId);
        }
      },
    );
    return { count };
  }

  stop(count: number | undefined): void {
    this.#last = count ?? 0;
    for (const [n, id] of this.#draining) if (n >= this.#last) this.#engine.cancelLoad(id);
  }

  #arrival(job: Job, peer: HostPort, timeoutMs?: number): Promise<readonly StoredTensor[]> {
    const timeout = timeoutMs === undefined ? {} : { timeoutMs };
    if (job.kind === 'flat') {
      return Promise.all(tensorIds(job).map((id) => this.#engine.receive(id, peer, timeoutMs)));
    }
    return this.#engine
      .load({
        requestId: job.id,
        transferId: job.id as TransferId,
        peer,
        layers: this.#kv.layers(job, 'target'),
        blockIds: this.#kv.blockIds(job, 'target'),
        skipBlocks: 0,
        ...timeout,
      })
      .then(() => []);
  }

  /** The arguments of `send`, so that building them is not timed. */
  #requests(job: Job, peer: HostPort): SendRequest[] {
    const to = this.#sendType === 'GET' ? {} : { peer };
    if (job.kind === 'flat') {
      return tensorIds(job).map((tensorId, i) => {
        const memory = this.#kv.flat(job, job.order === 'reverse' ? job.count - 1 - i : i);
        return { tensorId, shape: [job.bytes], dtype: 'uint8', source: { kind: 'flat', memory }, ...to };
      });
    }
    const blockIds = this.#kv.blockIds(job, 'source');
    return this.#kv.layers(job, 'source').map(({ name, target }) => ({
      tensorId: tensorIdOf(job.id as TransferId, name),
      shape: wireShape(target.layout, blockIds.length),
      dtype: target.layout.dtype,
      source: { kind: 'blocks', layer: target, blockIds },
      ...to,
    }));
  }

  /** As after a model's step, each gather waits for an event: that of the work that wrote the blocks. */
  async #sendAll(requests: readonly SendRequest[]): Promise<number> {
    const ready = this.#stream.record();
    const handles = this.#engine.sendAll(requests.map((request) => ({ ...request, ready: ready.ref })));
    try {
      const sent = await Promise.all(handles.map((handle) => handle.sent));
      return sent.reduce((sum, bytes) => sum + bytes, 0);
    } finally {
      void Promise.allSettled(handles.map((handle) => handle.gathered)).then(() => ready.dispose());
    }
  }
}

function tensorIds(job: FlatJob): TensorId[] {
  const ids = Array.from({ length: job.count }, (_, i) => tensorIdOf(job.id as TransferId, String(i)));
  return job.order === 'reverse' ? ids.reverse() : ids;
}

/** Runs `one(0), one(1), ...` with `window` in flight until `last()` of them have been started; rejects with the first failure. */
async function windowed(
  window: number,
  last: () => number,
  one: (n: number) => Promise<void>,
): Promise<number> {
  let next = 0;
  let failed = false;
  const lane = async () => {
    while (next < last() && !failed) {
      const n = next++;
      await one(n).catch((error: unknown) => {
        failed = true;
        throw error;
      });
    }
  };
  const lanes = await Promise.allSettled(Array.from({ length: window }, lane));
  for (const ended of lanes) if (ended.status === 'rejected') throw ended.reason;
  return next;
}
