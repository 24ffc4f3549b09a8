/** The listener: what NEW, PUT and GET of peers mean, and what they are answered. */
import { PdError, unreachable } from '../errors.ts';
import type { Pair } from '../transport/transport.ts';
import { decodeMessage, encodeAnswer } from '../wire/codec.ts';
import { PROBE_TENSOR } from '../wire/ids.ts';
import { protocolErrorKind } from '../wire/limits.ts';
import type { Answer, GetMessage, NewMessage, PutMessage, WireMessage } from '../wire/messages.ts';
import { countFailure, type TransferContext, tensorFields } from './context.ts';
import { mismatchOf } from './hello.ts';
import type { Intake } from './intake.ts';
import type { Keeper } from './keeper.ts';
import type { OutgoingPeer } from './peer.ts';
import { missing, refusalOf, refuseSendType } from './refusals.ts';
import type { Router } from './router.ts';
import { Session } from './session.ts';
import { Sessions } from './sessions.ts';
import type { PairState } from './types.ts';

export interface IncomingPeers {
  outgoing(peer: string): OutgoingPeer;
  known(peer: string): OutgoingPeer | undefined;
  /** A pair was opened or is over. */
  pairsChanged(): void;
}

export class Incoming {
  readonly #context: TransferContext;
  readonly #router: Router;
  readonly #intake: Intake;
  readonly #keeper: Keeper;
  readonly #peers: IncomingPeers;
  readonly #sessions: Sessions;
  #closed = false;

