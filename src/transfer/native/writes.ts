/**
 * Writes of a producer that have not landed: each layer leaves once the step that computes it says so, by launches of `direct` or as parts on
 * a pair. Which may begin, and what follows from their end, is the ledger's (grants.ts). On the core thread.
 *
 *   begin(action) --> layer by layer behind the events of its step, or all at once --> landed(launch)
 */
import { type Deferred, deferred } from '../../deferred.ts';
import type { EventRef } from '../../device/device.ts';
import { PdError } from '../../errors.ts';
import type { MetricsPage } from '../../observability/metrics.ts';
import type { TransferId } from '../../wire/ids.ts';
import type { GrantAction } from './actions.ts';
import type { FromWire, NativeInit, ToWire } from './channel.ts';
import type { DirectWays, LayerWrites } from './direct.ts';
import type { MovedKv } from './hand-over-api.ts';
import type { Failure } from './messages.ts';

type WriteAction = Extract<GrantAction, { readonly kind: 'write' }>;

interface WritesOptions {
  readonly init: NativeInit;
  readonly direct: Pick<DirectWays, 'begin'> | undefined;
  readonly metrics: MetricsPage;
  readonly tell: (command: ToWire) => void;
  /** Of the write that ends a prompt. */
  readonly onStage: (id: TransferId, stage: 'launched' | 'landed', moved?: MovedKv) => void;
  /** `Grants.mayLaunch`. */
  readonly mayLaunch: (launch: number) => boolean;
  /** Once for each write that was begun: nothing of it is under way any more. */
  readonly landed: (launch: number, failure: Failure | undefined) => void;
}

interface Write {
  readonly action: WriteAction;
  /** Layers below have been launched, or will not be. */
  next: number;
  /** Parts under way, or one for all launches of `direct`. */
  parts: number;
  /** By `direct`, once there is room for its lists. */
  direct: LayerWrites | undefined;
  failure: Failure | undefined;
}

interface Step {
  /** Requests that this step computes. */
  readonly ids: Set<TransferId>;
  /** Writes that wait for its layers. */
  readonly writes: Set<Write>;
  /** Of each layer that has been told. */
  readonly events: (EventRef | undefined)[];
  readonly number: number;
  /** Parts that still need an event of it. */
  gathering: number;
  readonly gathered: Deferred<void>;
}

/** Bytes of one PART, where its layers are there at once: no operation then takes longer than its deadline. */
const PART_BYTES = 128 * 2 ** 20;

export class Writes {
  readonly #options: WritesOptions;
  readonly #numLayers: number;
  readonly #writes = new Map<number, Write>();
  /** Parts that are on their way, of writes that may have landed. */
  #leaving = 0;
  /** Writes by `direct` that wait for room. */
  readonly #crowded = new Set<Write>();
  #step: Step | undefined;
  #numSteps = 0;
  /** Steps with parts that still need an event of them. */
  readonly #gathering = new Map<number, Step>();

  constructor(options: WritesOptions) {
    this.#options = options;
    this.#numLayers = options.init.shape.layers;
  }

  /** Writes that have not landed, and parts that have not been sent. */
  get size(): number {
    return this.#writes.size + this.#leaving;
  }

