/**
 * The native hand-over's part of the transfer thread: connections, messages and the bytes that travel on pairs. It decides nothing: what is
 * said and written comes from the core thread (hand-over.ts), over `channel.ts`.
 *
 *   consumer   NativeLink (DEALER + pair), one for each producer        ask, receive
 *   producer   a session for each process that has said HELLO (ROUTER)  answer, write
 */
import { type ErrorData, PdError, unreachable } from '../../errors.ts';
import type { Pair } from '../../transport/transport.ts';
import { protocolErrorKind } from '../../wire/limits.ts';
import { logJoining, type TransferContext } from '../context.ts';
import type { Router } from '../router.ts';
import type { PairState } from '../types.ts';
import { type Cargo, loadCargo } from './cargo.ts';
import type { FromWire, NativeInit, ToWire } from './channel.ts';
import { decodeAsked, encodeNative, isNativeMessage, rehearseCodec } from './codec.ts';
import { identityOf, nativeHello, peerOf, refusalOf } from './hello.ts';
import { NativeLink } from './link.ts';
import type { HelloMessage, NativeMessage } from './messages.ts';
import { probeConsumer } from './probe.ts';

type WriteCommand = Extract<ToWire, { readonly kind: 'write' }>;

/** A process that has connected to our ROUTER and may be answered. */
interface Session {
  readonly identity: Buffer;
  readonly peer: string;
  readonly hello: HelloMessage;
  readonly since: number;
  pair: Promise<Pair> | undefined;
  openPair: Pair | undefined;
  /** Of the pair. */
  parts: number;
  /** What is written leaves in the order in which it was asked for: the gathers under way and those that wait, oldest first. */
  readonly loading: Promise<unknown>[];
  leaving: Promise<unknown>;
  /** Bytes of parts that are gathered or sent, and parts that wait until fewer are. */
  underWay: number;
  readonly crowded: { readonly bytes: number; readonly go: () => void }[];
}

/** Sessions are small, but anybody can make routing ids up. */
const MOST_SESSIONS = 4_096;
/** Pairs that are being opened at one time. */
const MOST_OPENING = 256;
/** Parts of one connection that are gathered at a time: while one is on its way the next is made ready. */
const GATHERS = 3;
/**
 * Bytes of one connection that are gathered or sent at a time. More would take all of `--kv-buffer-size` at either end, and go by host memory from
 * there on, at a tenth of the speed.
 */
const WINDOW_BYTES = 512 * 2 ** 20;
const WINDOW_SHARE = 0.6;
/** A connection that nothing has been said on for so long is closed where there are more than `--max-peers`. */
const IDLE_MS = 10_000;

export class NativeWire {
  readonly #context: TransferContext;
  readonly #router: Router;
  readonly #init: NativeInit;
  readonly #hello: HelloMessage;
  readonly #tell: (event: FromWire) => void;
  readonly #pairsChanged: () => void;
  readonly #links = new Map<string, NativeLink>();
  /** Oldest first. */
  readonly #sessions = new Map<string, Session>();
  #opening = 0;
  #closed: PdError | undefined;

  constructor(
    context: TransferContext,
    router: Router,
    init: NativeInit,
    on: { tell(event: FromWire): void; pairsChanged(): void },
  ) {
    this.#context = context;
    this.#router = router;
    this.#init = init;
    this.#hello = nativeHello(context.options, init);
    this.#tell = on.tell;
    this.#pairsChanged = on.pairsChanged;
    // as the core thread does with the rest (rehearsal.ts)
    if (init.direct) rehearseCodec();
  }

  /** Open pairs, of both ways. */
  get openPairs(): number {
    let count = 0;
    for (const { openPair } of this.#sessions.values()) if (openPair) count++;
    return count + [...this.#links.values()].filter(({ paired }) => paired).length;
  }

  /** Connections to producers, and those of consumers, by their pairs where bytes come so. */
  states(): PairState[] {
    const incoming = [...this.#sessions.values()].map((session): PairState => {
      const { peer, pair, openPair, since } = session;
      const state = openPair ? 'open' : pair ? 'opening' : 'over';
      const outstanding = openPair?.pending ?? 0;
      return {
        peer,
        direction: 'incoming',
        state,
        ours: true,
        queued: 0,
        outstanding,
        sinceMs: this.#ageOf(since),
      };
    });
    const outgoing = [...this.#links.values()].map((link): PairState => {
      const { peer, state, outstanding, since } = link;
      return {
        peer,
        direction: 'outgoing',
        state,
        ours: true,
        queued: 0,
        outstanding,
        sinceMs: this.#ageOf(since),
      };
    });
    return [...outgoing, ...incoming].filter(({ state }) => state !== 'over');
  }

