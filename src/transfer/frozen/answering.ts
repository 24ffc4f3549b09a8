/** What PUT and GET of peers, alone or in bundles, are answered. Data operations are posted in the order of the answers. */
import { PdError } from '../../errors.ts';
import type { Pair } from '../../transport/transport.ts';
import { PROBE_TENSOR, type TransferId } from '../../wire/ids.ts';
import type { Answer, GetMessage, GetsMessage, PutMessage, PutsMessage } from '../../wire/messages.ts';
import { logTensor, standsFor, type TransferContext } from '../context.ts';
import { sentAs } from './form.ts';
import type { Intake } from './intake.ts';
import type { Keeper } from './keeper.ts';
import type { OutgoingPeer } from './peer.ts';
import { missing, refuseSendType } from './refusals.ts';
import { regionsOf, runsOf, runsOfTaken } from './regions.ts';
import type { KeptTensor } from './send-store.ts';
import type { Session } from './session.ts';
import type { StoreEntry } from './store.ts';

export type Asked = PutMessage | GetMessage | PutsMessage | GetsMessage;

export interface AnsweringParts {
  readonly intake: Intake;
  readonly keeper: Keeper;
  readonly peers: { outgoing(peer: string): OutgoingPeer; known(peer: string): OutgoingPeer | undefined };
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
      switch (message.cmd) {
        case 'PUT':
          return await this.#put(session, message);
        case 'GET':
          return await this.#get(session, message);
        case 'PUTS':
          return await this.#puts(session, message);
        case 'GETS':
          return await this.#gets(session, message);
      }
    } catch (error) {
      const { log } = this.#context;
      const err = PdError.from(error);
      log.error({ peer: session.peer, err }, `${message.cmd} ${nameOf(message)} failed`);
      this.#parts.reply(session, refusal(message));
    }
  }

  async #put(session: Session, put: PutMessage): Promise<void> {
    const { intake, reply } = this.#parts;
    if (!(await this.#mayTransfer(session, put))) return;
    const twoBlocks = sentAs(this.#context.options, session.hello, put.native !== undefined);
    const meant = this.#meantBy(session, put);
    const entry = await intake.admit(put, session.peer, { twoBlocks, standsFor: meant });
    if (!entry) return reply(session, { kind: 'no-room' });
    const pair = await this.#pairOf(session, put, [entry]);
    if (!pair) return;
    void session.busy(intake.post([entry], [entry.held.memory], pair));
    reply(session, { kind: 'send' });
  }

  async #puts(session: Session, puts: PutsMessage): Promise<void> {
    const { intake, reply } = this.#parts;
    if (!(await this.#mayTransfer(session, puts))) return;
    const admitted = await intake.admitAll(puts.tensors, session.peer);
    const entries = admitted.filter((one) => typeof one === 'object');
    const pair = await this.#pairOf(session, puts, entries);
    if (!pair) return;
    const memory = entries.map(({ held }) => held.memory);
    const runs = runsOf(memory);
    const taken = admitted.map((one) => typeof one === 'object');
    if (entries.length > 0) {
      const regions = regionsOf(memory, [runs, runsOfTaken(puts.runs, taken)]);
      void session.busy(intake.post(entries, regions, pair));
    }
    const verdicts = admitted.map((one) => (typeof one === 'object' ? 'send' : one));
    reply(session, { kind: 'puts', seq: puts.seq, verdicts, runs });
  }

  async #get(session: Session, get: GetMessage): Promise<void> {
    const { keeper, reply } = this.#parts;
    // pd-doctor asks for it to see whether anybody answers: no peer's mistake, nothing to log or count.
    if (get.tensor_id === PROBE_TENSOR) return reply(session, missing(get));
    if (!(await this.#mayTransfer(session, get))) return;
    // One of ours that has not heard our hello yet asks without a number, and what it asks next would wait behind this: it asks again at once.
    const inOrder = session.hello !== undefined && get.native?.seq === undefined;
    const meant = this.#meantBy(session, get);
    const kept = await keeper.find(get.tensor_id, inOrder ? 0 : this.#parkMs, meant);
    const pair = await this.#pairFor(session);
    if (session.replaced) return;
    if (!pair) return this.#noPair(session, get);
    if (!kept || kept.gone) {
      logTensor(this.#context, 'not here:', { tensorId: get.tensor_id }, session.peer);
      const near = keeper.store.nearMisses(get.tensor_id);
      return reply(session, missing(get, keeper.gaveUp(get.tensor_id, meant), near));
    }
    const seq = get.native?.seq;
    const { shape, dtype, promptDigest } = kept;
    if (session.hello === undefined) {
      const copy = await keeper.foreignCopy(kept);
      if (copy) {
        const newest = await this.#pairFor(session);
        if (session.replaced || !newest) {
          copy.held.free();
          return session.replaced ? undefined : this.#noPair(session, get);
        }
        void session.busy(keeper.sendCopy(kept, copy, newest));
        return reply(session, { kind: 'get', ret: 0, shape: copy.shape, dtype });
      }
    }
    void session.busy(keeper.send([kept], [kept.held.memory], pair, session.hello !== undefined));
    const told = seq === undefined ? {} : { seq, promptDigest };
    reply(session, { kind: 'get', ret: 0, shape, dtype, ...told });
  }

  /** Waits until all are there, or for as long as it may: what is there then goes, and the rest is asked for again. */
  async #gets(session: Session, gets: GetsMessage): Promise<void> {
    const { keeper, reply } = this.#parts;
    if (!(await this.#mayTransfer(session, gets))) return;
    const found = await Promise.all(gets.tensors.map((one) => keeper.find(one.tensor_id, this.#parkMs)));
    const pair = await this.#pairFor(session);
    if (session.replaced) return;
    if (!pair) return this.#noPair(session, gets);
    const kept: KeptTensor[] = [];
    const alone: boolean[] = [];
    const tensors = found.map((one, index) => {
      // Two names may mean one tensor, which is sent once.
      if (!one || one.gone || kept.includes(one)) {
        return keeper.gaveUp(gets.tensors[index]!.tensor_id) ? 'gone' : 'missing';
      }
      kept.push(one);
      alone.push(one.held.bytes !== gets.tensors[index]!.bytes);
      return { shape: one.shape, dtype: one.dtype, promptDigest: one.promptDigest };
    });
    const memory = kept.map(({ held }) => held.memory);
    const runs = runsOf(memory);
    if (kept.length > 0) {
      const taken = tensors.map((form) => typeof form === 'object');
      const regions = regionsOf(memory, [runs, runsOfTaken(gets.runs, taken)], alone);
      void session.busy(keeper.send(kept, regions, pair, true));
    }
    const near = gets.tensors
      .filter((_, index) => tensors[index] === 'missing')
      .slice(0, 1)
      .flatMap((one) => keeper.store.nearMisses(one.tensor_id));
    reply(session, { kind: 'gets', seq: gets.seq, tensors, runs, ...(near.length > 0 ? { near } : {}) });
  }

  /** Only a peer that is not ours shows its engine's ids, with random suffixes. */
  #meantBy(session: Session, message: PutMessage | GetMessage): TransferId | undefined {
    const ours = session.hello !== undefined || message.native !== undefined;
    return ours ? undefined : standsFor(this.#context, message.tensor_id);
  }

  /** Half of what the asker waits for an answer, so that its deadline means that we are dead. */
  get #parkMs(): number {
    return this.#context.options.timeouts.answer / 2;
  }

  /** The pair, where the message fits it; else it has been answered. */
  async #mayTransfer(session: Session, message: Asked): Promise<Pair | undefined> {
    const direction = message.cmd === 'PUT' || message.cmd === 'PUTS' ? 'PUT' : 'GET';
    if ((this.#context.options.sendType === 'GET') !== (direction === 'GET')) {
      refuseSendType(this.#context, session.peer, direction);
      this.#parts.reply(session, refusal(message));
      return undefined;
    }
    const pair = await this.#pairFor(session);
    if (!pair) this.#noPair(session, message);
    return pair;
  }

  /**
   * The pair on which the data will come, once there is memory for it: finding that may have taken its time, and a peer that is not ours
   * sends on the newest. Undefined where session or pair have gone: nobody would send.
   */
  async #pairOf(session: Session, message: Asked, entries: readonly StoreEntry[]): Promise<Pair | undefined> {
    const pair = await this.#pairFor(session);
    if (!session.replaced && pair) return pair;
    for (const entry of entries) this.#parts.intake.store.release(entry);
    if (!session.replaced) this.#noPair(session, message);
    return undefined;
  }

  /** The peer's own pair. One that is not ours knows one per address, for both ways: the newest, whoever sent NEW. */
  async #pairFor(session: Session): Promise<Pair | undefined> {
    const own = await session.pair();
    if (session.hello) return own;
    const known = this.#parts.peers.known(session.peer);
    return own ? ((await known?.newerPair(session.since)) ?? own) : known?.foreignPair;
  }

  #noPair(session: Session, message: Asked): void {
    const { peer } = session;
    const { metrics, limited, log } = this.#context;
    metrics.inc('pd_protocol_errors_total', 1, 'no_pair');
    limited.log(`no pair ${peer}`, (suppressed) =>
      log.warn({ peer, suppressed }, `${peer} announces ${nameOf(message)} and has no pair with us`),
    );
    if (session.hello !== undefined || 'tensors' in message || message.native !== undefined) {
      this.#parts.reply(session, { kind: 'no-pair' });
      return;
    }
    this.#parts.reply(session, refusal(message));
    // vLLM never opens a pair anew by itself, but its listener takes ours in place of the one it has.
    try {
      this.#parts.peers.outgoing(peer).connect();
    } catch (error) {
      log.debug({ peer, err: PdError.from(error) }, 'no address to send NEW to');
    }
  }
}

function nameOf(message: Asked): string {
  if (!('tensors' in message)) return message.tensor_id;
  return `${message.tensors[0]?.tensor_id} and ${message.tensors.length - 1} more`;
}

function refusal(message: Asked): Answer {
  switch (message.cmd) {
    case 'PUT':
      return { kind: 'no-room' };
    case 'GET':
      return missing(message);
    case 'PUTS':
      return { kind: 'puts', seq: message.seq, verdicts: message.tensors.map(() => 'no-room'), runs: [] };
    case 'GETS':
      return { kind: 'gets', seq: message.seq, tensors: message.tensors.map(() => 'missing'), runs: [] };
  }
}
