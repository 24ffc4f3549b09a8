/**
 * Refuses strangers at a ZeroMQ socket before a byte of theirs is read: the handler that libzmq asks about each new connection
 * (ZAP, ZeroMQ RFC 27). It gets the peer's IP address, and nothing else that could be trusted.
 *
 * libzmq looks for the handler under one fixed name per context, and lets everyone in if there is none. So each gate has a context of
 * its own, opens before its sockets bind, and closes after them.
 */
import * as zmq from 'zeromq';
import { PdError } from '../errors.ts';
import { type Logger, RateLimitedLog } from '../observability/log.ts';
import { type AllowList, plainAddress } from './allow-list.ts';

const HANDLER = 'inproc://zeromq.zap.01';
const VERSION = '1.0';

export interface ZapGateOptions {
  readonly allow: AllowList;
  /** What is guarded, for the log: `KV listener 10.0.0.1:14579`. */
  readonly what: string;
  /** The flag that set the list. Absent: `--allow-peers`. */
  readonly list?: string;
  readonly log: Logger;
  /** Between two log lines for one address. Milliseconds. */
  readonly logIntervalMs?: number;
  /** Called for each refused connection. */
  readonly onRefused?: (address: string) => void;
}

export class ZapGate {
  /** For the constructor of each socket that the gate guards. */
  readonly socketOptions: { readonly context: zmq.Context; readonly zapDomain: string };
  readonly #options: ZapGateOptions;
  readonly #handler: zmq.Reply;
  readonly #limited: RateLimitedLog;
  readonly #answering: Promise<void>;
  #closed = false;
  #refused = 0;

  private constructor(options: ZapGateOptions, context: zmq.Context, handler: zmq.Reply) {
    this.#options = options;
    this.#handler = handler;
    this.#limited = new RateLimitedLog(options.logIntervalMs);
    this.socketOptions = { context, zapDomain: 'pd' };
    this.#answering = this.#answer();
  }

  static async open(options: ZapGateOptions): Promise<ZapGate> {
    const context = new zmq.Context();
    const handler = new zmq.Reply({ context, linger: 0 });
    await handler.bind(HANDLER);
    return new ZapGate(options, context, handler);
  }

  get #list(): string {
    return this.#options.list ?? '--allow-peers';
  }

  /** Connections refused so far. A refused libzmq peer does not try again with the same socket. */
  get refused(): number {
    return this.#refused;
  }

  /** Idempotent. Close the guarded sockets first. */
  async close(): Promise<void> {
    if (!this.#closed) {
      this.#closed = true;
      this.#handler.close();
    }
    await this.#answering;
  }

  async #answer(): Promise<void> {
    try {
      for await (const [version, requestId, , address] of this.#handler) {
        if (this.#closed) return;
        const known = version?.toString() === VERSION && address !== undefined;
        const admitted = known && this.#admit(plainAddress(address.toString()));
        const verdict = admitted ? ['200', 'OK'] : ['400', 'not allowed'];
        // user id and metadata stay empty
        await this.#handler.send([VERSION, requestId ?? '', ...verdict, '', '']);
      }
    } catch (error) {
      if (this.#closed) return;
      const { log, what } = this.#options;
      log.error({ err: PdError.from(error) }, `${what}: the check of ${this.#list} has failed`);
    }
  }

  #admit(address: string): boolean {
    const { allow, what, log, onRefused } = this.#options;
    if (allow.allows(address)) return true;
    this.#refused++;
    onRefused?.(address);
    this.#limited.log(address, (suppressed) => {
      const { refused } = this;
      log.warn(
        { address, refused, suppressed },
        `${what}: connection from ${address} refused, it is not in ${this.#list} (${allow})`,
      );
    });
    return false;
  }
}
