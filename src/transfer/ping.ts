/**
 * The heartbeat by which one proxy finds this instance (announcer.ts has one for each). No answer is expected, so what is told is what the socket knows: a ping has been
 * sent once a ZeroMQ listener has shaken hands. TCP alone says nothing (an HTTP port takes connections, and bytes, too).
 *
 *   new --(handshake, ping)--> reached <--(handshake, ping)-- away
 *     +--(none for an interval)--> away      +--(lost for half an interval)--> away
 */
import * as zmq from 'zeromq';
import type { TransferOptions } from '../config/transfer-options.ts';
import { PdError } from '../errors.ts';
import { asDestination, formatHostPort, type HostPort, zmqEndpoint } from '../net/address.ts';
import type { TransferContext } from './context.ts';

/** What one ping after the other says. */
export interface PingMessages {
  readonly type: 'P' | 'D';
  readonly httpAddress: string;
  readonly intervalMs: number;
  /** The next ping's bytes. */
  body(): Uint8Array;
  /** Whether another address of the same proxy takes pings, or another proxy does: then this one's silence is no fault. */
  heardBy(other: Pinger): 'address' | 'proxy' | undefined;
}

/** While a proxy stays away it is told again so often. */
const AGAIN_MS = 600_000;

/** Why a proxy is away, and what to look at. */
const REASONS = {
  nobody:
    'nothing takes connections there; check that pd-proxy runs and that host and port are those of its discovery (port 30002 by default)',
  stranger:
    "no ZeroMQ listener answers: what takes connections there speaks another protocol, or hangs; give the proxy's discovery port " +
    '(30002 by default), not its HTTP port',
  refused: 'it turns this address away; its --allow-instances must list it',
  full: 'it takes no pings any more; it may hang',
} as const;

export type PingContext = Pick<TransferContext, 'self' | 'deadlines' | 'log' | 'limited'> & {
  readonly options: Pick<TransferOptions, 'fingerprint' | 'sendType'>;
};

export class Pinger {
  readonly #context: PingContext;
  readonly #messages: PingMessages;
  readonly #address: HostPort;
  readonly #socket: zmq.Dealer;
  readonly #timer: NodeJS.Timeout;
  #state: 'new' | 'reached' | 'away' = 'new';
  #sentFirst = false;
  /** A ZeroMQ listener is at the other end. */
  #shaken = false;
  /** Since when that has been so, or not. */
  #since: number;
  #reason: keyof typeof REASONS = 'nobody';
  /** ZeroMQ has given the connection up and does not try again by itself. */
  #given = false;
  #strangerSince = 0;
  #told: keyof typeof REASONS | undefined;
  #toldAt = Number.NEGATIVE_INFINITY;
  #busy = false;
  #closed = false;

