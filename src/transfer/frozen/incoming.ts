/** The listener: what NEW, PUT and GET of peers mean, and what they are answered. */
import { PdError, unreachable } from '../../errors.ts';
import type { Pair } from '../../transport/transport.ts';
import { answerToInvalid, decodeMessage, encodeAnswer } from '../../wire/codec.ts';
import { protocolErrorKind } from '../../wire/limits.ts';
import type { Answer, NewMessage, WireMessage } from '../../wire/messages.ts';
import { countFailure, joinPair, logJoined, type TransferContext } from '../context.ts';
import { mismatchOf } from '../hello.ts';
import type { Router } from '../router.ts';
import type { PairState } from '../types.ts';
import { Answering, type Asked } from './answering.ts';
import type { Intake } from './intake.ts';
import type { Keeper } from './keeper.ts';
import type { OutgoingPeers } from './peer.ts';
import { Session, Sessions } from './session.ts';

/** Pairs that are being opened at one time: each is a connection to where its NEW says. Beyond it a NEW is in vain. */
const MOST_OPENING = 256;

/** Whoever hears what is not of this wire; false for what is. */
export interface NativeEar {
  heard(identity: Buffer, body: Buffer): boolean;
  undelivered(identity: Buffer, error: PdError): boolean;
}

export class Incoming {
  readonly #context: TransferContext;
  readonly #router: Router;
  readonly #intake: Intake;
  readonly #answering: Answering;
  readonly #pairsChanged: () => void;
  /** Its messages are not looked at here. */
  readonly #native: NativeEar;
  readonly #sessions: Sessions;
  #closed = false;
  #opening = 0;

  constructor(
    context: TransferContext,
    router: Router,
    parts: {
      readonly intake: Intake;
      readonly keeper: Keeper;
      readonly outgoing: OutgoingPeers;
      readonly native: NativeEar;
      /** A pair was opened or is over. */
      pairsChanged(): void;
    },
  ) {
    this.#context = context;
    this.#sessions = new Sessions(context.deadlines);
    this.#router = router;
    this.#intake = parts.intake;
    this.#pairsChanged = parts.pairsChanged;
    this.#native = parts.native;
    const reply = (session: Session, answer: Answer) => this.#reply(session, answer);
    this.#answering = new Answering(context, { ...parts, reply });
  }

