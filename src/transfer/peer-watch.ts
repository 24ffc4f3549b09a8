/**
 * Looks after the producer that a load waits for. One that dies over the host transport takes its pair along, and the load knows at once.
 * One that dies over NCCL, which tells nobody, or before it ever had a pair with us, is known by its KV port: it refuses connections.
 */
import { PdError } from '../errors.ts';
import type { HostPort } from '../net/address.ts';
import { knock, type PortAnswer } from '../net/knock.ts';
import type { TransferContext } from './context.ts';
import type { Deadline } from './deadlines.ts';

export interface Watched {
  readonly requestId: string;
  /** `ip:port` of the producer. */
  readonly peer: string;
  /** Nothing is waited for any more. */
  readonly decided: boolean;
  fail(reason: PdError): void;
}

/** Pairs that the producer had with us. */
export interface WatchedPairs {
  /** Why the one that was to bring the KV is over. */
  lost(): PdError | undefined;
  /** Why the last one is over, whether or not another was to follow. */
  last(): PdError | undefined;
}

export class PeerWatch {
  readonly #context: TransferContext;
  readonly #watched: Watched;
  readonly #address: HostPort;
  readonly #pairs: WatchedPairs;
  #next: Deadline | undefined;
  #stopped = false;
  #port: PortAnswer | undefined;

  /** Looks once every `timeouts.connect`: KV that is on its way is there long before the first time. */
  constructor(context: TransferContext, watched: Watched, address: HostPort, pairs: WatchedPairs) {
    this.#context = context;
    this.#watched = watched;
    this.#address = address;
    this.#pairs = pairs;
    this.#arm();
  }

  /** What the producer's KV port did when it was last tried; undefined before the first time. */
  get port(): PortAnswer | undefined {
    return this.#port;
  }

  /** Idempotent. */
  stop(): void {
    this.#stopped = true;
    this.#next?.cancel();
  }

  #arm(): void {
    const { deadlines, options } = this.#context;
    this.#next = deadlines.after(options.timeouts.connect, () => void this.#look());
  }

  async #look(): Promise<void> {
    const { requestId, peer } = this.#watched;
    const lost = this.#pairs.lost();
    if (lost) return this.#watched.fail(lost);
    const port = await knock(this.#address, this.#context.options.timeouts.connect);
    this.#port = port;
    if (this.#stopped || this.#watched.decided) return;
    if (port !== 'refuses') return this.#arm();
    const message = `${peer}, whose KV ${requestId} waits for, refuses connections`;
    this.#watched.fail(
      new PdError('PEER_UNREACHABLE', message, { requestId, peer }, { cause: this.#pairs.last() }),
    );
  }
}
