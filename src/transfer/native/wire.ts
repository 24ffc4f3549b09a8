/**
 * The native hand-over's part of the transfer thread: connections, messages and the bytes that travel on pairs. It decides nothing: what is
 * said and written comes from the core thread (hand-over.ts), over `channel.ts`.
 *
 *   consumer   NativeLink (DEALER + pair), one for each producer                      ask, receive
 *   producer   NativeSession (ROUTER + pair), for each process that has said HELLO    answer, write
 */
import { PdError, unreachable } from '../../errors.ts';
import { protocolErrorKind } from '../../wire/limits.ts';
import type { TransferContext } from '../context.ts';
import type { Router } from '../router.ts';
import type { PairState } from '../types.ts';
import type { FromWire, NativeInit, ToWire } from './channel.ts';
import { decodeAsked, encodeNative, isNativeMessage, rehearseCodec } from './codec.ts';
import { identityOf, nativeHello, peerOf, refusalOf } from './hello.ts';
import { NativeLink } from './link.ts';
import type { HelloMessage, NativeMessage } from './messages.ts';
import { probeConsumer } from './probe.ts';
import { gone, NativeSession, type WriteCommand } from './session.ts';

/** Sessions are small, but anybody can make routing ids up. */
const MOST_SESSIONS = 4_096;
/** Pairs that are being opened at one time. */
const MOST_OPENING = 256;
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
  readonly #sessions = new Map<string, NativeSession>();
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
    const ends = [...this.#sessions.values(), ...this.#links.values()];
    return ends.filter(({ paired }) => paired).length;
  }

  /** Connections to producers, and those of consumers, by their pairs where bytes come so. */
  states(): PairState[] {
    const stateOf = (end: NativeLink | NativeSession, direction: PairState['direction']): PairState => {
      const { peer, state, outstanding, since } = end;
      return { peer, direction, state, native: true, queued: 0, outstanding, sinceMs: this.#ageOf(since) };
    };
    return [
      ...[...this.#links.values()].map((link) => stateOf(link, 'outgoing')),
      ...[...this.#sessions.values()].map((session) => stateOf(session, 'incoming')),
    ].filter(({ state }) => state !== 'over');
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
      // forgotten meanwhile, for others: it says hello again, and what it asked too
      else if (!this.#sessions.has(peer)) this.#answer(peer, this.#hello);
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
    session?.end(error);
    this.#tell({ kind: 'lost', way: 'from', peer, error: error.toData() });
    return true;
  }

  /** Ends every connection and pair. */
  close(reason: PdError): void {
    this.#closed = reason;
    for (const link of [...this.#links.values()]) link.end(reason);
    for (const session of this.#sessions.values()) session.end(reason);
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
    const isProbe = hello.probe !== undefined;
    if (!isProbe) {
      const before = this.#sessions.get(peer);
      before?.end(new PdError('PAIR_CLOSED', `peer ${peer} has connected anew`, { peer }));
      this.#sessions.delete(peer);
    }
    const refused = refusalOf(this.#hello, hello, self, peer);
    this.#router.answer(identity, this.#encode(refused ? { ...this.#hello, refused } : this.#hello, 1));
    if (isProbe) return;
    if (refused) {
      metrics.inc('pd_protocol_errors_total', 1, 'fingerprint');
      limited.log(`mismatch ${peer}`, (suppressed) =>
        log.error({ peer, code: refused.code, suppressed }, `HELLO of ${peer} refused: ${refused.message}`),
      );
      return;
    }
    if (this.#sessions.size >= MOST_SESSIONS) {
      const [oldest] = this.#sessions.values();
      oldest?.end(new PdError('LIMIT_EXCEEDED', 'too many others have connected'));
      if (oldest) this.#sessions.delete(oldest.peer);
    }
    const session = new NativeSession(this.#context, this.#init, identity, hello, {
      answer: (message) => this.#answer(peer, message),
      tell: this.#tell,
      pairsChanged: this.#pairsChanged,
    });
    this.#sessions.set(peer, session);
    this.#tell({ kind: 'introduced', way: 'from', peer, hello });
  }

  /** With a consumer that wants something over it; once for each connection. */
  #openPair(peer: string): void {
    const session = this.#sessions.get(peer);
    const { log, limited } = this.#context;
    if (!session || session.opens) return;
    if (this.#opening >= MOST_OPENING) {
      limited.log('native opening', (suppressed) =>
        log.warn({ peer, suppressed }, `WANT of ${peer}: ${MOST_OPENING} pairs are being opened already`),
      );
      return;
    }
    this.#opening++;
    void session.openPair().finally(() => {
      this.#opening--;
    });
  }

  #write(command: WriteCommand): void {
    const { launch, peer, ready, part } = command;
    const session = this.#sessions.get(peer);
    // The process that has the address by now would not take its bytes, and find the pair out of step.
    if (session?.hello.from === part.to) {
      session.write(command);
      return;
    }
    if (ready) this.#tell({ kind: 'gathered', step: ready.step });
    this.#tell({ kind: 'written', launch, error: gone(peer).toData() });
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
