/**
 * Listens for pings and keeps the registry up to date: a ZeroMQ DEALER that never answers, so that it needs nobody's routing id. A ROUTER hears
 * one connection per routing id: of two workers that announce the same KV address it would never again hear the one that came first, even once
 * the other has gone.
 */
import { Dealer } from 'zeromq';
import { PdError } from '../errors.ts';
import { remember } from '../memories.ts';
import {
  asDestination,
  formatHostPort,
  type HostPort,
  isUnspecified,
  parseHostPort,
  zmqEndpoint,
} from '../net/address.ts';
import { AllowList } from '../net/allow-list.ts';
import { listenError } from '../net/port-holder.ts';
import { ZapGate } from '../net/zap.ts';
import { type Logger, RateLimitedLog } from '../observability/log.ts';
import { claimedAddress, decodePing } from '../wire/codec.ts';
import { MAX_BODY_BYTES } from '../wire/limits.ts';
import type { PingMessage } from '../wire/messages.ts';
import { NATIVE_FEATURE, OVERLAP_FEATURE, TLS_FEATURE } from '../wire/overlap.ts';
import { PROMPT_IDS_FEATURE } from '../wire/prompt-ids.ts';
import { type Instance, type InstanceRegistry, instanceLabel, type RegistryChange } from './registry.ts';

export interface DiscoveryOptions {
  readonly bind: HostPort;
  readonly registry: InstanceRegistry;
  readonly log: Logger;
  /** Time between two checks for instances whose pings have stopped. */
  readonly sweepMs: number;
  /** Addresses and ranges whose pings are taken; absent: everyone's. */
  readonly allow?: readonly string[];
  /** Instances get a key: addresses that they announce must be allowed ones too. */
  readonly keyed?: boolean;
  /** Only instances with TLS are taken. */
  readonly needsTls?: boolean;
  readonly onChange?: (change: RegistryChange) => void;
  /** Called for each ping that could not be used. */
  readonly onBadPing?: () => void;
  /** Called for each good ping, with the HTTP address. */
  readonly onPing?: (httpAddress: string) => void;
}

/** Where an instance that was named has answered. */
export interface Reached {
  readonly at: HostPort;
  readonly tls: boolean;
}

/** Why an instance was removed, for the log. */
const REASONS = {
  expired: 'its pings have stopped',
  replaced: 'its address announces something else now',
  left: 'it has left etcd, or its lease there has ended',
} as const;

/** One that comes back after it was replaced takes turns with the other if it was no longer ago; a worker pings every 3 s. */
const TURNS_MS = 60_000;
const MOST_REPLACED = 1_024;

/** What is the same of two instances only where they are the same process. */
function processOf(instance: Instance): string {
  return `${instance.role} ${instanceLabel(instance)} ${instance.started}`;
}

export class Discovery {
  /** What it is bound to, the port chosen where 0 was asked for. */
  readonly address: HostPort;
  readonly #socket: Dealer;
  /** Closed after the socket. */
  readonly #gate: ZapGate | undefined;
  readonly #options: DiscoveryOptions;
  readonly #allowed: AllowList | undefined;
  readonly #bad = new RateLimitedLog();
  readonly #turns = new RateLimitedLog(TURNS_MS);
  /** When each was last replaced by another. */
  readonly #replaced = new Map<string, number>();
  readonly #sweep: NodeJS.Timeout;
  readonly #listening: Promise<void>;
  #closed = false;

  private constructor(
    socket: Dealer,
    gate: ZapGate | undefined,
    address: HostPort,
    options: DiscoveryOptions,
  ) {
    this.#socket = socket;
    this.#gate = gate;
    this.address = address;
    this.#options = options;
    this.#allowed = options.allow && AllowList.parse(options.allow, '--allow-instances');
    this.#sweep = setInterval(() => this.#apply(options.registry.expire()), options.sweepMs).unref();
    this.#listening = this.#listen();
  }

