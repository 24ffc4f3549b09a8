/**
 * Which instances there are, and which two serve the next request. Pure: time comes from an injected monotonic clock, announcements from
 * whoever decodes pings.
 *
 * How a producer and a consumer fit, best first:
 *   same      both announce the same fingerprint, or neither announces any (two vLLM workers)
 *   unknown   one announces a fingerprint, the other none (ours with vLLM's): taken only where no `same` pair is left
 *   never     two fingerprints that differ: different weights would give wrong text silently; or GET with PUT: KV would never move
 * Where not both announce a fingerprint, two whose served model names are known and have none in common never fit either.
 */
import type { Policy } from '../config/proxy-config.ts';
import { asDestination, formatHostPort, type HostPort, httpUrl, parseHostPort } from '../net/address.ts';
import type { KvEventPorts, SendType, WorkerLoad } from '../wire/messages.ts';
import { Breaker } from './breaker.ts';
import { type Choices, choose, type PromptToPlace } from './placement.ts';
import { InstanceTally } from './tally.ts';
import { InstanceWork } from './work.ts';

export type InstanceRole = 'producer' | 'consumer';

/** What one ping says. Addresses are `ip:port`. */
export interface InstancePing {
  readonly role: InstanceRole;
  readonly httpAddress: string;
  readonly zmqAddress: string;
  /** Absent for a vLLM worker. */
  readonly fingerprint?: { readonly digest: string; readonly model: string };
  /** Absent for a vLLM worker. */
  readonly sendType?: SendType;
  /** It may be asked while the other instance of its pair is at work. Absent for a vLLM worker, and for older ones of ours. */
  readonly overlaps?: boolean;
  /** Absent for a vLLM worker, and for older ones of ours. */
  readonly load?: WorkerLoad;
  /** It speaks the native hand-over. Absent likewise. */
  readonly native?: boolean;
  /** Its HTTP server takes TLS alone. */
  readonly tls?: boolean;
  /** Where it says what it has cached. Absent: nowhere. */
  readonly events?: KvEventPorts;
  /** Digest of what it tokenizes by. Absent for a vLLM worker, and for older ones of ours. */
  readonly tokenizer?: string;
  /** It takes the ids of a prompt's tokens, if from this proxy. */
  readonly takesIds?: boolean;
  /** When it started, by its clock: what has restarted on its addresses is another. Absent likewise. */
  readonly started?: number;
  /** Of one that was named (--instances): where it has answered. Absent: requests go where it says. */
  readonly at?: HostPort;
}

export interface Instance extends InstancePing {
  /** Where requests go; an unspecified address in the ping stands for this host. */
  readonly http: HostPort;
  /** Likewise, with the scheme; without the zone id, for which URLs have no place (see Upstream). */
  readonly url: string;
  readonly zmq: HostPort;
  readonly lastSeenMs: number;
  /** When it refused a connection: others are preferred until it pings again, and at least until `untilMs`. */
  readonly refused?: { readonly atMs: number; readonly untilMs: number };
  /** Ids that its /v1/models lists; absent until known. */
  readonly models?: readonly string[];
}

export interface InstancePair {
  readonly producer: Instance;
  readonly consumer: Instance;
}

/** Why there is no pair: a role without an instance, or instances of both roles of which no two fit. */
export type Missing = InstanceRole | 'match';

export type RegistryChange =
  | { readonly kind: 'added'; readonly instance: Instance }
  | {
      readonly kind: 'removed';
      readonly instance: Instance;
      readonly reason: 'expired' | 'replaced' | 'left';
    };

export interface PairWish {
  /** The request's `model`. Instances known to serve only others are taken only where none of their role serves it. */
  readonly model?: string | undefined;
  /** HTTP addresses not to be taken. */
  readonly exclude?: ReadonlySet<string>;
  /** Absent: nothing is known of it. */
  readonly prompt?: PromptToPlace;
  /** Where it is said why that pair. */
  readonly choices?: Choices;
}

/** How an instance fares. */
export interface Standing {
  /** What it has to do. */
  readonly work: InstanceWork;
  /** Whether requests go there. */
  readonly breaker: Breaker;
  /** What it was asked. */
  readonly tally: InstanceTally;
  /** An operator wants it to take nothing new. */
  readonly draining: boolean;
}