  #ageOf(since: number): number {
    return Math.round(this.#context.deadlines.now() - since);
  }

  command(command: ToWire): void {
    if (this.#closed) return;
    switch (command.kind) {
      case 'connect':
        this.#link(command.peer);
        return;
      case 'probe':
        probeConsumer(this.#context, this.#hello, command, (error) =>
          this.#tell({ kind: 'unwilling', peer: command.peer, id: command.id, error: error.toData() }),
        );
        return;
      case 'ask':
        this.#link(command.peer)?.ask(command.message);
        return;
      case 'answer':
        this.#answer(command.peer, command.message);
        return;
      case 'introduce':
        this.#answer(command.peer, this.#hello);
        return;
      case 'write':
        this.#write(command);
        return;
      case 'receive': {
        const link = this.#links.get(command.peer);
        if (link) link.receive(command);
        else this.#tell({ kind: 'received', receipt: command.receipt, error: gone(command.peer).toData() });
        return;
      }
      case 'reset':
        this.#links
          .get(command.peer)
          ?.end(new PdError('MESSAGE_INVALID', `peer ${command.peer}: ${command.why}`));
        return;
      default:
        unreachable(command, 'command to the native wire');
    }
  }

  /** What the ROUTER has read, where it is of this wire; false for what is not. */
  heard(identity: Buffer, body: Buffer): boolean {
    if (!isNativeMessage(body)) return false;
    const peer = peerOf(identity);
    try {
      const message = decodeAsked(body, { maxBlocks: this.#init.shape.blocks });
      this.#context.log.debug({ peer, cmd: message.cmd }, `${message.cmd} from ${peer}`);
      if (message.cmd === 'HELLO') this.#introduced(identity, peer, message);
      else {
        // as early as can be known: opening takes its time
        if (message.cmd === 'WANT' && message.transport !== 'direct') this.#openPair(peer);
        this.#tell({ kind: 'asked', peer, message });
      }
    } catch (error) {
      const { metrics, limited, log } = this.#context;
      const kind = protocolErrorKind(error);
      metrics.inc('pd_protocol_errors_total', 1, kind);
      limited.log(`bad ${kind} ${peer}`, (suppressed) =>
        log.warn(
          { peer, kind, suppressed },
          `message of ${peer.slice(0, 128)}: ${PdError.from(error).message}`,
        ),
      );
    }
    return true;
  }

  /** An answer could not be delivered; false where it was not one of this wire. */
  undelivered(identity: Buffer, error: PdError): boolean {
    const peer = peerOf(identity);
    if (identity.toString() !== identityOf(peer)) return false;
    const session = this.#sessions.get(peer);
    this.#sessions.delete(peer);
    session?.openPair?.abort(error);
    this.#tell({ kind: 'lost', way: 'from', peer, error: error.toData() });
    return true;
  }

  /** Ends every connection and pair. */
  close(reason: PdError): void {
    this.#closed = reason;
    for (const link of [...this.#links.values()]) link.end(reason);
    for (const { openPair } of this.#sessions.values()) openPair?.abort(reason);
    this.#sessions.clear();
  }

  #link(peer: string): NativeLink | undefined {
    const known = this.#links.get(peer);
    if (known) return known;
    try {
      const link = new NativeLink(this.#context, this.#init, this.#hello, peer, {
        introduced: (theirs) => this.#tell({ kind: 'introduced', way: 'to', peer, hello: theirs }),
        answered: (message) => this.#tell({ kind: 'answered', peer, message }),
        received: (receipt, error) => this.#tell({ kind: 'received', receipt, ...(error && { error }) }),
        lost: (error) => this.#lost(peer, error),
        pairsChanged: this.#pairsChanged,
      });
      this.#closeIdle();
      this.#links.set(peer, link);
      return link;
    } catch (error) {
      this.#lost(peer, PdError.from(error));
      return undefined;
    }
  }

  #lost(peer: string, error: PdError): void {
    this.#links.delete(peer);
    if (this.#closed) return;
    this.#pairsChanged();
    const { log, limited } = this.#context;
    const fields = { peer, code: error.code };
    const text = `connection to ${peer} ended: ${error.message}`;
    if (error.code === 'PAIR_CLOSED') log.info(fields, text);
    else
      limited.log(`native ${peer} ${error.code}`, (suppressed) => log.warn({ ...fields, suppressed }, text));
    this.#tell({ kind: 'lost', way: 'to', peer, error: error.toData() });
  }

  #closeIdle(): void {
    const { options, deadlines } = this.#context;
    const excess = this.#links.size + 1 - options.limits.maxPeers;
    if (excess <= 0) return;
    const before = deadlines.now() - IDLE_MS;
    const idle = [...this.#links.values()].filter(({ lastUsedAt }) => lastUsedAt < before);
    idle.sort((a, b) => a.lastUsedAt - b.lastUsedAt);
    for (const link of idle.slice(0, excess)) link.close('it is idle, and others are needed (--max-peers)');
  }

  #introduced(identity: Buffer, peer: string, hello: HelloMessage): void {
    const { self, metrics, limited, log } = this.#context;
    if (hello.probe !== undefined) {
      const unfit = refusalOf(this.#hello, hello, self, peer);
      this.#router.answer(
        identity,
        this.#encode(unfit ? { ...this.#hello, refused: unfit } : this.#hello, 1),
      );
      return;
    }
    const before = this.#sessions.get(peer);
    before?.openPair?.abort(new PdError('PAIR_CLOSED', `peer ${peer} has connected anew`, { peer }));
    this.#sessions.delete(peer);
    const refused = refusalOf(this.#hello, hello, self, peer);
    this.#router.answer(identity, this.#encode(refused ? { ...this.#hello, refused } : this.#hello, 1));
    if (refused) {
      metrics.inc('pd_protocol_errors_total', 1, 'fingerprint');
      limited.log(`mismatch ${peer}`, (suppressed) =>
        log.error({ peer, code: refused.code, suppressed }, `HELLO of ${peer} refused: ${refused.message}`),
      );
      return;
    }
    if (this.#sessions.size >= MOST_SESSIONS) {
      const [oldest] = this.#sessions.values();
      oldest?.openPair?.abort(new PdError('LIMIT_EXCEEDED', 'too many others have connected'));
      if (oldest) this.#sessions.delete(oldest.peer);
    }
    const fresh = {
      pair: undefined,
      openPair: undefined,
      parts: 0,
      loading: [],
      leaving: Promise.resolve(),
      underWay: 0,
      crowded: [],
    };
    const since = this.#context.deadlines.now();
    this.#sessions.set(peer, { identity, peer, hello, since, ...fresh });
    this.#tell({ kind: 'introduced', way: 'from', peer, hello });
  }

  /** With a consumer that wants something over it; once for each connection. */
  #openPair(peer: string): void {
    const session = this.#sessions.get(peer);
    const { transport, options, log, self, limited } = this.#context;
    if (!session || session.pair) return;
    if (this.#opening >= MOST_OPENING) {
      limited.log('native opening', (suppressed) =>
        log.warn({ peer, suppressed }, `WANT of ${peer}: ${MOST_OPENING} pairs are being opened already`),
      );
      return;
    }
    this.#opening++;
    const uniqueId = transport.createUniqueId();
    this.#answer(peer, { cmd: 'PAIR', from: this.#init.nonce, to: session.hello.from, uniqueId });
    logJoining(this.#context, peer, 0);
    const pair = transport.open({ uniqueId, rank: 0, peer, timeoutMs: options.timeouts.pairInit });
    session.pair = pair;
    pair
      .then(
        (open) => {
          session.openPair = open;
          this.#pairsChanged();
          void open.over.then((reason) => {
            session.openPair = undefined;
            this.#pairsChanged();
            log.info({ peer, code: reason.code }, `pair with ${peer} is over: ${reason.message}`);
          });
          if (this.#sessions.get(peer) !== session) open.abort(gone(peer));
          else log.info({ peer }, `🤝ncclCommInitRank Success, ${self}👉${peer}, MyRank:0`);
        },
        (error: unknown) =>
          log.warn({ peer }, `pair with ${peer} could not be opened: ${PdError.from(error).message}`),
      )
      .finally(() => {
        this.#opening--;
      });
  }

  #write(command: WriteCommand): void {
    const { launch, peer, ready } = command;
    const session = this.#sessions.get(peer);
    let step = ready?.step;
    const gathered = () => {
      if (step !== undefined) this.#tell({ kind: 'gathered', step });
      step = undefined;
    };
    const ended = (error?: ErrorData) => {
      gathered();
      this.#tell({ kind: 'written', launch, ...(error && { error }) });
    };
    if (!session) {
      ended(gone(peer).toData());
      return;
    }
    const bytes = this.#bytesOf(command);
    // begins once few enough before it are still being gathered or sent, and leaves behind all of them: so they enter in order
    const before = session.loading.at(-GATHERS);
    const loaded = this.#enter(session, bytes)
      .then(() => before)
      .then(() => this.#load(command));
    const settled = loaded.then(gathered, gathered);
    session.loading.push(settled);
    void settled.then(() => session.loading.shift());
    const sent = session.leaving.then(async () => this.#send(session, command, await loaded));
    session.leaving = sent.catch(() => undefined);
    // A part that leaves from memory of its own needs its blocks no more: DONE may follow it, and whoever hears it waits for the part.
    const staged = this.#context.device.kind !== 'host';
    sent
      .then(({ done }) => {
        if (!staged) return done.then(() => ended());
        gathered();
        this.#tell({ kind: 'written', launch, leaving: true });
        // where it fails the pair has ended, which its receiver sees
        return done.catch(() => undefined).then(() => this.#tell({ kind: 'sent' }));
      })
      .catch((error: unknown) => ended(PdError.from(error, 'PEER_LOST', { peer }).toData()))
      .finally(() => this.#leave(session, bytes));
  }

  /** Resolves once there is room in the window: at once where nothing is under way, however large the part. */
  #enter(session: Session, bytes: number): Promise<void> {
    if (session.crowded.length === 0 && this.#fits(session, bytes)) {
      session.underWay += bytes;
      return Promise.resolve();
    }
    return new Promise((go) => session.crowded.push({ bytes, go }));
  }

  #leave(session: Session, bytes: number): void {
    session.underWay -= bytes;
    for (let [next] = session.crowded; next && this.#fits(session, next.bytes); [next] = session.crowded) {
      session.crowded.shift();
      session.underWay += next.bytes;
      next.go();
    }
  }

  #fits({ underWay }: Session, bytes: number): boolean {
    const window = Math.min(WINDOW_BYTES, this.#context.options.kvBufferSize * WINDOW_SHARE);
    return underWay === 0 || underWay + bytes <= window;
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

  async #send(
    session: Session,
    command: WriteCommand,
    cargo: Cargo,
  ): Promise<{ readonly done: Promise<void> }> {
    const { peer } = session;
    const { part } = command;
    try {
      const pair = await session.pair;
      if (!pair || this.#sessions.get(peer) !== session || !session.openPair) throw gone(peer);
      const { transfer } = this.#context.options.timeouts;
      this.#answer(peer, { ...part, part: ++session.parts });
      const operation = { tensorId: whatOf(part, peer), timeoutMs: transfer };
      const done = pair.send(cargo.regions, operation).then(() => {
        cargo.free();
        this.#context.metrics.inc('pd_kv_sent_bytes_total', this.#bytesOf(command));
      });
      return { done };
    } catch (error) {
      cargo.free();
      throw error;
    }
  }

  /** Nobody is told where there is no session: what matters is said again. */
  #answer(peer: string, message: NativeMessage): void {
    const session = this.#sessions.get(peer);
    const identity = session?.identity ?? Buffer.from(identityOf(peer));
    const { log } = this.#context;
    log.debug({ peer, cmd: message.cmd }, `${message.cmd} to ${peer}`);
    try {
      this.#router.answer(
        identity,
        this.#encode(message, session?.hello.cache.blocks ?? this.#init.shape.blocks),
      );
    } catch (error) {
      // A peer that has been started again may have fewer blocks than the one that this answers.
      const why = PdError.from(error).message;
      log.warn({ peer, cmd: message.cmd }, `${message.cmd} to ${peer} was not sent: ${why}`);
    }
  }

  #encode(message: NativeMessage, maxBlocks: number): Uint8Array {
    return encodeNative(message, { maxBlocks });
  }
}

function whatOf({ seq, layer, layers }: WriteCommand['part'], peer: string): string {
  return `layers ${layer} to ${layer + layers - 1} of WANT ${seq} of ${peer}`;
}

function gone(peer: string): PdError {
  return new PdError('PEER_LOST', `there is no connection with ${peer} any more`, { peer });
}