  /** Binds. Throws PORT_IN_USE, or ADDRESS_INVALID where the address is not one of this machine's. */
  static async start(options: DiscoveryOptions): Promise<Discovery> {
    const { bind, allow, log, onBadPing } = options;
    const gate =
      allow &&
      (await ZapGate.open({
        allow: AllowList.parse(allow, '--allow-instances'),
        what: 'discovery',
        list: '--allow-instances',
        log,
        ...(onBadPing && { onRefused: onBadPing }),
      }));
    const socket = new Dealer({
      ...gate?.socketOptions,
      maxMessageSize: MAX_BODY_BYTES,
      linger: 0,
      ipv6: bind.host.includes(':'),
    });
    try {
      // 0 is `*` to ZeroMQ.
      await socket.bind(zmqEndpoint(bind).replace(/:0$/, ':*'));
      const { port } = parseHostPort(socket.lastEndpoint!.replace('tcp://', ''), 'bound endpoint');
      return new Discovery(socket, gate, { host: bind.host, port }, options);
    } catch (cause) {
      socket.close();
      await gate?.close();
      throw await listenError(cause, bind, 'listening for pings');
    }
  }

  async close(): Promise<void> {
    if (!this.#closed) {
      this.#closed = true;
      clearInterval(this.#sweep);
      this.#socket.close();
    }
    await this.#listening;
    await this.#gate?.close();
  }

  async #listen(): Promise<void> {
    try {
      for await (const frames of this.#socket) this.#receive(frames);
    } catch (error) {
      if (!this.#closed) this.#options.log.error({ err: error }, 'discovery has stopped');
    }
  }

  #receive(frames: readonly Buffer[]): void {
    const [body, ...more] = frames;
    if (body && more.length === 0) this.take(body);
    else this.#refuse(new PdError('MESSAGE_INVALID', `expected one frame, got ${frames.length}`));
  }

  /** Takes a ping, whichever way it came; false where it cannot be used, which is logged. */
  take(body: Uint8Array): boolean {
    return this.#take(
      () => decodePing(body),
      () => claimedAddress(body),
    );
  }

  /** Takes a ping that may be no news, from where it stands until it is replaced; false as `take`. */
  takeAgain(body: Uint8Array): boolean {
    return this.#outdated(body) || this.take(body);
  }