interface Entry extends Standing {
  /** Of its HTTP server. */
  readonly address: string;
  instance: Instance;
  /** All of it that `fitOf` looks at. */
  kind: string;
  /** Number of the pick it was last taken in: the smallest is next. */
  picked: number;
  readonly ours: boolean;
  draining: boolean;
}

/** Instances that fit the same others equally well. */
interface Group {
  readonly kind: string;
  readonly demerits: number;
  readonly members: Entry[];
}

/** What speaks against a pair, the worst first; of one instance the first alone. */
const [SHUNNED, UNKNOWN_FIT] = [2, 1];

export type Policies = Readonly<Record<InstanceRole, Policy>>;

const LAGGARD = 5;
const LAGGARD_MS = 30_000;

/** A proxy looks for silent instances once a second or more often. */
const MOST_BETWEEN_LOOKS_MS = 2_000;

/** Pings are not authenticated, so what they can fill is bounded. */
const MAX_INSTANCES = 1_024;

/**
 * Monotonic milliseconds in which this process ran, as far as it looks at this clock every now and then: between two looks at most
 * MOST_BETWEEN_LOOKS_MS pass. Where it was stopped, or its machine paused, pings wait unread, and by this clock nobody has been silent.
 */
export function runningClock(now: () => number = () => performance.now()): () => number {
  let atMs = now();
  let ranMs = 0;
  return () => {
    const nowMs = now();
    ranMs += Math.min(nowMs - atMs, MOST_BETWEEN_LOOKS_MS);
    atMs = nowMs;
    return ranMs;
  };
}

export class InstanceRegistry {
  readonly #entries = new Map<string, Entry>();
  readonly #timeoutMs: number;
  readonly #now: () => number;
  #picks = 0;

  readonly #policies: Policies;

  /** `now` is monotonic, in milliseconds. */
  constructor(
    timeoutMs: number,
    now: () => number = runningClock(),
    policies: Policies = { producer: 'auto', consumer: 'auto' },
  ) {
    this.#timeoutMs = timeoutMs;
    this.#now = now;
    this.#policies = policies;
  }

