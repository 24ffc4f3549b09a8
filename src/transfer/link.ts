/**
 * One life of our connection to a peer: DEALER and pair, opened by NEW and ended together. We are rank 0 and the only side that
 * announces here.
 *
 *   connecting (NEW on its way) --> opening (both ends join the pair) --> open (announcements, answers, data) --> over
 */
import { PdError, unreachable } from '../errors.ts';
import type { Pair } from '../transport/transport.ts';
import { decodeAnswer, encodeMessage } from '../wire/codec.ts';
import { protocolErrorKind } from '../wire/limits.ts';
import type { Answer, PeerHello } from '../wire/messages.ts';
import type { Announcement } from './announcement.ts';
import type { TransferContext } from './context.ts';
import type { Deadline } from './deadlines.ts';
import { Dealer } from './dealer.ts';
import { mismatchOf } from './hello.ts';

/** Announcements without an answer at one time. */
const WINDOW = 64;

export interface LinkEnd {
  readonly error: PdError;
  /** Announced and not answered, oldest first. */
  readonly unanswered: readonly Announcement[];
  /** The peer has answered `2`: it knows no pair. */
  readonly noPair: boolean;
}

interface Outstanding {
  readonly announcement: Announcement;
  readonly seq: number;
  readonly since: number;
}

export class Link {
  readonly peer: string;
  readonly since: number;
  readonly #context: TransferContext;
  readonly #dealer: Dealer;
  readonly #onOpen: () => void;
  readonly #onSpace: () => void;
  readonly #onEnd: (end: LinkEnd) => void;
  #state: 'connecting' | 'opening' | 'open' | 'over' = 'connecting';
  #pair: Pair | undefined;
  #hello: PeerHello | undefined;
  #outstanding: Outstanding[] = [];
  #seq = 0;
  #answers = 0;
  #progressAt = 0;
  #answerDeadline: Deadline | undefined;