  /** The step that begins, or has begun, computes some of this request. */
  computes(id: TransferId): void {
    this.#step ??= {
      ids: new Set(),
      writes: new Set(),
      number: ++this.#numSteps,
      events: [],
      gathering: 0,
      gathered: deferred<void>(),
    };
    this.#step.ids.add(id);
  }

  begin(action: WriteAction): void {
    const write: Write = { action, next: 0, parts: 0, direct: undefined, failure: undefined };
    this.#writes.set(action.launch, write);
    const step = this.#step;
    if (!step?.ids.has(action.id)) {
      this.#launch(write, this.#numLayers, undefined);
      return;
    }
    step.writes.add(write);
    // Each layer behind its own event: a step is often enqueued before it has begun, and the last of it is far away.
    const { events } = step;
    for (let end = 1; end <= events.length; end++) {
      if (end === events.length || events[end] !== events[end - 1]) this.#launch(write, end, events[end - 1]);
    }
  }

  layer(index: number, ready: EventRef | undefined): void {
    const step = this.#step;
    if (!step) return;
    step.events.push(ready);
    for (const write of step.writes) this.#launch(write, index + 1, ready);
  }

  /** Resolves when no event of the step is needed any more. */
  stepEnded(): Promise<void> {
    const step = this.#step;
    this.#step = undefined;
    if (!step) return Promise.resolve();
    for (const write of step.writes) {
      if (write.next >= this.#numLayers) continue;
      if (this.#crowded.delete(write) && step.events.length === this.#numLayers) {
        this.#launch(write, this.#numLayers, undefined);
        continue;
      }
      write.failure ??= {
        code: 'KV_SEND_FAILED',
        message: 'the step that was to compute it did not end well',
      };
      write.next = this.#numLayers;
      this.#settle(write);
    }
    return step.gathering > 0 ? step.gathered.promise : Promise.resolve();
  }

  /** A part of that step is gathered. */
  gathered(number: number): void {
    const step = this.#gathering.get(number);
    if (!step || --step.gathering > 0) return;
    this.#gathering.delete(step.number);
    step.gathered.resolve();
  }

  /** A part is sent, or on its way from memory of its own, or will not be. */
  written({ launch, error, leaving }: Extract<FromWire, { readonly kind: 'written' }>): void {
    if (leaving) this.#leaving++;
    const write = this.#writes.get(launch);
    if (!write) return;
    write.parts--;
    if (error) write.failure ??= error;
    this.#settle(write);
  }

  sent(): void {
    this.#leaving--;
  }

  /** Layers up to `end`, as far as they have not been launched. */
  #launch(write: Write, end: number, ready: EventRef | undefined): void {
    const { launch, transport } = write.action;
    if (write.next >= end || this.#crowded.has(write)) return;
    if (!this.#options.mayLaunch(launch)) write.next = this.#numLayers;
    else if (transport === 'direct') this.#launchDirect(write, end, ready);
    else this.#sendParts(write, end, ready);
    if (write.next >= this.#numLayers && write.action.last)
      this.#options.onStage(write.action.id, 'launched');
    this.#settle(write);
  }

  #launchDirect(write: Write, end: number, ready: EventRef | undefined): void {
    try {
      write.direct ??= this.#beginDirect(write);
      // all of it once there is room, when its step is over
      if (!write.direct) this.#crowded.add(write);
      else {
        write.direct.layers(write.next, end - write.next, ready);
        write.next = end;
      }
    } catch (error) {
      this.#giveUp(write, PdError.from(error));
    }
  }

  #beginDirect({ action }: Write): LayerWrites | undefined {
    const { nonce, seq, slot, sources, targets, last } = action;
    const { direct } = this.#options;
    if (!direct || slot === undefined)
      throw new PdError('DIRECT_REFUSED', 'a WANT by direct, which is off here');
    return direct.begin(nonce, { seq, slot, sources, targets, last });
  }

  #giveUp(write: Write, { code, message }: PdError): void {
    write.failure ??= { code, message };
    write.next = this.#numLayers;
  }

  #sendParts(write: Write, end: number, ready: EventRef | undefined): void {
    const { launch, peer, nonce: to, seq, ticket, place, sources } = write.action;
    const { nonce: from, shape } = this.#options.init;
    const most = Math.max(Math.floor(PART_BYTES / (sources.length * shape.blockBytes)), 1);
    const blocks = Int32Array.from(sources);
    const step = ready && ready.kind !== 'host' ? this.#step : undefined;
    for (; write.next < end; ) {
      const layers = Math.min(end - write.next, most);
      write.parts++;
      if (step) {
        step.gathering++;
        this.#gathering.set(step.number, step);
      }
      const of = { from, to, seq, ticket } as const;
      const what = { layer: write.next, layers, block: place, blocks: sources.length };
      this.#options.tell({
        kind: 'write',
        peer,
        launch,
        part: { cmd: 'PART', ...of, ...what },
        blocks,
        ...(step && ready && { ready: { event: ready, step: step.number } }),
      });
      write.next += layers;
    }
  }

  #settle(write: Write): void {
    const { launch } = write.action;
    if (write.next < this.#numLayers || write.parts > 0) return;
    const { direct } = write;
    if (direct) {
      write.direct = undefined;
      this.#awaitLaunches(write, direct);
      return;
    }
    if (!this.#writes.delete(launch)) return;
    this.#crowded.delete(write);
    this.#step?.writes.delete(write);
    if (write.action.last) this.#options.onStage(write.action.id, 'landed', this.#moved(write));
    this.#options.landed(launch, write.failure);
    for (const other of [...this.#crowded]) {
      if (this.#step?.writes.has(other)) continue;
      this.#crowded.delete(other);
      this.#launch(other, this.#numLayers, undefined);
    }
  }

  /** By this write, the last of its WANT, and those before it. */
  #moved({ action: { transport, place, targets, peer }, failure }: Write): MovedKv | undefined {
    if (failure) return undefined;
    const { layers, blockBytes } = this.#options.init.shape;
    return { transport, kv_bytes: (place + targets.length) * layers * blockBytes, kv_to: peer };
  }

  #awaitLaunches(write: Write, direct: LayerWrites): void {
    const { init, metrics } = this.#options;
    const { sources } = write.action;
    write.parts++;
    direct
      .landed()
      .then(() => {
        const bytes = sources.length * init.shape.layers * init.shape.blockBytes;
        if (!write.failure) metrics.inc('pd_kv_sent_bytes_total', bytes);
      })
      .catch((error: unknown) => this.#giveUp(write, PdError.from(error)))
      .finally(() => {
        write.parts--;
        this.#settle(write);
      });
  }
}
