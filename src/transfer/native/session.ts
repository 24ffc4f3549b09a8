/**
 * A consumer's connection to a producer, as the producer has it: who has said hello to its ROUTER and, where bytes go that way, a pair of which
 * it is rank 0, with the parts that leave on it. Of a consumer's end it is link.ts.
 */
import { type ErrorData, PdError } from '../../errors.ts';
import type { Pair } from '../../transport/transport.ts';
import { joinPair, logJoined, type TransferContext } from '../context.ts';
import { type Cargo, loadCargo } from './cargo.ts';
import type { FromWire, NativeInit, ToWire } from './channel.ts';
import { peerOf } from './hello.ts';
import type { HelloMessage, NativeMessage } from './messages.ts';

export type WriteCommand = Extract<ToWire, { readonly kind: 'write' }>;

interface SessionEvents {
  /** By the ROUTER. */
  answer(message: NativeMessage): void;
  tell(event: FromWire): void;
  pairsChanged(): void;
}

/** Parts that are gathered at a time: while one is on its way the next is made ready. */
const GATHERS = 3;
/**
 * Bytes that are gathered or sent at a time. More would take all of `--kv-buffer-size` at either end, and go by host memory from there on, at a
 * tenth of the speed.
 */
const WINDOW_BYTES = 512 * 2 ** 20;
const WINDOW_SHARE = 0.6;

export class NativeSession {
  readonly identity: Buffer;
  readonly peer: string;
  readonly hello: HelloMessage;
  readonly since: number;
  readonly #context: TransferContext;
  readonly #init: NativeInit;
  readonly #events: SessionEvents;
  #pair: Promise<Pair> | undefined;
  #openPair: Pair | undefined;
  /** Of the pair. */
  #parts = 0;
  /** What is written leaves in the order in which it was asked for: the gathers under way and those that wait, oldest first. */
  readonly #loading: Promise<unknown>[] = [];
  #leaving: Promise<unknown> = Promise.resolve();
  /** Bytes of parts that are gathered or sent, and parts that wait until fewer are. */
  #underWay = 0;
  readonly #crowded: { readonly bytes: number; readonly go: () => void }[] = [];
  #over = false;

  constructor(
    context: TransferContext,
    init: NativeInit,
    identity: Buffer,
    hello: HelloMessage,
    events: SessionEvents,
  ) {
    this.#context = context;
    this.#init = init;
    this.identity = identity;
    this.peer = peerOf(identity);
    this.hello = hello;
    this.#events = events;
    this.since = context.deadlines.now();
  }

  get paired(): boolean {
    return this.#openPair !== undefined;
  }

