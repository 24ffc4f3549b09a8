/** What PUT and GET of peers are answered. Data operations are posted in the order of the answers. */
import { PdError } from '../../errors.ts';
import type { Pair } from '../../transport/transport.ts';
import { PROBE_TENSOR, type TransferId } from '../../wire/ids.ts';
import type { Answer, GetMessage, PutMessage } from '../../wire/messages.ts';
import { logTensor, standsFor, type TransferContext } from '../context.ts';
import { sentAs } from './form.ts';
import type { Intake } from './intake.ts';
import type { Keeper } from './keeper.ts';
import type { OutgoingPeers } from './peer.ts';
import type { Session } from './session.ts';

export type Asked = PutMessage | GetMessage;

export interface AnsweringParts {
  readonly intake: Intake;
  readonly keeper: Keeper;
  readonly outgoing: OutgoingPeers;
  /** Sends an answer, unless the session has been replaced. */
  reply(session: Session, answer: Answer): void;
}

export class Answering {
  readonly #context: TransferContext;
  readonly #parts: AnsweringParts;

  constructor(context: TransferContext, parts: AnsweringParts) {
    this.#context = context;
    this.#parts = parts;
  }

  /** Answers, in the end. What fails unforeseen is answered like what cannot be had. */
  async answer(session: Session, message: Asked): Promise<void> {
    try {
      if (message.cmd === 'PUT') await this.#put(session, message);
      else await this.#get(session, message);
    } catch (error) {
      const { log } = this.#context;
      const err = PdError.from(error);
      log.error({ peer: session.peer, err }, `${message.cmd} ${message.tensor_id} failed`);
      this.#parts.reply(session, refusal(message));
    }
  }

  async #put(session: Session, put: PutMessage): Promise<void> {
    const { intake, reply } = this.#parts;
    if (!(await this.#mayTransfer(session, put))) return;
    const twoBlocks = sentAs(this.#context.options, session.hello, put.native !== undefined);
    const entry = await intake.admit(put, session.peer, {
      twoBlocks,
      standsFor: this.#meantBy(session, put),
    });
    if (!entry) return reply(session, { kind: 'no-room' });
    const pair = await this.#pairOf(session, put);
    if (!pair) return intake.store.release(entry);
    void intake.post(entry, pair);
    reply(session, { kind: 'send' });
  }

  async #get(session: Session, get: GetMessage): Promise<void> {
    const { keeper, reply } = this.#parts;
    const { tensor_id: tensorId } = get;
    // pd-doctor asks for it to see whether anybody answers, and whether it is one of ours: nothing to log or count.
    if (tensorId === PROBE_TENSOR) return reply(session, { kind: 'get', ret: 1, gone: true });
    let pair = await this.#mayTransfer(session, get);
    if (!pair) return;
    const kept = keeper.find(tensorId, this.#meantBy(session, get));
    const native = session.hello !== undefined;
    if (!kept) {
      logTensor(this.#context, 'not here:', { tensorId }, session.peer);
      if (!native) return reply(session, { kind: 'get', ret: 1 });
      const near = keeper.store.nearMisses(tensorId);
      return reply(session, { kind: 'get', ret: 1, gone: keeper.gaveUp(tensorId), near });
    }
    const { shape, dtype, promptDigest } = kept;
    const copying = native ? undefined : keeper.frozenCopy(kept);
    if (!copying) {
      void keeper.send(kept, pair, native);
      return reply(session, { kind: 'get', ret: 0, shape, dtype, ...(native && { promptDigest }) });
    }
    const copy = await copying;
    pair = await this.#pairOf(session, get);
    if (!pair) return copy.held.free();
    void keeper.sendCopy(kept, copy, pair);
    reply(session, { kind: 'get', ret: 0, shape: copy.shape, dtype });
  }

  /** Only a peer that is not ours shows its engine's ids, with random suffixes. */
  #meantBy(session: Session, message: Asked): TransferId | undefined {
    return isNative(session, message) ? undefined : standsFor(this.#context, message.tensor_id);
  }

  /** The pair, where the message fits it; else it has been answered. */
  async #mayTransfer(session: Session, message: Asked): Promise<Pair | undefined> {
    const { metrics, limited, log, options } = this.#context;
    const { cmd } = message;
    if ((options.sendType === 'GET') === (cmd === 'GET')) return await this.#pairOf(session, message);
    const { peer } = session;
    metrics.inc('pd_protocol_errors_total', 1, 'send_type');
    const theirs = cmd === 'GET' ? 'GET' : 'PUT or PUT_ASYNC';
    limited.log(`send_type ${peer}`, (suppressed) =>
      log.error(
        { peer, suppressed },
        `send_type differs: ${peer} has ${theirs}, this engine has ${options.sendType}; its ${cmd} is refused`,
      ),
    );
    this.#parts.reply(session, refusal(message));
    return undefined;
  }

  /**
   * The pair on which the data travels, as of now: finding memory takes its time, and a peer that is not ours uses the newest. Undefined
   * where session or pair have gone, so that nobody would send or receive: it has been answered where there is anybody to answer.
   */
  async #pairOf(session: Session, message: Asked): Promise<Pair | undefined> {
    const pair = await this.#pairFor(session);
    if (session.replaced) return undefined;
    if (!pair) this.#noPair(session, message);
    return pair;
  }

  /** The peer's own pair. One that is not ours knows one per address, for both ways: the newest, whoever sent NEW. */
  async #pairFor(session: Session): Promise<Pair | undefined> {
    const own = await session.pair();
    if (session.hello) return own;
    const known = this.#parts.outgoing.known(session.peer);
    return own ? ((await known?.newerPair(session.since)) ?? own) : known?.frozenPair;
  }

  #noPair(session: Session, message: Asked): void {
    const { peer } = session;
    const { metrics, limited, log } = this.#context;
    metrics.inc('pd_protocol_errors_total', 1, 'no_pair');
    limited.log(`no pair ${peer}`, (suppressed) =>
      log.warn({ peer, suppressed }, `${peer} announces ${message.tensor_id} and has no pair with us`),
    );
    if (isNative(session, message)) {
      this.#parts.reply(session, { kind: 'no-pair' });
      return;
    }
    this.#parts.reply(session, refusal(message));
    // vLLM never opens a pair anew by itself, but its listener takes ours in place of the one it has.
    try {
      this.#parts.outgoing.of(peer).connect();
    } catch (error) {
      log.debug({ peer, err: PdError.from(error) }, 'no address to send NEW to');
    }
  }
}

/** It has sent a hello, or our field. */
function isNative({ hello }: Session, message: Asked): boolean {
  return hello !== undefined || (message.cmd === 'PUT' && message.native !== undefined);
}

function refusal({ cmd }: Asked): Answer {
  return cmd === 'PUT' ? { kind: 'no-room' } : { kind: 'get', ret: 1 };
}
