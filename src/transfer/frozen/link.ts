/**
 * One life of our connection to a peer: DEALER and pair, opened by NEW and ended together. We are rank 0 and the only side that
 * announces here.
 *
 *   connecting (NEW on its way) --> opening (both ends join the pair) --> open (announcements, answers, data) --> over
 */
import { deferred } from '../../deferred.ts';
import { PdError, unreachable } from '../../errors.ts';
import type { Pair } from '../../transport/transport.ts';
import { decodeAnswer, encodeMessage } from '../../wire/codec.ts';
import { protocolErrorKind } from '../../wire/limits.ts';
import { type Answer, BUNDLE_FEATURE, CLOSE_FEATURE, type PeerHello } from '../../wire/messages.ts';
import { logJoining, type TransferContext } from '../context.ts';
import type { Deadline } from '../deadlines.ts';
import { Dealer } from '../dealer.ts';
import { mismatchOf } from '../hello.ts';
import type { Direction, Unit } from './announcement.ts';
import type { LinkEvents } from './link-events.ts';
import { lateError, Outstanding } from './outstanding.ts';

/** Messages without an answer at one time. */
const WINDOW = 64;
/**
 * Of PUTs in bundles, those unanswered and those whose data is under way: one on the wire, one to follow it without a gap, one being
 * announced. What comes meanwhile gathers for the next bundle.
 */
const PUTS_UNDER_WAY = 3;

/**
 * A listener of ours has sent its hello before it joins the pair, so once that is open the hello is a moment away; of a peer that is not
 * ours none comes. What left before it would go without our fields: no receiver could tell of which prompt it is.
 */
const HELLO_GRACE_MS = 300;

type LinkState = 'connecting' | 'opening' | 'open' | 'closing' | 'over';

export class Link {
  readonly peer: string;
  readonly since: number;
  readonly #context: TransferContext;
  readonly #dealer: Dealer;
  readonly #events: LinkEvents;
  #state: LinkState = 'connecting';
  #lastUsedAt: number;
  /** Units whose data is under way. */
  #moving = 0;
  #closing: PdError | undefined;
  #pair: Pair | undefined;
  #hello: PeerHello | undefined;
  /** The hello has come, or its time is over. */
  #heard = false;
  #helloDeadline: Deadline | undefined;
  readonly #outstanding: Outstanding;
  readonly #opened = deferred<Pair | undefined>();
  #seq = 0;
  #answers = 0;
  #closeDeadline: Deadline | undefined;