  /** Of its pair; by direct there is none. */
  get state(): 'opening' | 'open' | 'over' {
    if (this.#openPair) return 'open';
    return this.#pair ? 'opening' : 'over';
  }

  get outstanding(): number {
    return this.#openPair?.pending ?? 0;
  }

  /** Nothing is sent for it any more. */
  end(reason: PdError): void {
    this.#over = true;
    this.#openPair?.abort(reason);
  }

  /** With a consumer that wants something over it; once. Resolves when it is open, or will not be; never rejects. */
  async openPair(): Promise<void> {
    const { peer } = this;
    const { transport, log } = this.#context;
    try {
      const uniqueId = transport.createUniqueId();
      this.#events.answer({ cmd: 'PAIR', from: this.#init.nonce, to: this.hello.from, uniqueId });
      this.#pair = joinPair(this.#context, { uniqueId, rank: 0, peer });
      const open = await this.#pair;
      this.#openPair = open;
      this.#events.pairsChanged();
      void open.over.then((reason) => {
        this.#openPair = undefined;
        this.#events.pairsChanged();
        log.info({ peer, code: reason.code }, `pair with ${peer} is over: ${reason.message}`);
      });
      if (this.#over) open.abort(gone(peer));
      else logJoined(this.#context, open);
    } catch (error) {
      log.warn({ peer }, `pair with ${peer} could not be opened: ${PdError.from(error).message}`);
    }
  }

  /** Whether a pair has been opened, or is being. */
  get opens(): boolean {
    return this.#pair !== undefined;
  }

  write(command: WriteCommand): void {
    const { launch, peer, ready } = command;
    const { tell } = this.#events;
    let step = ready?.step;
    const gathered = () => {
      if (step !== undefined) tell({ kind: 'gathered', step });
      step = undefined;
    };
    const ended = (error?: ErrorData) => {
      gathered();
      tell({ kind: 'written', launch, ...(error && { error }) });
    };
    const bytes = this.#bytesOf(command);
    // begins once few enough before it are still being gathered or sent, and leaves behind all of them: so they enter in order
    const before = this.#loading.at(-GATHERS);
    const loaded = this.#enter(bytes)
      .then(() => before)
      .then(() => this.#load(command));
    const settled = loaded.then(gathered, gathered);
    this.#loading.push(settled);
    void settled.then(() => this.#loading.shift());
    const sent = this.#leaving.then(async () => this.#send(command, await loaded));
    this.#leaving = sent.catch(() => undefined);
    // A part that leaves from memory of its own needs its blocks no more: DONE may follow it, and whoever hears it waits for the part.
    const staged = this.#context.device.kind !== 'host';
    sent
      .then(({ done }) => {
        if (!staged) return done.then(() => ended());
        gathered();
        tell({ kind: 'written', launch, leaving: true });
        // where it fails the pair has ended, which its receiver sees
        return done.catch(() => undefined).then(() => tell({ kind: 'sent' }));
      })
      .catch((error: unknown) => ended(PdError.from(error, 'PEER_LOST', { peer }).toData()))
      .finally(() => this.#leave(bytes));
  }

  /** Resolves once there is room in the window: at once where nothing is under way, however large the part. */
  #enter(bytes: number): Promise<void> {
    if (this.#crowded.length === 0 && this.#fits(bytes)) {
      this.#underWay += bytes;
      return Promise.resolve();
    }
    return new Promise((go) => this.#crowded.push({ bytes, go }));
  }

  #leave(bytes: number): void {
    this.#underWay -= bytes;
    for (let [next] = this.#crowded; next && this.#fits(next.bytes); [next] = this.#crowded) {
      this.#crowded.shift();
      this.#underWay += next.bytes;
      next.go();
    }
  }

  #fits(bytes: number): boolean {
    const window = Math.min(WINDOW_BYTES, this.#context.options.kvBufferSize * WINDOW_SHARE);
    return this.#underWay === 0 || this.#underWay + bytes <= window;
  }

  #bytesOf({ part, blocks }: WriteCommand): number {
    return part.layers * blocks.length * this.#init.shape.blockBytes;
  }

  #load({ peer, part, blocks, ready }: WriteCommand): Promise<Cargo> {
    const { layer, layers } = part;
    const place = {
      layers: this.#init.layers.slice(layer, layer + layers),
      blocks,
      what: whatOf(part, peer),
    };
    return loadCargo(this.#context, place, ready?.event);
  }

  async #send(command: WriteCommand, cargo: Cargo): Promise<{ readonly done: Promise<void> }> {
    const { peer } = this;
    const { part } = command;
    try {
      const pair = await this.#pair;
      if (!pair || this.#over || !this.#openPair) throw gone(peer);
      const { transfer } = this.#context.options.timeouts;
      this.#events.answer({ ...part, part: ++this.#parts });
      const operation = { tensorId: whatOf(part, peer), timeoutMs: transfer };
      const done = pair.send(cargo.regions, operation).then(
        () => {
          cargo.free();
          this.#context.metrics.inc('pd_kv_sent_bytes_total', this.#bytesOf(command));
        },
        async (error: unknown) => {
          // Announced and not sent: the ends are out of step. The transport may read the memory until the pair is over.
          pair.abort(PdError.from(error, 'PEER_LOST', { peer }));
          await pair.over;
          cargo.free();
          throw error;
        },
      );
      return { done };
    } catch (error) {
      cargo.free();
      throw error;
    }
  }
}

export function gone(peer: string): PdError {
  return new PdError('PEER_LOST', `there is no connection with ${peer} any more`, { peer });
}

function whatOf({ seq, layer, layers }: WriteCommand['part'], peer: string): string {
  return `layers ${layer} to ${layer + layers - 1} of WANT ${seq} of ${peer}`;
}
