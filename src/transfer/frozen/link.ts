/**
 * One life of our connection to a peer: DEALER and pair, opened by NEW and ended together. We are rank 0 and the only side that
 * announces here. Answers carry no id, so they belong to the announcements in their order, of which several may be unanswered.
 *
 *   connecting (NEW on its way) --> opening (both ends join the pair) --> open (announcements, answers, data) --> over
 */
import { deferred } from '../../deferred.ts';
import { PdError, unreachable } from '../../errors.ts';
import type { Pair } from '../../transport/transport.ts';
import { decodeAnswer, encodeMessage } from '../../wire/codec.ts';
import type { TensorId } from '../../wire/ids.ts';
import { protocolErrorKind } from '../../wire/limits.ts';
import type { Answer, PeerHello, WireMessage } from '../../wire/messages.ts';
import { joinPair, logJoined, type TransferContext } from '../context.ts';
import type { Deadline } from '../deadlines.ts';
import { Dealer } from '../dealer.ts';
import { mismatchOf } from '../hello.ts';

/** Announcements without an answer at one time: while one is answered, data of others moves. */
const WINDOW = 64;

/**
 * A listener of ours has sent its hello before it joins the pair, so once that is open the hello is a moment away; of a peer that is not
 * ours none comes. What left before it would go without our field: no receiver could tell of which prompt it is. A peer of ours that takes
 * longer is sent what is frozen until its hello does come, which precedes all of its other answers.
 */
const HELLO_GRACE_MS = 300;

/** What is announced to a peer and answered by it: a PUT or a GET. */
export abstract class Announcement {
  abstract readonly tensorId: TensorId;
  /** It has been announced on a pair that is gone: the second time is the last. */
  renewed = false;
  #ready = false;
  #whenReady: (() => void) | undefined;

  /** False while its memory is not there yet. What stands behind it in the queue waits, so that order is kept. */
  get ready(): boolean {
    return this.#ready;
  }

  markReady(): void {
    this.#ready = true;
    this.#whenReady?.();
  }

  onReady(run: () => void): void {
    this.#whenReady = run;
  }

  /** There is a pair with the peer while it waits for its turn. Called again where the pair has been opened anew. */
  pairOpened(): void {}

  /** Given up by its owner: nothing more is done for it, except what the wire demands. */
  abstract readonly cancelled: boolean;
  /** `native`: the peer is known to be ours, so that our field may go along. */
  abstract message(native: boolean): WireMessage;
  /**
   * Starts the transfer that the answer calls for: its operation on `pair` is posted before this returns, since data travels in the order of
   * the answers. False where the answer belongs to another kind of announcement.
   */
  abstract answered(answer: Answer, pair: Pair, native: boolean): boolean;
  /** It will not be tried again. Idempotent. */
  abstract fail(error: PdError): void;
}

type LinkState = 'connecting' | 'opening' | 'open' | 'over';

export interface LinkEnd {
  readonly error: PdError;
  /** Announced and not answered, oldest first. */
  readonly unanswered: readonly Announcement[];
  /** The peer has answered `2`: it knows no pair. */
  readonly noPair: boolean;
  /** Its pair was open. */
  readonly opened: boolean;
}

/** What a link tells its owner. */
export interface LinkEvents {
  onOpen(): void;
  /** What the peer is, is known: announcements may leave. */
  onGreeted(): void;
  /** There is room for another announcement. */
  onAnswered(): void;
  /** Once. */
  onEnd(end: LinkEnd): void;
  /** A peer that is not ours keeps one pair per address, the newest: its own, where it has sent NEW after us. */
  newerPair(since: number): Pair | undefined;
  /** A PUT goes to a peer that is not ours. */
  onFrozenPut(): void;
}

