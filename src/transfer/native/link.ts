/**
 * A consumer's connection to a producer: a DEALER and, where bytes come that way, a pair of which it is rank 1. Both end together; what was
 * asked is said again on the next (wants.ts). It ends as well where its producer answers others and not it (silence.ts).
 *
 *   connecting (HELLO on its way) --> greeted (its answer has come) --> over
 */
import { type ErrorData, PdError } from '../../errors.ts';
import type { Pair } from '../../transport/transport.ts';
import { protocolErrorKind } from '../../wire/limits.ts';
import { joinPair, logJoined, type TransferContext } from '../context.ts';
import { Dealer } from '../dealer.ts';
import { makeRoom, unload } from './cargo.ts';
import type { NativeInit, ToWire } from './channel.ts';
import { decodeAnswered, encodeNative, nativeBodyBytes } from './codec.ts';
import { identityOf, refusalOf } from './hello.ts';
import {
  type ConsumerMessage,
  type HelloMessage,
  type NativeMessage,
  type PairMessage,
  PROBE_ONLY,
  type ProducerMessage,
} from './messages.ts';
import { SilenceWatch } from './silence-watch.ts';

type ReceiveCommand = Extract<ToWire, { readonly kind: 'receive' }>;

interface NativeLinkEvents {
  /** Also where another process answers than before. */
  introduced(hello: HelloMessage): void;
  answered(message: ProducerMessage): void;
  received(receipt: number, error?: ErrorData): void;
  pairsChanged(): void;
  /** Once; nothing follows it but `received`. */
  lost(error: PdError): void;
}

export class NativeLink {
  readonly peer: string;
  readonly since: number;
  readonly #context: TransferContext;
  readonly #init: NativeInit;
  readonly #hello: HelloMessage;
  readonly #events: NativeLinkEvents;
  readonly #dealer: Dealer;
  readonly #limits: { maxBlocks: number };
  readonly #patience: { cancel(): void };
  readonly #silence: SilenceWatch;
  #theirs: HelloMessage | undefined;
  /** Hellos of ours that are to be answered, and hellos of theirs that answer none. */
  #due = 0;
  #unasked = 0;
  #pair: Promise<Pair> | undefined;
  #openPair: Pair | undefined;
  /** Receives are posted in the order in which they were asked for, though room for one may be long in coming. */
  #posting: Promise<unknown> = Promise.resolve();
  #lastUsedAt: number;
  #over: PdError | undefined;