  constructor(
    context: TransferContext,
    router: Router,
    parts: { readonly intake: Intake; readonly keeper: Keeper; readonly peers: IncomingPeers },
  ) {
    this.#context = context;
    this.#sessions = new Sessions(context.deadlines);
    this.#router = router;
    this.#intake = parts.intake;
    this.#keeper = parts.keeper;
    this.#peers = parts.peers;
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

  get openPairs(): number {
    return this.#sessions.all().filter((session) => session.open).length;
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
    if (this.#closed) return;
    const peer = identity.toString();
    let message: WireMessage;
    try {
      message = decodeMessage(body, this.#context.options.limits);
    } catch (error) {
      const kind = protocolErrorKind(error);
      this.#bad(kind, peer, PdError.from(error));
      // A PUT or GET that cannot be taken is answered, so that its sender does not wait for its deadline.
      const answer = refusalOf(body);
      if (answer) this.#sessions.of(identity).enqueue(() => this.#answer(identity, answer));
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
    const theirs = message.ours;
    const bad = theirs ? mismatchOf(hello, theirs, self, peer) : undefined;
    const session = new Session({ identity, peer, since: deadlines.now(), hello: theirs, paired: !bad });
    this.#sessions.enter(session);
    if (theirs) {
      this.#answer(identity, bad ? { kind: 'hello', hello, refused: bad } : { kind: 'hello', hello });
    }
    if (!bad) {
      session.opening(this.#open(session, message), () => this.#peers.pairsChanged());
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

  async #open(session: Session, { unique_id }: NewMessage): Promise<Pair | undefined> {
    const { transport, options, log, self } = this.#context;
    const { peer } = session;
    try {
      const timeoutMs = options.timeouts.pairInit;
      const pair = await transport.open({ uniqueId: unique_id, rank: 1, peer, timeoutMs });
      void pair.over.then((reason) => this.#pairOver(session, reason));
      if (session.ended) {
        pair.abort(session.ended);
        return undefined;
      }
      log.info({ peer }, `🤝ncclCommInitRank Success, ${self}👈${peer}, MyRank:1`);
      return pair;
    } catch (error) {
      this.#pairOver(session, PdError.from(error, 'INTERNAL', { peer }));
      return undefined;
    }
  }

  #pairOver(session: Session, reason: PdError): void {
    const { peer } = session;
    const known = session.ended !== undefined;
    const receiving = this.#intake.store.receivingFrom(peer);
    session.end(reason);
    this.#peers.pairsChanged();
    if (known || this.#closed) return;
    this.#sessions.lose(peer, reason);
    const fields = { peer, code: reason.code, receiving };
    const text = `pair with ${peer} is over: ${reason.message}`;
    // A peer that leaves when nothing is under way has ended, not failed.
    if (reason.code === 'PEER_LOST' && receiving === 0) this.#context.log.info(fields, text);
    else {
      countFailure(this.#context, reason);
      this.#context.log.warn(fields, text);
    }
    this.#intake.peerLost(peer, reason);
  }

  #announced(session: Session, message: PutMessage | GetMessage): void {
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
    const run = async () => {
      try {
        if (message.cmd === 'PUT') await this.#put(session, message);
        else await this.#get(session, message);
      } catch (error) {
        const { log } = this.#context;
        log.error(
          { peer: session.peer, err: PdError.from(error) },
          `${message.cmd} ${message.tensor_id} failed`,
        );
        this.#reply(session, message.cmd === 'PUT' ? { kind: 'no-room' } : missing(message));
      }
    };
    // Answers to these find their GET by `seq`, so that one that waits holds up no other.
    if (message.cmd === 'GET' && message.ours?.seq !== undefined) void run();
    else session.enqueue(run);
  }

  async #put(session: Session, put: PutMessage): Promise<void> {
    const { peer } = session;
    if (this.#context.options.sendType === 'GET') {
      refuseSendType(this.#context, peer, 'PUT');
      return this.#reply(session, { kind: 'no-room' });
    }
    const pair = await this.#pairFor(session);
    if (!pair) return this.#noPair(session, put);
    const entry = await this.#intake.admit(put, peer);
    if (!entry) return this.#reply(session, { kind: 'no-room' });
    if (session.replaced) return this.#intake.store.release(entry);
    if ((await this.#pairFor(session)) !== pair) {
      // The pair died while memory was found: nobody would send.
      this.#intake.store.release(entry);
      return this.#noPair(session, put);
    }
    this.#intake.post(entry, pair);
    this.#reply(session, { kind: 'send' });
  }

  async #get(session: Session, get: GetMessage): Promise<void> {
    const { peer } = session;
    const { options, log } = this.#context;
    // pd-doctor asks for it to see whether anybody answers: no peer's mistake, nothing to log or count.
    if (get.tensor_id === PROBE_TENSOR) return this.#reply(session, missing(get));
    if (options.sendType !== 'GET') {
      refuseSendType(this.#context, peer, 'GET');
      return this.#reply(session, missing(get));
    }
    if (!(await this.#pairFor(session))) return this.#noPair(session, get);
    // Half of what the asker waits for an answer, so that its deadline means that we are dead.
    const kept = await this.#keeper.find(get.tensor_id, options.timeouts.answer / 2);
    const pair = await this.#pairFor(session);
    if (session.replaced) return;
    if (!pair) return this.#noPair(session, get);
    if (!kept || kept.gone) {
      log.debug(
        tensorFields(this.#context, { tensorId: get.tensor_id }, peer),
        `${get.tensor_id} is not here`,
      );
      return this.#reply(session, missing(get, this.#keeper.gaveUp(get.tensor_id)));
    }
    const seq = get.ours?.seq;
    const { shape, dtype } = kept;
    this.#keeper.send(kept, pair, peer, session.hello !== undefined);
    this.#reply(session, { kind: 'get', ret: 0, shape, dtype, ...(seq === undefined ? {} : { seq }) });
  }

  /** The peer's own pair, or, where it is not ours, the one that we opened to it: vLLM uses one for both ways. */
  async #pairFor(session: Session): Promise<Pair | undefined> {
    return (await session.pair()) ?? this.#peers.known(session.peer)?.foreignPair;
  }

  #noPair(session: Session, message: PutMessage | GetMessage): void {
    const { peer } = session;
    const { metrics, limited, log } = this.#context;
    metrics.inc('pd_protocol_errors_total', 1, 'no_pair');
    limited.log(`no pair ${peer}`, (suppressed) =>
      log.warn({ peer, suppressed }, `${peer} announces ${message.tensor_id} and has no pair with us`),
    );
    const ours = session.hello !== undefined || message.ours !== undefined;
    if (ours) {
      this.#reply(session, { kind: 'no-pair' });
      return;
    }
    this.#reply(session, message.cmd === 'PUT' ? { kind: 'no-room' } : missing(message));
    // vLLM never opens a pair anew by itself, but its listener takes ours in place of the one it has.
    try {
      this.#peers.outgoing(peer).connect();
    } catch (error) {
      log.debug({ peer, err: PdError.from(error) }, 'no address to send NEW to');
    }
  }

  #reply(session: Session, answer: Answer): void {
    if (!session.replaced) this.#answer(session.identity, answer);
  }

  #answer(identity: Buffer, answer: Answer): void {
    this.#context.log.debug({ peer: identity.toString(), answer: answer.kind }, 'answer');
    this.#router.answer(identity, encodeAnswer(answer));
  }

  #undelivered(identity: Buffer, error: PdError): void {
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