export class Link {
  readonly peer: string;
  readonly since: number;
  readonly #context: TransferContext;
  readonly #dealer: Dealer;
  readonly #events: LinkEvents;
  readonly #opened = deferred<Pair | undefined>();
  #state: LinkState = 'connecting';
  #pair: Pair | undefined;
  #hello: PeerHello | undefined;
  /** The hello has come, or its time is over. */
  #heard = false;
  #helloDeadline: Deadline | undefined;
  /** Announced and not answered, oldest first. */
  #waiting: { readonly announcement: Announcement; readonly since: number }[] = [];
  #answerDeadline: Deadline | undefined;
  #progressAt = 0;
  #numAnswered = 0;
  #firstAnswer = true;

  constructor(context: TransferContext, peer: string, events: LinkEvents) {
    this.#context = context;
    this.peer = peer;
    this.since = context.deadlines.now();
    this.#events = events;
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

  /** True once the peer has answered our NEW. */
  get native(): boolean {
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

  /** Announced and not answered. */
  get outstanding(): number {
    return this.#waiting.length;
  }

  get mayAnnounce(): boolean {
    return this.#state === 'open' && this.#heard && this.#waiting.length < WINDOW;
  }

  announce(announcement: Announcement): void {
    const { deadlines, log } = this.#context;
    const { tensorId } = announcement;
    let body: Uint8Array;
    try {
      const message = announcement.message(this.native);
      body = encodeMessage(message);
      log.debug({ tensorId, peer: this.peer }, `${message.cmd} to ${this.peer}`);
    } catch (error) {
      announcement.fail(PdError.from(error));
      return;
    }
    this.#waiting.push({ announcement, since: deadlines.now() });
    if (this.#waiting.length === 1) this.#awaitAnswer();
    void this.#dealer.send(body);
  }

  /** Ends DEALER and pair. Idempotent. */
  end(error: PdError, noPair = false): void {
    if (this.#over) return;
    this.#state = 'over';
    this.#opened.resolve(undefined);
    this.#helloDeadline?.cancel();
    this.#answerDeadline?.cancel();
    this.#dealer.close();
    this.#pair?.abort(error);
    const unanswered = this.#waiting.map(({ announcement }) => announcement);
    this.#waiting = [];
    this.#events.onEnd({ error, unanswered, noPair, opened: this.#pair !== undefined });
  }

  /** Read anew after every await: an answer or a lost connection may have ended the link meanwhile. */
  get #over(): boolean {
    return this.#state === 'over';
  }

  async #open(): Promise<void> {
    const { transport, hello, log, deadlines } = this.#context;
    const { peer } = this;
    // The owner does not hold this link yet: it must not end before the constructor has returned.
    await Promise.resolve();
    if (this.#over) return;
    try {
      const uniqueId = transport.createUniqueId();
      log.debug({ peer }, `NEW to ${peer}`);
      const sent = await this.#dealer.send(encodeMessage({ cmd: 'NEW', unique_id: uniqueId, native: hello }));
      if (!sent || this.#over) return;
      this.#state = 'opening';
      const pair = await joinPair(this.#context, { uniqueId, rank: 0, peer });
      if (this.#over) {
        pair.abort(
          new PdError('PAIR_CLOSED', `pair with ${peer}: its link ended while it was opened`, { peer }),
        );
        return;
      }
      this.#pair = pair;
      this.#state = 'open';
      this.#opened.resolve(pair);
      logJoined(this.#context, pair);
      void pair.over.then((reason) => this.end(reason));
      // Where this thread stood still, the hello may lie here unread: a turn of the event loop reads it first.
      if (!this.#heard)
        this.#helloDeadline = deadlines.after(HELLO_GRACE_MS, () => setImmediate(() => this.#mayBegin()));
      this.#events.onOpen();
    } catch (error) {
      this.end(PdError.from(error, 'INTERNAL', { peer }));
    }
  }

  /** The oldest has its deadline from its own start, or from the last answer; while data moves, that has deadlines of its own. */
  #awaitAnswer(): void {
    this.#answerDeadline?.cancel();
    const [oldest] = this.#waiting;
    if (!oldest) return;
    const { deadlines, options } = this.#context;
    const { answer } = options.timeouts;
    const due = Math.max(oldest.since, this.#progressAt) + answer;
    this.#answerDeadline = deadlines.after(due - deadlines.now(), () => {
      if ((this.#pair?.pending ?? 0) > 0) {
        // A serial listener answers after it.
        this.#progressAt = deadlines.now();
        this.#awaitAnswer();
        return;
      }
      const { tensorId } = oldest.announcement;
      const text =
        `peer ${this.peer} did not answer the announcement of ${tensorId} within ${answer} ms` +
        ` (${this.#waiting.length} outstanding, ${this.#numAnswered} answers so far)`;
      this.end(new PdError('PEER_ANSWER_TIMEOUT', text, { peer: this.peer, tensorId }));
    });
  }

  #receive(body: Uint8Array): void {
    if (this.#over) return;
    let answer: Answer;
    try {
      answer = decodeAnswer(body, this.#context.options.limits);
    } catch (error) {
      this.#context.metrics.inc('pd_protocol_errors_total', 1, protocolErrorKind(error));
      // After one that cannot be read, nobody knows what the next belongs to.
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
    // Nothing has been announced here yet: it is to what the link before announced, whose DEALER had the same name.
    if (!this.#heard && answer.kind !== 'hello') {
      this.#context.log.debug({ peer: this.peer, answer: answer.kind }, `late answer from ${this.peer}`);
      return;
    }
    const first = this.#firstAnswer;
    this.#firstAnswer = false;
    switch (answer.kind) {
      case 'hello':
        // Nobody says hello but to NEW: the other one was to that of the link before, whose DEALER had the same name.
        if (this.#hello)
          this.#context.log.debug({ peer: this.peer }, `another hello from ${this.peer}, to the link before`);
        else if (first) this.#greeted(answer.hello, answer.refused);
        else this.#unexpected('a hello after other answers');
        return;
      case 'no-pair': {
        const { peer } = this;
        this.end(
          new PdError('PAIR_CLOSED', `pair with ${peer}: the peer knows no pair with us`, { peer }),
          true,
        );
        return;
      }
      case 'send':
      case 'no-room':
      case 'get':
        this.#answered(answer);
        return;
      default:
        unreachable(answer, 'answer');
        return;
    }
  }

  #answered(answer: Answer): void {
    const { deadlines, log } = this.#context;
    const announcement = this.#waiting.shift()?.announcement;
    this.#progressAt = deadlines.now();
    this.#awaitAnswer();
    if (!announcement || !this.#pair) {
      this.#unexpected('an answer to nothing', announcement);
      return;
    }
    this.#numAnswered++;
    const { tensorId } = announcement;
    log.debug({ tensorId, peer: this.peer, answer: answer.kind }, `answer from ${this.peer}`);
    if (answer.kind === 'send' && !this.native) this.#events.onFrozenPut();
    const pair = (this.native ? undefined : this.#events.newerPair(this.since)) ?? this.#pair;
    if (!announcement.answered(answer, pair, this.native)) {
      this.#unexpected(`${answer.kind} for ${tensorId}`, announcement);
      return;
    }
    this.#events.onAnswered();
  }

  #greeted(
    hello: PeerHello,
    refused: { readonly code: PdError['code']; readonly message: string } | undefined,
  ): void {
    const { peer } = this;
    this.#hello = hello;
    this.#context.log.debug({ peer, version: hello.version, features: hello.features }, 'hello');
    const bad = refused ?? mismatchOf(this.#context.hello, hello, this.#context.self, peer);
    if (bad) this.end(new PdError(bad.code, `peer ${peer}: ${bad.message}`, { peer }));
    else this.#mayBegin();
  }

  #mayBegin(): void {
    this.#heard = true;
    this.#helloDeadline?.cancel();
    if (this.#state === 'open') this.#events.onGreeted();
  }

  /** `announcement`: what was answered so, and is answered by nothing any more. */
  #unexpected(what: string, announcement?: Announcement): void {
    const { peer } = this;
    this.#context.metrics.inc('pd_protocol_errors_total', 1, 'unexpected_answer');
    const error = new PdError('MESSAGE_INVALID', `peer ${peer} sent an answer out of place: ${what}`, {
      peer,
    });
    announcement?.fail(error);
    this.end(error);
  }
}