  constructor(context: TransferContext, peer: string, events: LinkEvents) {
    this.#context = context;
    this.peer = peer;
    this.since = context.deadlines.now();
    this.#lastUsedAt = this.since;
    this.#events = events;
    this.#outstanding = new Outstanding({
      deadlines: context.deadlines,
      answerTimeoutMs: context.options.timeouts.answer,
      moving: () => (this.#pair?.pending ?? 0) > 0,
      onLate: (unit, progress) => this.end(lateError(peer, unit, progress, context.options.timeouts.answer)),
    });
    context.limited.log(`connecting ${peer}`, (suppressed) =>
      context.log.info({ peer, suppressed }, `connecting to ${peer}`),
    );
    this.#dealer = new Dealer({
      self: context.self,
      peer,
      connectTimeoutMs: context.options.timeouts.connect,
      onAnswer: (body) => this.#receive(body),
      onLost: (error) => this.end(error),
    });
    void this.#open();
  }

  get state(): LinkState {
    return this.#state;
  }

  get lastUsedAt(): number {
    return this.#lastUsedAt;
  }

  /** True once the peer has answered our NEW. */
  get ours(): boolean {
    return this.#hello !== undefined;
  }

  /** Where the peer is not ours, data of what it announces comes on our pair, if it has none of its own. */
  get pair(): Pair | undefined {
    return this.#state === 'open' ? this.#pair : undefined;
  }

  /** Its pair once that is open; undefined where it never will be. */
  get opened(): Promise<Pair | undefined> {
    return this.#opened.promise;
  }

  /** Tensors that are announced and not answered. */
  get outstanding(): number {
    return this.#outstanding.tensors;
  }

  /** Many tensors may travel as one. */
  get bundles(): boolean {
    return this.#both(BUNDLE_FEATURE);
  }

  mayAnnounce(direction: Direction): boolean {
    if (this.#state !== 'open' || !this.#heard) return false;
    const waiting = this.#outstanding.length;
    // A GET may wait at the producer for what is not there yet, and must hold up no other.
    if (direction === 'get' || !this.bundles) return waiting < WINDOW;
    return waiting + this.#moving < PUTS_UNDER_WAY;
  }

  announce(unit: Unit): void {
    const seq = this.#seq++;
    this.#lastUsedAt = this.#context.deadlines.now();
    this.#outstanding.add(unit, seq);
    const message = unit.message(this.ours, seq);
    this.#context.log.debug(
      { tensorId: unit.parts[0]?.tensorId, tensors: unit.parts.length, peer: this.peer, seq },
      `${message.cmd} to ${this.peer}`,
    );
    void this.#dealer.send(encodeMessage(message));
  }

  /** Nothing is under way, and the peer knows how to close. */
  get closable(): boolean {
    const quiet = this.#outstanding.length === 0 && this.#moving === 0 && this.#pair?.pending === 0;
    return this.#state === 'open' && quiet && this.#both(CLOSE_FEATURE);
  }

  /** Ends the pair on both ends, where it is `closable`. What is queued meanwhile opens another. */
  close(why: string): void {
    if (!this.closable) return;
    this.#state = 'closing';
    const { deadlines, options } = this.#context;
    const closing = this.#closed(why);
    this.#closing = closing;
    this.#closeDeadline = deadlines.after(options.timeouts.answer, () => this.end(closing));
    void this.#dealer.send(encodeMessage({ cmd: 'CLOSE' }));
  }

  /** Ends DEALER and pair. Idempotent. */
  end(error: PdError, noPair = false): void {
    if (this.#state === 'over') return;
    this.#state = 'over';
    this.#opened.resolve(undefined);
    // A pair that both ends close may be seen to end before the peer has said so.
    const reason = this.#closing ?? error;
    this.#closeDeadline?.cancel();
    this.#helloDeadline?.cancel();
    this.#dealer.close();
    this.#pair?.abort(reason);
    const unanswered = this.#outstanding.clear();
    this.#events.onEnd({ error: reason, unanswered, noPair, idle: this.#closing !== undefined });
  }

  #both(feature: string): boolean {
    return (
      (this.#hello?.features.includes(feature) && this.#context.hello.features.includes(feature)) ?? false
    );
  }

  async #open(): Promise<void> {
    const { transport, hello, log, self, options } = this.#context;
    const { peer } = this;
    // The owner does not hold this link yet: it must not end before the constructor has returned.
    await Promise.resolve();
    if (this.#over) return;
    try {
      const uniqueId = transport.createUniqueId();
      log.debug({ peer }, `NEW to ${peer}`);
      if (!(await this.#dealer.send(encodeMessage({ cmd: 'NEW', unique_id: uniqueId, native: hello }))))
        return;
      if (this.#over) return;
      this.#state = 'opening';
      logJoining(this.#context, peer, 0);
      const pair = await transport.open({ uniqueId, rank: 0, peer, timeoutMs: options.timeouts.pairInit });
      if (this.#over) {
        pair.abort(this.#closed('its link ended while it was opened'));
        return;
      }
      this.#pair = pair;
      this.#state = 'open';
      this.#opened.resolve(pair);
      log.info({ peer }, `🤝ncclCommInitRank Success, ${self}👉${peer}, MyRank:0`);
      void pair.over.then((reason) => this.end(reason));
      if (!this.#heard) {
        this.#helloDeadline = this.#context.deadlines.after(HELLO_GRACE_MS, () => this.#mayBegin());
      }
      this.#events.onOpen();
    } catch (error) {
      this.end(PdError.from(error, 'INTERNAL', { peer }));
    }
  }

  get #over(): boolean {
    return this.#state === 'over';
  }

  #receive(body: Uint8Array): void {
    if (this.#over) return;
    let answer: Answer;
    try {
      answer = decodeAnswer(body, this.#context.options.limits);
    } catch (error) {
      this.#context.metrics.inc('pd_protocol_errors_total', 1, protocolErrorKind(error));
      // Answers carry no id: after one that cannot be read, nobody knows what the next belongs to.
      this.end(PdError.from(error, 'MESSAGE_INVALID', { peer: this.peer }));
      return;
    }
    try {
      this.#answer(answer);
    } catch (error) {
      this.end(PdError.from(error));
    }
  }

  #answer(answer: Answer): void {
    const first = this.#answers++ === 0;
    switch (answer.kind) {
      case 'hello':
        if (first) this.#greeted(answer.hello, answer.refused);
        else this.#unexpected('a second hello');
        return;
      case 'no-pair':
        this.end(this.#closed('the peer knows no pair with us'), true);
        return;
      case 'close':
        if (answer.stage === 'ask') this.close('the peer closes idle pairs');
        else this.end(this.#closed('closed on both ends'));
        return;
      case 'send':
      case 'no-room':
      case 'get':
      case 'puts':
      case 'gets':
        this.#answered(answer, 'seq' in answer ? answer.seq : undefined);
        return;
      default:
        unreachable(answer, 'answer');
        return;
    }
  }

  #answered(answer: Answer, seq: number | undefined): void {
    const unit = this.#outstanding.take(seq);
    if (!unit || !this.#pair) {
      this.#unexpected('an answer to nothing', unit);
      return;
    }
    this.#lastUsedAt = this.#context.deadlines.now();
    const first = unit.parts[0]?.tensorId;
    this.#context.log.debug(
      { tensorId: first, tensors: unit.parts.length, peer: this.peer, answer: answer.kind },
      `answer from ${this.peer}`,
    );
    for (const part of unit.parts) part.peerIsOurs = this.ours;
    if (answer.kind === 'send' && !this.ours) this.#events.onForeignPut();
    const pair = (this.ours ? undefined : this.#events.newerPair(this.since)) ?? this.#pair;
    const reaction = unit.answered(answer, pair);
    if (reaction === 'unexpected') {
      this.#unexpected(`${answer.kind} for ${first}`, unit);
      return;
    }
    if (reaction.moved) void this.#move(reaction.moved);
    this.#events.onSpace(reaction.again ?? []);
  }

  #closed(why: string): PdError {
    return new PdError('PAIR_CLOSED', `pair with ${this.peer}: ${why}`, { peer: this.peer });
  }

  async #move(moved: Promise<void>): Promise<void> {
    this.#moving++;
    await moved;
    this.#moving--;
    this.#lastUsedAt = this.#context.deadlines.now();
    if (!this.#over) this.#events.onSpace([]);
  }

  #greeted(
    hello: PeerHello,
    refused: { readonly code: PdError['code']; readonly message: string } | undefined,
  ): void {
    this.#hello = hello;
    this.#context.log.debug({ peer: this.peer, version: hello.version, features: hello.features }, 'hello');
    const bad = refused ?? mismatchOf(this.#context.hello, hello, this.#context.self, this.peer);
    if (bad) this.end(new PdError(bad.code, `peer ${this.peer}: ${bad.message}`, { peer: this.peer }));
    else this.#mayBegin();
  }

  #mayBegin(): void {
    this.#heard = true;
    this.#helloDeadline?.cancel();
    if (this.#state === 'open') this.#events.onGreeted();
  }

  /** `unit`: what was answered so, and is answered by nothing any more. */
  #unexpected(what: string, unit?: Unit): void {
    const { peer } = this;
    this.#context.metrics.inc('pd_protocol_errors_total', 1, 'unexpected_answer');
    const error = new PdError('MESSAGE_INVALID', `peer ${peer} sent an answer out of place: ${what}`, {
      peer,
    });
    for (const part of unit?.parts ?? []) part.fail(error);
    this.end(error);
  }
}