  /** `address`: one of a proxy's, no name. */
  constructor(context: PingContext, messages: PingMessages, address: HostPort) {
    const { self } = context;
    this.#context = context;
    this.#messages = messages;
    this.#address = asDestination(address);
    // One ping waits at most, and none for a proxy that is away: it would read stale ones when it returns.
    this.#socket = new zmq.Dealer({
      routingId: self,
      linger: 0,
      immediate: true,
      sendHighWaterMark: 1,
      sendTimeout: Math.max(Math.floor(messages.intervalMs / 2), 1),
      ipv6: true,
      reconnectInterval: 100,
      reconnectMaxInterval: 1_000,
    });
    this.#since = context.deadlines.now();
    this.#watch();
    context.log.info({ proxy: this.#proxy }, `connecting to proxy ${this.#proxy}`);
    try {
      this.#socket.connect(this.#endpoint);
    } catch (error) {
      this.#socket.close();
      throw error;
    }
    this.#timer = setInterval(() => this.#beat(), messages.intervalMs);
  }

  /** A ZeroMQ listener takes pings there. */
  get reached(): boolean {
    return this.#shaken;
  }

  /** Pings at once, not at the next beat. */
  ping(): void {
    if (this.#shaken) void this.#send();
  }

  /** Idempotent. */
  close(): void {
    if (this.#closed) return;
    this.#closed = true;
    clearInterval(this.#timer);
    this.#socket.close();
  }

  get #proxy(): string {
    return formatHostPort(this.#address);
  }

  get #endpoint(): string {
    return zmqEndpoint(this.#address);
  }

  #watch(): void {
    const { events } = this.#socket;
    events.on('connect', () => {
      // One that has said why it refuses stays known for that.
      if (this.#reason !== 'nobody') return;
      this.#reason = 'stranger';
      this.#strangerSince = this.#context.deadlines.now();
    });
    events.on('close', () => {
      this.#reason = 'nobody';
    });
    events.on('handshake', () => {
      this.#turned(true);
      void this.#send();
    });
    events.on('disconnect', () => this.#turned(false));
    events.on('handshake:error:auth', () => {
      this.#reason = 'refused';
      this.#given = true;
    });
    events.on('handshake:error:protocol', () => {
      this.#given = true;
    });
  }

  #turned(shaken: boolean): void {
    if (this.#shaken === shaken) return;
    this.#shaken = shaken;
    this.#since = this.#context.deadlines.now();
  }

  #beat(): void {
    if (this.#shaken) {
      void this.#send();
      return;
    }
    const silentMs = this.#context.deadlines.now() - this.#since;
    if (silentMs >= this.#messages.intervalMs / 2) this.#away(this.#reason);
    if (this.#given) this.#connectAnew();
  }

  #connectAnew(): void {
    try {
      this.#socket.disconnect(this.#endpoint);
    } catch {
      // It has let go of it already.
    }
    try {
      this.#socket.connect(this.#endpoint);
      this.#given = false;
    } catch (error) {
      // The next beat tries again.
      this.#context.log.debug({ proxy: this.#proxy, err: error }, 'connecting to the proxy anew failed');
    }
  }

  async #send(): Promise<void> {
    if (this.#busy || this.#closed) return;
    this.#busy = true;
    try {
      await this.#socket.send(this.#messages.body());
      if (this.#shaken) this.#reached();
    } catch (error) {
      // One that was lost meanwhile is the next beat's.
      if (!this.#closed && this.#shaken) this.#away('full', PdError.from(error));
    } finally {
      this.#busy = false;
    }
  }

  #reached(): void {
    const { log } = this.#context;
    const { type, httpAddress } = this.#messages;
    if (!this.#sentFirst) {
      this.#sentFirst = true;
      log.info({ proxy: this.#proxy, type, httpAddress }, `first ping sent to proxy ${this.#proxy}`);
    } else if (this.#state === 'away') {
      log.info({ proxy: this.#proxy }, `proxy ${this.#proxy} is reached again`);
    }
    this.#state = 'reached';
  }

  #away(reason: keyof typeof REASONS, cause?: PdError): void {
    const { log, limited, deadlines } = this.#context;
    const now = deadlines.now();
    // A proxy that has just come may be shaking hands.
    if (reason === 'stranger' && now - this.#strangerSince < this.#messages.intervalMs / 2) return;
    const changed = this.#state !== 'away' || reason !== this.#told;
    this.#state = 'away';
    if (!changed && now - this.#toldAt < AGAIN_MS) return;
    const heard = this.#messages.heardBy(this);
    const level = heard === 'address' ? 'debug' : heard === 'proxy' ? 'info' : 'warn';
    limited.log(`proxy ${this.#proxy}`, (suppressed) => {
      this.#told = reason;
      this.#toldAt = now;
      log[level](
        { proxy: this.#proxy, code: 'PEER_UNREACHABLE', reason, suppressed, ...(cause && { err: cause }) },
        `proxy ${this.#proxy} cannot be reached: ${REASONS[reason]}. No request will come from it; trying again`,
      );
    });
  }
}