  start(): void {
    this.#router.start({
      onMessage: (identity, body) => this.#message(identity, body),
      onBadFrames: (frames) =>
        this.#bad('malformed', 'a peer', new PdError('MESSAGE_INVALID', `a message of ${frames} frames`)),
      onUndelivered: (identity, error) => this.#undelivered(identity, error),
    });
  }

  lostPair(peer: string): PdError | undefined {
    return this.#sessions.lostPair(peer);
  }

  /** The pair that a peer which is not ours has opened after `since`. */
  newerPair(peer: string, since: number): Pair | undefined {
    const session = this.#sessions.get(Buffer.from(peer));
    return session && !session.hello && session.since > since ? session.openPair : undefined;
  }

  get openPairs(): number {
    return this.#sessions.all().filter(({ openPair }) => openPair).length;
  }

  states(): PairState[] {
    const now = this.#context.deadlines.now();
    return this.#sessions
      .all()
      .filter((session) => session.paired && !session.ended)
      .map((session) => session.state(now));
  }

  /** Ends every pair that peers have opened. */
  close(reason: PdError): void {
    this.#closed = true;
    for (const session of this.#sessions.all()) session.replace(reason);
  }

  #message(identity: Buffer, body: Buffer): void {
    if (this.#closed || this.#native.heard(identity, body)) return;
    const peer = identity.toString();
    let message: WireMessage;
    try {
      message = decodeMessage(body, this.#context.options.limits);
    } catch (error) {
      const kind = protocolErrorKind(error);
      this.#bad(kind, peer, PdError.from(error));
      const answer = answerToInvalid(error);
      if (!answer) return;
      const session = this.#sessions.of(identity);
      session.enqueue(() => this.#reply(session, answer));
      return;
    }
    this.#context.log.debug({ peer, cmd: message.cmd }, `${message.cmd} from ${peer}`);
    switch (message.cmd) {
      case 'NEW':
        this.#new(identity, peer, message);
        return;
      case 'PUT':
      case 'GET':
        this.#announced(this.#sessions.of(identity), message);
        return;
      default:
        unreachable(message, 'message');
        return;
    }
  }

  #new(identity: Buffer, peer: string, message: NewMessage): void {
    const { hello, self, deadlines, log, metrics } = this.#context;
    const replaced = new PdError('PAIR_CLOSED', `peer ${peer} sent NEW: its pair of before is over`, {
      peer,
    });
    this.#sessions.get(identity)?.replace(replaced);
    const theirs = message.native;
    const bad = theirs ? mismatchOf(hello, theirs, self, peer) : undefined;
    const session = new Session(identity, deadlines.now(), !bad, theirs);
    this.#sessions.enter(session);
    if (theirs) {
      this.#answer(identity, bad ? { kind: 'hello', hello, refused: bad } : { kind: 'hello', hello });
    }
    if (!bad) {
      session.opening(this.#open(session, message), () => this.#pairsChanged());
      return;
    }
    metrics.inc(
      'pd_protocol_errors_total',
      1,
      bad.code === 'SEND_TYPE_MISMATCH' ? 'send_type' : 'fingerprint',
    );
    this.#context.limited.log(`mismatch ${peer}`, (suppressed) =>
      log.error({ peer, code: bad.code, suppressed }, `NEW of ${peer} refused: ${bad.message}`),
    );
  }

  async #open(session: Session, { unique_id: uniqueId }: NewMessage): Promise<Pair | undefined> {
    const { peer } = session;
    if (this.#opening >= MOST_OPENING) {
      const reason = new PdError('LIMIT_EXCEEDED', `${MOST_OPENING} pairs are being opened already`, {
        peer,
      });
      this.#bad('limit', peer, reason);
      this.#pairOver(session, reason);
      return undefined;
    }
    this.#opening++;
    try {
      const pair = await joinPair(this.#context, { uniqueId, rank: 1, peer });
      void pair.over.then((reason) => this.#pairOver(session, reason));
      if (session.ended) {
        pair.abort(session.ended);
        return undefined;
      }
      logJoined(this.#context, pair);
      return pair;
    } catch (error) {
      this.#pairOver(session, PdError.from(error, 'INTERNAL', { peer }));
      return undefined;
    } finally {
      this.#opening--;
    }
  }

  #pairOver(session: Session, reason: PdError): void {
    const { peer } = session;
    const known = session.ended !== undefined;
    const receiving = this.#intake.store.receivingFrom(peer);
    session.end(reason);
    this.#pairsChanged();
    if (known || this.#closed) return;
    this.#sessions.lose(peer, reason);
    const fields = { peer, code: reason.code, receiving };
    const text = `pair with ${peer} is over: ${reason.message}`;
    // A peer that leaves when nothing is under way has ended, not failed.
    if (reason.code === 'PEER_LOST' && receiving === 0) this.#context.log.info(fields, text);
    else {
      countFailure(this.#context, peer, reason);
      this.#context.log.warn(fields, text);
    }
    this.#intake.peerLost(peer, reason);
  }

  #announced(session: Session, message: Asked): void {
    const { options } = this.#context;
    if (session.queued >= options.limits.maxQueuePerPeer) {
      // Out of turn, but a peer that has this many waiting does not count answers any more.
      const reason = new PdError('LIMIT_EXCEEDED', `${session.peer} has ${session.queued} messages waiting`, {
        peer: session.peer,
      });
      this.#bad('limit', session.peer, reason);
      this.#pairOver(session, reason);
      return;
    }
    session.enqueue(() => this.#answering.answer(session, message));
  }

  #reply(session: Session, answer: Answer): void {
    if (!session.replaced) this.#answer(session.identity, answer);
  }

  #answer(identity: Buffer, answer: Answer): void {
    this.#context.log.debug({ peer: identity.toString(), answer: answer.kind }, 'answer');
    this.#router.answer(identity, encodeAnswer(answer));
  }

  #undelivered(identity: Buffer, error: PdError): void {
    if (this.#native.undelivered(identity, error)) return;
    const session = this.#sessions.get(identity);
    this.#bad('peer_lost', identity.toString(), error);
    if (session?.paired) this.#pairOver(session, error);
  }

  #bad(kind: 'peer_lost' | ReturnType<typeof protocolErrorKind>, peer: string, error: PdError): void {
    const { metrics, limited, log } = this.#context;
    if (kind !== 'peer_lost') metrics.inc('pd_protocol_errors_total', 1, kind);
    limited.log(`bad ${kind} ${peer}`, (suppressed) =>
      log.warn(
        { peer: peer.slice(0, 128), kind, suppressed },
        `message of ${peer.slice(0, 128)}: ${error.message}`,
      ),
    );
  }
}