  constructor(
    context: TransferContext,
    init: NativeInit,
    hello: HelloMessage,
    peer: string,
    events: NativeLinkEvents,
  ) {
    this.#context = context;
    this.#init = init;
    this.#hello = hello;
    this.peer = peer;
    this.#events = events;
    this.since = context.deadlines.now();
    this.#lastUsedAt = this.since;
    this.#limits = { maxBlocks: init.shape.blocks };
    const probe = { ...hello, probe: PROBE_ONLY };
    this.#silence = new SilenceWatch(context, probe, peer, {
      ask: () => {
        this.#due++;
        this.#say(probe);
      },
      lost: (error) => this.end(error),
    });
    const { connect, answer } = context.options.timeouts;
    context.limited.log(`connecting ${peer}`, (suppressed) =>
      context.log.info({ peer, suppressed }, `connecting to ${peer}`),
    );
    this.#dealer = new Dealer({
      self: identityOf(context.self),
      peer,
      connectTimeoutMs: connect,
      maxMessageSize: nativeBodyBytes(this.#limits),
      onAnswer: (body) => this.#hear(body),
      onLost: (error) => this.end(error),
    });
    this.#patience = context.deadlines.after(connect + answer, () => {
      const text = `peer ${peer} does not answer HELLO within ${connect + answer} ms; a worker of another version or with --wire frozen does not know it`;
      this.end(new PdError('PEER_ANSWER_TIMEOUT', text, { peer }));
    });
    this.#introduce();
  }

  get paired(): boolean {
    return this.#openPair !== undefined && !this.#over;
  }

  get state(): 'connecting' | 'opening' | 'open' | 'over' {
    if (!this.#theirs) return 'connecting';
    if (this.#openPair) return 'open';
    // by direct there is none
    return this.#pair ? 'opening' : 'over';
  }

  get outstanding(): number {
    return this.#openPair?.pending ?? 0;
  }

  get lastUsedAt(): number {
    return this.#lastUsedAt;
  }

  /** Whatever is no longer wanted by then is lost with it: only where nothing has been said for long. */
  close(why: string): void {
    this.end(new PdError('PAIR_CLOSED', `connection to ${this.peer}: ${why}`, { peer: this.peer }));
  }

  /** Dropped before the other end has said hello. */
  ask(message: ConsumerMessage): void {
    if (!this.#theirs) return;
    this.#say(message);
    if (isAnswered(message)) this.#silence.said();
  }

  receive(command: ReceiveCommand): void {
    const { receipt } = command;
    if (!this.#pair) {
      // of the connection before: what it was to receive is lost with it
      const lost = new PdError('PEER_LOST', `the pair with ${this.peer} is gone`, { peer: this.peer });
      this.#events.received(receipt, lost.toData());
      return;
    }
    const received = this.#posting.then(() => this.#post(command));
    // the next is posted once this one is, and not only once it has come
    this.#posting = received.then(({ posted }) => posted).catch(() => undefined);
    received
      .then(({ done }) => done)
      .then(
        () => this.#events.received(receipt),
        (error: unknown) => {
          const failed = PdError.from(error, 'PEER_LOST', { peer: this.peer });
          this.#events.received(receipt, failed.toData());
          // what is not received leaves the ends out of step
          this.end(failed);
        },
      );
  }

  /** Idempotent. */
  end(error: PdError): void {
    if (this.#over) return;
    this.#over = error;
    this.#patience.cancel();
    this.#silence.end();
    this.#dealer.close();
    this.#openPair?.abort(error);
    this.#events.lost(error);
  }

  async #post({ part, blocks }: ReceiveCommand): Promise<{ posted: true; done: Promise<void> }> {
    const { seq, layer, layers, blocks: count } = part;
    const { transfer } = this.#context.options.timeouts;
    const pair = await this.#pair;
    if (!pair || this.#over) throw this.#over ?? new PdError('INTERNAL', 'PART without a pair');
    const most = this.#init.layers.length;
    if (layer + layers > most)
      throw new PdError('MESSAGE_INVALID', `PART of layers ${layer} to ${layer + layers - 1} of ${most}`);
    const what = `layers ${layer} to ${layer + layers - 1} of WANT ${seq} of ${this.peer}`;
    const place = {
      layers: this.#init.layers.slice(layer, layer + layers),
      blocks: blocks ?? new Int32Array(),
      what,
    };
    const bytes = layers * count * this.#init.shape.blockBytes;
    const room = await makeRoom(this.#context, place, bytes);
    const receiving = pair.receive(room.regions, { tensorId: what, timeoutMs: transfer });
    const done = receiving
      .then(
        () => {
          this.#context.metrics.inc('pd_kv_received_bytes_total', bytes);
          return unload(this.#context, place, room);
        },
        async (error: unknown) => {
          // What is not received leaves the ends out of step. The transport may write to the memory until the pair is over.
          this.end(PdError.from(error, 'PEER_LOST', { peer: this.peer }));
          await pair.over;
          room.free();
          throw error;
        },
      )
      .then(() => room.free());
    return { posted: true, done };
  }

  #introduce(): void {
    this.#due++;
    this.#say(this.#hello);
  }

  #say(message: NativeMessage): void {
    this.#lastUsedAt = this.#context.deadlines.now();
    const { log } = this.#context;
    log.debug({ peer: this.peer, cmd: message.cmd }, `${message.cmd} to ${this.peer}`);
    try {
      // what the other end allows: its blocks, where they are known
      const maxBlocks = Math.max(this.#theirs?.cache.blocks ?? 1, 1);
      void this.#dealer.send(encodeNative(message, { maxBlocks }));
    } catch (error) {
      log.warn(
        { peer: this.peer, cmd: message.cmd },
        `${message.cmd} to ${this.peer} was not sent: ${PdError.from(error).message}`,
      );
    }
  }

  #hear(body: Uint8Array): void {
    if (this.#over) return;
    this.#lastUsedAt = this.#context.deadlines.now();
    this.#silence.heard();
    try {
      const message = decodeAnswered(body, this.#limits);
      this.#context.log.debug({ peer: this.peer, cmd: message.cmd }, `${message.cmd} from ${this.peer}`);
      if (message.cmd === 'HELLO') this.#greeted(message);
      // Nothing has been asked here yet: it is of the connection before, whose DEALER had the same name.
      else if (!this.#theirs) return;
      else if (message.cmd === 'PAIR') this.#join(message);
      else this.#events.answered(message);
    } catch (error) {
      this.#context.metrics.inc('pd_protocol_errors_total', 1, protocolErrorKind(error));
      const { message } = PdError.from(error);
      this.end(new PdError('MESSAGE_INVALID', `peer ${this.peer}: ${message}`, { peer: this.peer }));
    }
  }

  /** The producer opens a pair. Where it cannot be joined the connection ends. */
  #join({ from, to, uniqueId }: PairMessage): void {
    const { peer } = this;
    if (from !== this.#theirs?.from || to !== this.#init.nonce || this.#pair) return;
    this.#pair = joinPair(this.#context, { uniqueId, rank: 1, peer });
    this.#pair.then(
      (pair) => {
        this.#openPair = pair;
        this.#events.pairsChanged();
        void pair.over.then((reason) => this.end(reason));
        if (this.#over) pair.abort(this.#over);
        else logJoined(this.#context, pair);
      },
      (error: unknown) => this.end(PdError.from(error, 'PAIR_INIT_TIMEOUT', { peer })),
    );
  }

  #greeted(theirs: HelloMessage): void {
    const { self, log, metrics } = this.#context;
    const { peer } = this;
    const refused = theirs.refused ?? refusalOf(this.#hello, theirs, self, peer);
    if (refused) {
      metrics.inc('pd_protocol_errors_total', 1, 'fingerprint');
      this.end(new PdError(refused.code, `peer ${peer}: ${refused.message}`, { peer }));
      return;
    }
    const before = this.#theirs;
    if (this.#due > 0) this.#due--;
    else this.#unasked++;
    if (before?.from === theirs.from) {
      // One may be to the hello of the connection before. Another is to what was asked: this producer does not know us any more.
      if (this.#unasked < 2) return;
      this.#unasked = 0;
      this.#introduce();
      return;
    }
    this.#patience.cancel();
    if (before) {
      this.end(new PdError('PEER_LOST', `another process answers for ${peer} than before`, { peer }));
      return;
    }
    this.#theirs = theirs;
    log.debug({ peer, nonce: theirs.from, transports: theirs.transports }, `hello of ${peer}`);
    this.#events.introduced(theirs);
  }
}

/** Whether a producer always answers it, and at once; a WANT when it is said again. */
function isAnswered(message: ConsumerMessage): boolean {
  return message.cmd === 'WANT' || (message.cmd === 'DROP' && message.want !== undefined);
}