  constructor(
    context: TransferContext,
    peer: string,
    events: { onOpen(): void; onSpace(): void; onEnd(end: LinkEnd): void },
  ) {
    this.#context = context;
    this.peer = peer;
    this.since = context.deadlines.now();
    this.#onOpen = events.onOpen;
    this.#onSpace = events.onSpace;
    this.#onEnd = events.onEnd;
    this.#dealer = new Dealer({
      self: context.self,
      peer,
      connectTimeoutMs: context.options.timeouts.connect,
      onAnswer: (body) => this.#receive(body),
      onLost: (error) => this.end(error),
    });
    void this.#open();
  }

  get state(): 'connecting' | 'opening' | 'open' | 'over' {
    return this.#state;
  }

  /** True once the peer has answered our NEW. */
  get ours(): boolean {
    return this.#hello !== undefined;
  }

  /** Where the peer is not ours, data of what it announces comes on our pair, if it has none of its own. */
  get pair(): Pair | undefined {
    return this.#state === 'open' ? this.#pair : undefined;
  }

  get outstanding(): number {
    return this.#outstanding.length;
  }

  get mayAnnounce(): boolean {
    return this.#state === 'open' && this.#outstanding.length < WINDOW;
  }

  announce(announcement: Announcement): void {
    const seq = this.#seq++;
    this.#outstanding.push({ announcement, seq, since: this.#context.deadlines.now() });
    if (this.#outstanding.length === 1) this.#armAnswer();
    const message = announcement.message(this.ours, seq);
    this.#context.log.debug(
      { tensorId: announcement.tensorId, peer: this.peer, seq },
      `${message.cmd} to ${this.peer}`,
    );
    void this.#dealer.send(encodeMessage(message));
  }

  /** Ends DEALER and pair. Idempotent. */
  end(error: PdError, noPair = false): void {
    if (this.#state === 'over') return;
    this.#state = 'over';
    this.#answerDeadline?.cancel();
    this.#dealer.close();
    this.#pair?.abort(error);
    const unanswered = this.#outstanding.map(({ announcement }) => announcement);
    this.#outstanding = [];
    this.#onEnd({ error, unanswered, noPair });
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
      if (!(await this.#dealer.send(encodeMessage({ cmd: 'NEW', unique_id: uniqueId, ours: hello })))) return;
      if (this.#over) return;
      this.#state = 'opening';
      const pair = await transport.open({ uniqueId, rank: 0, peer, timeoutMs: options.timeouts.pairInit });
      if (this.#over) {
        pair.abort(
          new PdError('PAIR_CLOSED', `the link to ${peer} ended while its pair was opened`, { peer }),
        );
        return;
      }
      this.#pair = pair;
      this.#state = 'open';
      log.info({ peer }, `🤝ncclCommInitRank Success, ${self}👉${peer}, MyRank:0`);
      void pair.over.then((reason) => this.end(reason));
      this.#onOpen();
    } catch (error) {
      this.end(PdError.from(error, 'INTERNAL', { peer }));
    }
  }

  /** The state changes while `#open` waits, which the compiler does not see. */
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
        if (!first) {
          this.#unexpected('a second hello');
          return;
        }
        this.#greeted(answer.hello, answer.refused);
        return;
      case 'no-pair': {
        const { peer } = this;
        this.end(new PdError('PAIR_CLOSED', `peer ${peer} knows no pair with us`, { peer }), true);
        return;
      }
      case 'send':
      case 'no-room':
      case 'get': {
        const seq = answer.kind === 'get' ? answer.seq : undefined;
        const at = seq === undefined ? 0 : this.#outstanding.findIndex((one) => one.seq === seq);
        const one = this.#outstanding[at];
        if (!one || !this.#pair) {
          this.#unexpected('an answer to nothing');
          return;
        }
        this.#outstanding.splice(at, 1);
        this.#progressAt = this.#context.deadlines.now();
        this.#armAnswer();
        const { announcement } = one;
        this.#context.log.debug(
          { tensorId: announcement.tensorId, peer: this.peer, answer: answer.kind },
          `answer from ${this.peer}`,
        );
        if (announcement.answered(answer, this.#pair) === 'unexpected') {
          announcement.fail(this.#unexpectedError(`${answer.kind} for ${announcement.tensorId}`));
          this.#unexpected(`${answer.kind} for ${announcement.tensorId}`);
          return;
        }
        this.#onSpace();
        return;
      }
      default:
        unreachable(answer, 'answer');
        return;
    }
  }

  #greeted(
    hello: PeerHello,
    refused: { readonly code: PdError['code']; readonly message: string } | undefined,
  ): void {
    this.#hello = hello;
    this.#context.log.debug({ peer: this.peer, version: hello.version, features: hello.features }, 'hello');
    const bad = refused ?? mismatchOf(this.#context.hello, hello, this.#context.self, this.peer);
    if (bad) this.end(new PdError(bad.code, `peer ${this.peer}: ${bad.message}`, { peer: this.peer }));
  }

  #unexpectedError(what: string): PdError {
    return new PdError('MESSAGE_INVALID', `peer ${this.peer} sent an answer out of place: ${what}`, {
      peer: this.peer,
    });
  }

  #unexpected(what: string): void {
    this.#context.metrics.inc('pd_protocol_errors_total', 1, 'unexpected_answer');
    this.end(this.#unexpectedError(what));
  }

  /** Watches the oldest announcement. While data moves, the pair's own deadlines watch: a serial listener answers after it. */
  #armAnswer(): void {
    this.#answerDeadline?.cancel();
    this.#answerDeadline = undefined;
    const oldest = this.#outstanding[0];
    if (!oldest) return;
    const { deadlines, options } = this.#context;
    const due = Math.max(oldest.since, this.#progressAt) + options.timeouts.answer;
    this.#answerDeadline = deadlines.after(due - deadlines.now(), () => {
      if (this.#pair && this.#pair.pending > 0) {
        this.#progressAt = deadlines.now();
        return this.#armAnswer();
      }
      const { tensorId } = oldest.announcement;
      this.end(
        new PdError(
          'PEER_ANSWER_TIMEOUT',
          `peer ${this.peer} did not answer the announcement of ${tensorId} within ${options.timeouts.answer} ms` +
            ` (${this.#outstanding.length} outstanding, ${this.#answers} answers so far)`,
          { peer: this.peer, tensorId },
        ),
      );
    });
  }
}
