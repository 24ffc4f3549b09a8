/** Over a connection to a producer: asks what silence.ts says, and tells when the connection is to end. */
import { PdError, unreachable } from '../../errors.ts';
import type { TransferContext } from '../context.ts';
import type { HelloMessage } from './messages.ts';
import { askAside } from './probe.ts';
import { patienceOf, Silence } from './silence.ts';

interface SilenceEvents {
  /** Say the probe on the connection itself. */
  ask(): void;
  /** Its producer answers others and not it. */
  lost(error: PdError): void;
}

export class SilenceWatch {
  readonly #context: TransferContext;
  readonly #probe: HelloMessage;
  readonly #peer: string;
  readonly #events: SilenceEvents;
  readonly #silence: Silence;
  /** Of the next step, which may have become needless by then. */
  #deadline: { cancel(): void } | undefined;
  /** Ends the question on a connection of its own. */
  #endAside: (() => void) | undefined;

  constructor(context: TransferContext, probe: HelloMessage, peer: string, events: SilenceEvents) {
    this.#context = context;
    this.#probe = probe;
    this.#peer = peer;
    this.#events = events;
    this.#silence = new Silence(patienceOf(context.options.timeouts));
  }

  /** Something that must be answered. */
  said(): void {
    this.#silence.said(this.#now);
    this.#wait();
  }

  /** Anything at all. */
  heard(): void {
    if (!this.#silence.heard()) return;
    this.#count('answered');
    this.end();
  }

  /** Asks nothing more, until something is said. */
  end(): void {
    this.#deadline?.cancel();
    this.#deadline = undefined;
    this.#endAside?.();
    this.#endAside = undefined;
  }

  get #now(): number {
    return this.#context.deadlines.now();
  }

  #wait(): void {
    const { at } = this.#silence;
    if (at === undefined || this.#deadline) return;
    const deadline = this.#context.deadlines.after(at - this.#now, () =>
      // after what has come by then has been heard
      setImmediate(() => {
        if (this.#deadline !== deadline) return;
        this.#deadline = undefined;
        this.#act();
        this.#wait();
      }),
    );
    this.#deadline = deadline;
  }

  #act(): void {
    const step = this.#silence.due(this.#now);
    switch (step) {
      case 'ask here':
        this.#events.ask();
        return;
      case 'ask elsewhere':
        this.#endAside = askAside(this.#context, this.#probe, this.#peer, (answer) => {
          this.#endAside = undefined;
          if (!answer) this.#nobody();
          this.#silence.elsewhere(answer !== undefined, this.#now);
          this.#wait();
        });
        return;
      case 'lost':
        this.#lost();
        return;
      case undefined:
        return;
      default:
        unreachable(step, 'step of a silence');
    }
  }

  /** A connection anew would be no better. */
  #nobody(): void {
    this.#count('nobody');
    const peer = this.#peer;
    const { limited, log } = this.#context;
    limited.log(`silent ${peer}`, (suppressed) =>
      log.warn(
        { peer, code: 'PEER_ANSWER_TIMEOUT', suppressed },
        `${peer} has answered nothing for ${this.#seconds} s, on a new connection neither: it is stopped, or cannot be reached`,
      ),
    );
  }

  #lost(): void {
    this.#count('renewed');
    const text = `it has answered nothing here for ${this.#seconds} s and answers a new connection: another one has this worker's name there`;
    this.#events.lost(new PdError('PEER_LOST', text, { peer: this.#peer }));
  }

  get #seconds(): string {
    return (this.#silence.lasted(this.#now) / 1_000).toFixed(1);
  }

  #count(result: 'answered' | 'nobody' | 'renewed'): void {
    this.#context.metrics.inc('pd_native_silences_total', 1, result);
  }
}
