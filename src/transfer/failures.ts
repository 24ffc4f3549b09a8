/** What went wrong lately, for `/debug/state`: by peer and kind, with the cause. Bounded. */
import type { ErrorData, PdError } from '../errors.ts';
import { remember } from '../memories.ts';
import type { Deadlines } from './deadlines.ts';

/**
 * `load`: KV of a request did not come. `send`: a tensor could not be sent or kept. `refused`: a tensor of a peer found no room here.
 * `pair`: a pair with the peer could not be opened, or broke.
 */
export type FailureKind = 'load' | 'send' | 'refused' | 'pair';

export interface FailureState {
  readonly kind: FailureKind;
  /** `host:port`. */
  readonly peer: string;
  /** The last of its kind with that peer. */
  readonly error: ErrorData;
  /** With the same code since the last that went well. */
  readonly count: number;
  readonly agoMs: number;
  /** The same has gone well with that peer since. */
  readonly recovered: boolean;
}

interface Noted {
  readonly kind: FailureKind;
  readonly peer: string;
  error: PdError;
  count: number;
  at: number;
  recovered: boolean;
}

const MOST = 32;
/** Aborts and the engine's own end say nothing of a peer. */
const NO_FAILURE: ReadonlySet<string> = new Set(['REQUEST_ABORTED', 'ENGINE_CLOSED']);
/** What shows, by going well, that these are over. */
const RECOVERED_BY: Readonly<Record<'load' | 'send', readonly FailureKind[]>> = {
  load: ['load', 'refused', 'pair'],
  send: ['send', 'pair'],
};

export class Failures {
  readonly #clock: Pick<Deadlines, 'now'>;
  /** Oldest first. */
  readonly #noted = new Map<string, Noted>();

  constructor(clock: Pick<Deadlines, 'now'>) {
    this.#clock = clock;
  }

  note(kind: FailureKind, peer: string, error: PdError): void {
    if (NO_FAILURE.has(error.code)) return;
    const key = `${kind} ${peer}`;
    const before = this.#noted.get(key);
    const same = before && !before.recovered && before.error.code === error.code;
    const count = same ? before.count + 1 : 1;
    const noted = { kind, peer, error, count, at: this.#clock.now(), recovered: false };
    remember(this.#noted, key, noted, MOST);
  }

  /** A load from `peer`, or a tensor to it, went well. */
  wentWell(what: 'load' | 'send', peer: string): void {
    if (this.#noted.size === 0) return;
    for (const kind of RECOVERED_BY[what]) {
      const noted = this.#noted.get(`${kind} ${peer}`);
      if (noted) noted.recovered = true;
    }
  }

  /** Newest first. */
  state(): FailureState[] {
    const now = this.#clock.now();
    return [...this.#noted.values()].reverse().map(({ kind, peer, error, count, at, recovered }) => ({
      ...{ kind, peer, error: error.toData(), count },
      ...{ agoMs: Math.round(now - at), recovered },
    }));
  }
}
