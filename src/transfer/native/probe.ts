/**
 * Two workers that have been told different wires (`--wire native` at one end, frozen at the other) would each wait for what the other never
 * says. So whoever asks natively is answered by every worker, and a producer whose consumer has said nothing asks it.
 *
 *   native consumer   HELLO ------------> frozen producer   its answer is refused: the want fails at once
 *   native producer   HELLO {probe: id} -> frozen consumer   the load of that id fails at once; the answer, refused, is logged
 */
import { randomBytes } from 'node:crypto';
import { type ErrorData, PdError } from '../../errors.ts';
import { type TransferId, transferIdOf } from '../../wire/ids.ts';
import type { TransferContext } from '../context.ts';
import { Dealer } from '../dealer.ts';
import type { Router } from '../router.ts';
import type { ToWire } from './channel.ts';
import { decodeAnswered, decodeAsked, encodeNative, isNativeMessage } from './codec.ts';
import { type HelloMessage, type Nonce, PROBE_ONLY } from './messages.ts';

/** A hello names no block, and its answer neither. */
const LIMITS = { maxBlocks: 1 };

/** `unwilling` where its answer says so; not called where nobody answers, which says nothing. */
export function probeConsumer(
  context: TransferContext,
  hello: HelloMessage,
  { peer, id }: Extract<ToWire, { readonly kind: 'probe' }>,
  unwilling: (error: PdError) => void,
): void {
  askAside(context, { ...hello, probe: id }, peer, (answer) => {
    const refused = answer && refusalIn(answer);
    if (refused) unwilling(new PdError(refused.code, `peer ${peer}: ${refused.message}`, { peer }));
  });
}

/** Says hello on a connection that serves for this alone. `told`, once: what was answered, or nothing in time; never after the end that it returns. */
export function askAside(
  { self, options, deadlines }: TransferContext,
  hello: HelloMessage,
  peer: string,
  told: (answer: Uint8Array | undefined) => void,
): () => void {
  const { connect, answer } = options.timeouts;
  let over = false;
  const end = () => {
    over = true;
    patience.cancel();
    dealer.close();
  };
  const tell = (body?: Uint8Array) => {
    if (over) return;
    end();
    told(body);
  };
  const dealer = new Dealer({
    // beside a native connection from this end, and other probes
    self: `${self}#probe-${randomBytes(4).toString('hex')}`,
    peer,
    connectTimeoutMs: connect,
    onAnswer: tell,
    onLost: () => tell(),
  });
  const patience = deadlines.after(connect + answer, tell);
  void dealer.send(encodeNative(hello, LIMITS));
  return end;
}

function refusalIn(body: Uint8Array): HelloMessage['refused'] {
  try {
    const message = decodeAnswered(body, LIMITS);
    return message.cmd === 'HELLO' ? message.refused : undefined;
  } catch {
    // of another version, or no worker: as good as nothing
    return undefined;
  }
}

/** Of a worker that speaks the frozen wire alone: whoever says hello natively is told so. */
export class NativeRefusal {
  readonly #context: TransferContext;
  readonly #router: Router;
  readonly #loadFails: (id: TransferId, error: PdError) => void;
  readonly #nonce = randomBytes(16).toString('hex') as Nonce;

  constructor(context: TransferContext, router: Router, loadFails: (id: TransferId, error: PdError) => void) {
    this.#context = context;
    this.#router = router;
    this.#loadFails = loadFails;
  }

  /** False for what is of the frozen wire. */
  heard(identity: Buffer, body: Buffer): boolean {
    if (!isNativeMessage(body)) return false;
    const { self, log, limited, metrics } = this.#context;
    const peer = identity.toString();
    let theirs: HelloMessage | undefined;
    try {
      const message = decodeAsked(body, LIMITS);
      if (message.cmd === 'HELLO') theirs = message;
    } catch {
      // counted below
    }
    if (!theirs) {
      metrics.inc('pd_protocol_errors_total', 1, 'unknown_command');
      return true;
    }
    const refused: ErrorData = {
      code: 'TRANSPORT_MISMATCH',
      message: `${self} speaks the frozen wire alone, and was asked natively: give both ends the same --wire and --kv-key`,
      context: {},
    };
    this.#router.answer(identity, encodeNative(this.#answer(theirs, refused), LIMITS));
    limited.log(`native hello ${peer}`, (suppressed) =>
      log.warn(
        { peer: peer.slice(0, 128), suppressed },
        `HELLO of ${peer.slice(0, 128)} refused: ${refused.message}`,
      ),
    );
    const { probe } = theirs;
    if (probe !== undefined && probe !== PROBE_ONLY)
      this.#loadFails(transferIdOf(probe), PdError.fromData(refused));
    return true;
  }

  undelivered(): boolean {
    return false;
  }

  #answer({ cache }: HelloMessage, { code, message }: ErrorData): HelloMessage {
    const { hello } = this.#context;
    const refused = { code, message };
    return { cmd: 'HELLO', from: this.#nonce, hello, cache, transports: [], refused };
  }
}