  /** Takes what an instance says that was named, and answered there: it may get this proxy's key, wherever it is. */
  takeNamed(ping: PingMessage, named: Reached): boolean {
    const { http_address } = ping;
    return this.#take(
      () => ping,
      () => http_address,
      named,
    );
  }

  #take(read: () => PingMessage, claimed: () => string | undefined, named?: Reached): boolean {
    const { registry, onPing } = this.#options;
    try {
      const ping = read();
      // One of ours that was named as if it were not says more by its own pings.
      if (named && !ping.native && this.#saysMore(ping.http_address)) return true;
      for (const address of [ping.http_address, ping.zmq_address]) {
        if (isUnspecified(parseHostPort(address, 'address of a ping').host)) this.#warnOnce(address);
      }
      const tls = named?.tls ?? ping.native?.features?.includes(TLS_FEATURE) ?? false;
      this.#trust(ping.http_address, tls, named !== undefined);
      const changes = registry.announce({
        role: ping.type === 'P' ? 'producer' : 'consumer',
        httpAddress: ping.http_address,
        zmqAddress: ping.zmq_address,
        ...(ping.native ? { fingerprint: { digest: ping.native.digest, model: ping.native.model } } : {}),
        ...(ping.native?.sendType ? { sendType: ping.native.sendType } : {}),
        ...(ping.native?.events ? { events: ping.native.events } : {}),
        ...(ping.native?.load ? { load: ping.native.load } : {}),
        ...(ping.native?.features?.includes(OVERLAP_FEATURE) ? { overlaps: true } : {}),
        ...(ping.native?.features?.includes(NATIVE_FEATURE) ? { native: true } : {}),
        ...(ping.native?.tokenizer ? { tokenizer: ping.native.tokenizer } : {}),
        ...(ping.native?.features?.includes(PROMPT_IDS_FEATURE) ? { takesIds: true } : {}),
        ...(ping.native?.started === undefined ? {} : { started: ping.native.started }),
        ...(tls ? { tls } : {}),
        ...(named ? { at: named.at } : {}),
      });
      if (!changes) throw new PdError('LIMIT_EXCEEDED', 'too many instances');
      this.#apply(changes);
      onPing?.(ping.http_address);
      return true;
    } catch (error) {
      this.#refuse(PdError.from(error), claimed, named);
      return false;
    }
  }

  #saysMore(httpAddress: string): boolean {
    const known = this.#options.registry.list().find((one) => one.httpAddress === httpAddress);
    return known?.fingerprint !== undefined;
  }

  /** The instance of such a ping has left. */
  drop(body: Uint8Array): void {
    if (this.#outdated(body)) return;
    this.#apply(this.#options.registry.leave(decodePing(body).http_address));
  }

  /** Another process has told of itself on that address, as after a restart. */
  #outdated(body: Uint8Array): boolean {
    const { http_address, native } = decodePing(body);
    return this.#options.registry.another(http_address, native?.started);
  }

  /** ZeroMQ does not tell who has sent a message, so the ping's own word is all there is. */
  #refuse({ message }: PdError, claimed?: () => string | undefined, named?: Reached): void {
    const { log, onBadPing } = this.#options;
    onBadPing?.();
    // There may be many: they are looked at once more only for what is logged.
    this.#bad.log('ping', (suppressed) => {
      const address = claimed?.();
      const from = address === undefined ? 'it gives no HTTP address' : `its HTTP address is ${address}`;
      log.warn(
        { suppressed, ...(named && { named: formatHostPort(named.at) }) },
        `ignored a ping that cannot be used (${from}): ${message}`,
      );
    });
  }

  /** A ping is anybody's. What gets this proxy's key is where --allow-instances says, and has a certificate if one is to be checked. */
  #trust(httpAddress: string, tls: boolean, named: boolean): void {
    const { needsTls, keyed } = this.#options;
    const { host } = asDestination(parseHostPort(httpAddress, 'HTTP address of a ping'));
    if (needsTls && !tls)
      throw new PdError('CONFIG_INVALID', `${httpAddress} serves without TLS, and --worker-ca asks for it`);
    if (keyed && !named && !this.#allowed?.allows(host))
      throw new PdError('CONFIG_INVALID', `${httpAddress} is not in --allow-instances, so it gets no key`);
  }

  #warnOnce(address: string): void {
    this.#bad.log(`unspecified ${address}`, () =>
      this.#options.log.warn(`an instance announces ${address}: taken as this host; announce a real address`),
    );
  }

  #apply(changes: readonly RegistryChange[]): void {
    const quiet = this.#takeTurns(changes);
    for (const change of changes) {
      const { kind, instance } = change;
      if (quiet) {
        // All has been said.
      } else if (kind === 'added') {
        const model = instance.fingerprint ? `, model ${instance.fingerprint.model}` : '';
        this.#options.log.info(
          { role: instance.role, fingerprint: instance.fingerprint?.digest },
          `🔵Add ${instanceLabel(instance)} (${instance.role}${model})`,
        );
      } else {
        this.#options.log.warn(
          { role: instance.role },
          `🔴Remove ${instanceLabel(instance)} (${instance.role}): ${change.reason === 'expired' && instance.at ? 'it answers no more' : REASONS[change.reason]}`,
        );
      }
      this.#options.onChange?.(change);
    }
  }

  /** One that was replaced a moment ago replaces the other: both run, and would fill the log. */
  #takeTurns(changes: readonly RegistryChange[]): boolean {
    const now = performance.now();
    const gone = changes.filter((change) => change.kind === 'removed' && change.reason === 'replaced');
    for (const { instance } of gone) remember(this.#replaced, processOf(instance), now, MOST_REPLACED);
    const back = changes.find(({ kind }) => kind === 'added')?.instance;
    const before = back && this.#replaced.get(processOf(back));
    if (!gone[0] || !back || before === undefined || now - before > TURNS_MS) return false;
    const [one, other] = [back, gone[0].instance].map(instanceLabel).sort();
    this.#turns.log(`${one} ${other}`, (suppressed) => {
      const sameKv = gone.some(({ instance: { zmqAddress } }) => zmqAddress === back.zmqAddress);
      const [what, todo] = sameKv
        ? ['KV', '--kv-announce-host or --kv-port']
        : ['HTTP', '--http-announce-host or --port'];
      this.#options.log.warn(
        { suppressed },
        `${one} and ${other} announce the same ${what} address, and take it from each other with every ping: give each its own ${todo}`,
      );
    });
    return true;
  }
}