  /**
   * Takes a ping. An address that announces something else than before (another role, KV port or fingerprint) replaces what it was.
   * Throws ADDRESS_INVALID; returns undefined where the registry is full.
   */
  announce(announcement: InstancePing): readonly RegistryChange[] | undefined {
    const told = asDestination(parseHostPort(announcement.httpAddress, 'HTTP address of a ping'));
    const http = announcement.at ?? told;
    const zmq = asDestination(parseHostPort(announcement.zmqAddress, 'ZMQ address of a ping'));
    const now = this.#now();
    const known = this.#entries.get(announcement.httpAddress);
    if (known && samePing(known.instance, announcement) && !this.#expired(known.instance, now)) {
      const { load } = announcement;
      known.instance = { ...known.instance, ...(load && { load }), lastSeenMs: now };
      if (load) known.work.tell(load);
      return [];
    }
    // One process owns an address, so an earlier owner of either address is gone.
    const changes = this.#removeAll(
      'replaced',
      ({ httpAddress, zmqAddress }) =>
        httpAddress === announcement.httpAddress || zmqAddress === announcement.zmqAddress,
    );
    if (this.#entries.size >= MAX_INSTANCES) return changes.length > 0 ? changes : undefined;
    const url = instanceUrl(http, announcement.tls);
    const instance: Instance = { ...announcement, http, url, zmq, lastSeenMs: now };
    const work = new InstanceWork(this.#now);
    if (announcement.load) work.tell(announcement.load);
    const address = announcement.httpAddress;
    const breaker = new Breaker(this.#now);
    const ours = announcement.fingerprint !== undefined;
    const tally = new InstanceTally();
    const kind = kindOf(instance);
    const entry = { address, instance, kind, picked: 0, work, ours, breaker, tally, draining: false };
    this.#entries.set(address, entry);
    changes.push({ kind: 'added', instance });
    return changes;
  }

  /** Removes every instance whose last ping is too old. */
  expire(): readonly RegistryChange[] {
    const now = this.#now();
    return this.#removeAll('expired', (instance) => this.#expired(instance, now));
  }

  /** Removes an instance that says that it leaves. */
  leave(address: string): readonly RegistryChange[] {
    return this.#removeAll('left', ({ httpAddress }) => httpAddress === address);
  }

  /** After a refused connection: others are preferred for `ms`, and until it pings again, which one that is dead or leaving does not. */
  quarantine(httpAddress: string, ms: number): void {
    const entry = this.#entries.get(httpAddress);
    const atMs = this.#now();
    if (entry) entry.instance = { ...entry.instance, refused: { atMs, untilMs: atMs + ms } };
  }

  /** False where the instance has gone in the meantime. */
  setModels(httpAddress: string, models: readonly string[]): boolean {
    const entry = this.#entries.get(httpAddress);
    if (entry) {
      entry.instance = { ...entry.instance, models };
      entry.kind = kindOf(entry.instance);
    }
    return entry !== undefined;
  }

  /** A live instance has that address that started at another time. */
  another(httpAddress: string, started: number | undefined): boolean {
    const known = this.#entries.get(httpAddress)?.instance;
    return known !== undefined && known.started !== started && !this.#expired(known, this.#now());
  }

  /** Live instances; one that is overdue is left out even before `expire` runs. */
  list(role?: InstanceRole): readonly Instance[] {
    return this.#live(role).map((entry) => entry.instance);
  }

  /** Milliseconds since the last ping. */
  age(instance: Instance): number {
    return this.#now() - instance.lastSeenMs;
  }

  quarantined(instance: Instance): boolean {
    const { refused, lastSeenMs } = instance;
    return refused !== undefined && (this.#now() < refused.untilMs || lastSeenMs <= refused.atMs);
  }

  /** What is known of how it fares; undefined where the instance has gone. */
  standing({ httpAddress }: Instance): Standing | undefined {
    return this.#entries.get(httpAddress);
  }

  policyOf(role: InstanceRole): Policy {
    return this.#policies[role];
  }

  /** It takes no new requests, or takes them again. False where there is no such instance. */
  drain(httpAddress: string, draining: boolean): boolean {
    const entry = this.#entries.get(httpAddress);
    if (entry) entry.draining = draining;
    return entry !== undefined;
  }

  /** A producer that takes this many times as long for a token as the others do is let alone for a while. */
  #lags({ address, work, instance }: Entry): boolean {
    if (work.msPerToken === undefined) return false;
    const others = this.#live(instance.role)
      .filter((other) => other.address !== address)
      .flatMap((other) => other.work.msPerToken ?? [])
      .sort((a, b) => a - b);
    const usual = others[Math.floor(others.length / 2)];
    return usual !== undefined && others.length > 1 && work.msPerToken > usual * LAGGARD;
  }

  /** A prompt has been computed there: see InstanceWork.learn. */
  learn({ httpAddress }: Instance, tokens: number, ms: number): void {
    const entry = this.#entries.get(httpAddress);
    if (!entry) return;
    entry.work.learn(tokens, ms);
    if (!this.#lags(entry)) return;
    entry.breaker.open(LAGGARD_MS);
    entry.work.msPerToken = undefined;
  }

  /** There are a producer and a consumer that fit, and take requests. */
  get paired(): boolean {
    const open = this.#live().flatMap(({ draining, instance }) => (draining ? [] : instance));
    const consumers = open.filter(({ role }) => role === 'consumer');
    return open.some(
      (one) => one.role === 'producer' && consumers.some((other) => fitOf(one, other) !== 'never'),
    );
  }

  /**
   * The next pair: of the producers that have a part in a best fit the one that their policy chooses, then its consumer likewise. A pair
   * with a quarantined instance is taken only where there is no other.
   */
  pair(wish: PairWish = {}): InstancePair | Missing {
    const producers = this.#groups('producer', wish);
    const consumers = this.#groups('consumer', wish);
    if (producers.length === 0) return 'producer';
    if (consumers.length === 0) return 'consumer';

    let best = Number.POSITIVE_INFINITY;
    /** Of each group of producers, the consumers that fit it best. */
    let fits = new Map<Group, readonly Entry[]>();
    for (const some of producers) {
      for (const others of consumers) {
        const fit = fitOf(some.members[0]!.instance, others.members[0]!.instance);
        if (fit === 'never') continue;
        const penalty = some.demerits | others.demerits | (fit === 'same' ? 0 : UNKNOWN_FIT);
        if (penalty > best) continue;
        if (penalty < best) fits = new Map();
        best = penalty;
        const before = fits.get(some);
        fits.set(some, before ? [...before, ...others.members] : others.members);
      }
    }
    if (fits.size === 0) return 'match';
    const { prompt, choices } = wish;
    const able: Entry[] = [];
    for (const { members } of fits.keys()) able.push(...members);
    const producer = choose(this.#policies.producer, 'producer', able, prompt, choices);
    let fitting: readonly Entry[] = [];
    for (const [{ members }, others] of fits) if (members.includes(producer)) fitting = others;
    const consumer = choose(this.#policies.consumer, 'consumer', fitting, prompt, choices);
    producer.picked = consumer.picked = ++this.#picks;
    return { producer: producer.instance, consumer: consumer.instance };
  }

  /** Those that may be taken, by what decides whom they fit: seldom more than one or two groups, however many instances. */
  #groups(role: InstanceRole, { model, exclude }: PairWish): Group[] {
    const groups: Group[] = [];
    const live = this.#live(role);
    const serves = ({ instance: { models } }: Entry) =>
      model === undefined || (models?.includes(model) ?? true);
    // Also by whoever drains or has just refused: others would tell the client that there is no such model.
    const served = live.some(serves);
    for (const entry of live) {
      const { kind, address, draining, instance, breaker } = entry;
      if (draining || exclude?.has(address) || (served && !serves(entry))) continue;
      const shunned = breaker.state === 'open' || this.quarantined(instance);
      const demerits = shunned ? SHUNNED : 0;
      const known = groups.find((group) => group.kind === kind && group.demerits === demerits);
      if (known) known.members.push(entry);
      else groups.push({ kind, demerits, members: [entry] });
    }
    return groups;
  }

  #removeAll(
    reason: 'expired' | 'replaced' | 'left',
    isGone: (instance: Instance) => boolean,
  ): RegistryChange[] {
    const gone = [...this.#entries.values()].map(({ instance }) => instance).filter(isGone);
    for (const { httpAddress } of gone) this.#entries.delete(httpAddress);
    return gone.map((instance) => ({ kind: 'removed', instance, reason }));
  }

  #live(role?: InstanceRole): Entry[] {
    const now = this.#now();
    return [...this.#entries.values()].filter(
      ({ instance }) => (!role || instance.role === role) && !this.#expired(instance, now),
    );
  }

  #expired(instance: Instance, now: number): boolean {
    return now - instance.lastSeenMs > this.#timeoutMs;
  }
}

function kindOf({ fingerprint, sendType, models }: Instance): string {
  return JSON.stringify([fingerprint?.digest, sendType, models]);
}

function fitOf(producer: Instance, consumer: Instance): 'same' | 'unknown' | 'never' {
  const a = producer.fingerprint?.digest;
  const b = consumer.fingerprint?.digest;
  if (!sendTypesMeet(producer.sendType, consumer.sendType)) return 'never';
  if (a !== undefined && b !== undefined) return a === b ? 'same' : 'never';
  if (producer.models && consumer.models) {
    const names = new Set(producer.models);
    if (!consumer.models.some((name) => names.has(name))) return 'never';
  }
  return a === b ? 'same' : 'unknown';
}

/** PUT and PUT_ASYNC are the same to the receiver. */
function sendTypesMeet(a: SendType | undefined, b: SendType | undefined): boolean {
  return a === undefined || b === undefined || (a === 'GET') === (b === 'GET');
}

/** `[HTTP:h, ZMQ:z]`, the form that readers search the log for. */
export function instanceLabel(instance: Pick<Instance, 'httpAddress' | 'zmqAddress'>): string {
  return `[HTTP:${instance.httpAddress}, ZMQ:${instance.zmqAddress}]`;
}

/** Of an HTTP server, as in `Instance`. */
export function instanceUrl({ host, port }: HostPort, tls = false): string {
  return httpUrl({ host: host.replace(/%.*$/, ''), port }, tls);
}

/** A ping says nothing of where an instance that was named is reached. */
function samePing(a: Instance, b: InstancePing): boolean {
  return (
    a.role === b.role &&
    (!b.at || formatHostPort(a.http) === formatHostPort(b.at)) &&
    a.httpAddress === b.httpAddress &&
    a.zmqAddress === b.zmqAddress &&
    a.fingerprint?.digest === b.fingerprint?.digest &&
    a.sendType === b.sendType &&
    a.overlaps === b.overlaps &&
    a.native === b.native &&
    a.tls === b.tls &&
    a.events?.publish === b.events?.publish &&
    a.events?.snapshot === b.events?.snapshot &&
    a.tokenizer === b.tokenizer &&
    a.takesIds === b.takesIds &&
    a.started === b.started
  );
}
