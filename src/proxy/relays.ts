/**
 * The processes that relay (--workers N), seen from the one that owns what all requests share. This one accepts connections and hands them
 * out in turn; each relay process reads requests, asks here where they go (coordinator.ts), and streams. One that dies is replaced, and only
 * its own requests are lost.
 *
 *   client -- connection --> owner -- socket --> relay process -- HTTP --> instances
 *                             ^  coordinator, discovery, index, admin       |
 *                             +---- channel: where to, what became of it ---+
 */
import { type ChildProcess, fork } from 'node:child_process';
import { once } from 'node:events';
import { mkdtemp, rm } from 'node:fs/promises';
import { createServer, type Server, type Socket } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import type { ProxyConfig } from '../config/proxy-config.ts';
import { Cancellation, type Deferred, deferred, withDeadline } from '../deferred.ts';
import { PdError, unreachable } from '../errors.ts';
import type { HostPort } from '../net/address.ts';
import { listenError } from '../net/port-holder.ts';
import type { Logger } from '../observability/log.ts';
import { threadEntry } from '../thread-entry.ts';
import { Channel, type FromRelay, type SentPlacement, type SentWish, type ToRelay } from './channel.ts';
import type { Coordinator, Placement, Visit } from './coordinator.ts';
import { addCounts, type ExportedMetrics, sumMetrics } from './metrics.ts';
import type { Receipt } from './receipts.ts';
import type { Instance, RegistryChange } from './registry.ts';

const START_MS = 60_000;
/** Beyond the time to drain. */
const STOP_MS = 5_000;
/** Before one that died is replaced: twice as long after each that did not get ready. */
const REPLACE_MS = 100;
const LONGEST_REPLACE_MS = 10_000;
/** Until a process has taken a connection: it does nothing else that takes long. */
const TAKE_MS = 10_000;
const METRICS_MS = 2_000;
const RECEIPTS_MS = 2_000;
/** Between two looks at what is to be known of prompts. */
const WANTED_MS = 1_000;

interface RelaysOptions {
  readonly config: ProxyConfig;
  readonly coordinator: Coordinator;
  readonly log: Logger;
  readonly pseudonym: string;
  readonly instances: () => readonly Instance[];
}

/** A request of a relay process, as its owner keeps it. */
interface Entered {
  readonly abort: Cancellation;
  visit?: Visit;
  readonly placements: Placement[];
}

interface Relay {
  readonly child: ChildProcess;
  readonly channel: Channel<ToRelay, FromRelay>;
  readonly entered: Map<number, Entered>;
  ready: boolean;
  /** The last it has told. */
  metrics: ExportedMetrics;
  asked: Deferred<void> | undefined;
  /** Connections on their way to it, in order, and whether it may have them: Node sends the next one once the last has been taken. */
  readonly handing: Map<Socket, 'waits' | 'sent'>;
  /** Of the first of them. */
  takeTimer: NodeJS.Timeout | undefined;
  /** Questions for its receipts that it has not answered. */
  readonly receipts: Map<number, Deferred<readonly Receipt[]>>;
}

/** To be drained and closed. */
export class Relays {
  readonly #options: RelaysOptions;
  readonly #folder: string;
  readonly #relays = new Map<number, Relay>();
  readonly #server: Server;
  readonly #wantedTimer: NodeJS.Timeout;
  #wanted = '';
  #next = 0;
  #seq = 0;
  /** Connections that came while there was no process for them. */
  readonly #unserved = new Set<Socket>();
  /** What processes that have gone had counted. */
  #gone: Promise<ExportedMetrics> = Promise.resolve([]);
  #failures = 0;
  #draining = false;
  #killTimer: NodeJS.Timeout | undefined;

  private constructor(options: RelaysOptions, folder: string) {
    this.#options = options;
    this.#folder = folder;
    this.#server = createServer({ pauseOnConnect: true }, (socket) => this.#hand(socket));
    this.#wantedTimer = setInterval(() => this.#tellWanted(), WANTED_MS).unref();
  }

  static async create(options: RelaysOptions): Promise<Relays> {
    return new Relays(options, await mkdtemp(join(tmpdir(), 'pd-proxy-')));
  }

  /** Resolves with the port once all processes are ready. Throws what keeps one from starting, PORT_IN_USE, or ADDRESS_INVALID. */
  async start(http: HostPort): Promise<number> {
    const { workers } = this.#options.config;
    await Promise.all(Array.from({ length: workers }, (_, number) => this.#open(number)));
    return await this.#listen(http);
  }

  /** Where this process's own HTTP server is to listen, for what relay processes do not answer themselves. */
  get ownerPath(): string {
    return ownerPath(this.#folder);
  }

  /** Requests under way. */
  get running(): number {
    let running = 0;
    for (const { entered } of this.#relays.values()) running += entered.size;
    return running;
  }

  async #listen(http: HostPort): Promise<number> {
    try {
      this.#server.listen({ host: http.host, port: http.port });
      await once(this.#server, 'listening');
    } catch (cause) {
      throw await listenError(cause, http, 'listening for requests');
    }
    const bound = this.#server.address();
    if (bound === null || typeof bound === 'string') throw new PdError('INTERNAL', 'no TCP address');
    return bound.port;
  }

  instanceChanged({ kind, instance }: RegistryChange): void {
    const { httpAddress } = instance;
    for (const { channel } of this.#relays.values())
      channel.send(kind === 'added' ? { type: 'instance', instance } : { type: 'gone', httpAddress });
  }

  /** All processes' together with `own`; of one that does not answer, what it told last. */
  async metrics(own: () => Promise<ExportedMetrics>): Promise<string> {
    await this.#ask();
    const others = [...this.#relays.values()].map(({ metrics }) => metrics);
    // By now it has heard of all that they have counted.
    return await sumMetrics([await own(), await this.#gone, ...others]);
  }

  /** All processes' receipts, the latest last, of each at most `most`, or that of the request with the id `of`; without those of one that does not answer. */
  async receipts({
    of,
    most,
  }: {
    readonly of?: string;
    readonly most?: number;
  } = {}): Promise<readonly Receipt[]> {
    const asking = [...this.#relays.values()].map(async ({ channel, receipts }) => {
      const seq = this.#seq++;
      const answer = deferred<readonly Receipt[]>();
      receipts.set(seq, answer);
      channel.send({ type: 'receipts', seq, of, most });
      const told = await withDeadline(answer.promise, RECEIPTS_MS);
      receipts.delete(seq);
      return told ?? [];
    });
    const all = (await Promise.all(asking)).flat();
    return all.sort((a, b) => a.receivedAt - b.receivedAt);
  }

  async #ask(): Promise<void> {
    const asking = [...this.#relays.values()].map((relay) => {
      relay.asked ??= deferred();
      relay.channel.send({ type: 'metrics' });
      return withDeadline(relay.asked.promise, METRICS_MS);
    });
    await Promise.all(asking);
  }

  /** Takes no new requests, lets those under way end within `ms`; a later call with 0 breaks them off at once. */
  drain(ms: number): void {
    this.#draining = true;
    for (const { channel } of this.#relays.values()) channel.send({ type: 'drain', ms });
    clearTimeout(this.#killTimer);
    this.#killTimer = setTimeout(() => {
      for (const { child } of this.#relays.values()) child.kill('SIGKILL');
    }, ms + STOP_MS);
  }

  /** After `drain`: resolves once no process is left. */
  async drained(): Promise<void> {
    await Promise.all([...this.#relays.values()].map(({ child }) => gone(child)));
    clearTimeout(this.#killTimer);
  }

  /** After `drained`. */
  async close(): Promise<void> {
    clearInterval(this.#wantedTimer);
    for (const socket of this.#unserved) socket.destroy();
    // Not awaited: it still counts the connections of processes that have gone.
    this.#server.close();
    await rm(this.#folder, { recursive: true, force: true });
  }

  async #open(number: number): Promise<void> {
    const { config, log, pseudonym, instances } = this.#options;
    const entry = fileURLToPath(threadEntry(import.meta.url, './relay-process.js'));
    // Its log is ours; the fourth is the channel, since on that of Node messages wait while a socket is handed over.
    const child = fork(entry, [], { stdio: ['ignore', 'inherit', 'inherit', 'ipc', 'pipe'], execArgv: [] });
    const started = deferred<void>();
    const entered = new Map<number, Entered>();
    const channel = new Channel<ToRelay, FromRelay>(
      child.stdio[4] as Socket,
      (message) => this.#receive(relay, message, started),
      () => child.kill('SIGKILL'),
    );
    const relay: Relay = {
      child,
      channel,
      entered,
      ready: false,
      metrics: [],
      asked: undefined,
      handing: new Map(),
      takeTimer: undefined,
      receipts: new Map(),
    };
    this.#relays.set(number, relay);
    child.once('exit', (code, signal) => {
      const how = signal ?? `status ${code}`;
      started.reject(new PdError('INTERNAL', `relay process ${number} ended (${how}) before it was ready`));
      this.#lost(number, relay, how);
    });
    child.once('error', (error) => started.reject(error));
    channel.send({ type: 'start', config, pseudonym, folder: this.#folder, number });
    channel.send({ type: 'wanted', wanted: this.#options.coordinator.wanted });
    for (const instance of instances()) channel.send({ type: 'instance', instance });
    const timer = setTimeout(() => {
      started.reject(new PdError('INTERNAL', `relay process ${number} was not ready within ${START_MS} ms`));
      child.kill('SIGKILL');
    }, START_MS);
    try {
      await started.promise;
    } finally {
      clearTimeout(timer);
    }
    relay.ready = true;
    this.#failures = 0;
    log.info({ pid: child.pid }, `relay process ${number} is ready`);
    // A copy: where it has ended meanwhile, they wait again.
    for (const socket of [...this.#unserved]) this.#hand(socket);
  }

  /** Its requests are over; another takes its place. */
  #lost(number: number, relay: Relay, how: string): void {
    const { ready, entered, metrics, asked, handing, takeTimer, receipts } = relay;
    this.#relays.delete(number);
    clearTimeout(takeTimer);
    for (const [socket, state] of handing) {
      if (state === 'waits') this.#hand(socket);
      else socket.destroy(); // it may have read from it
    }
    handing.clear();
    asked?.resolve();
    for (const answer of receipts.values()) answer.resolve([]);
    this.#gone = this.#gone.then((before) => addCounts(before, metrics));
    for (const { abort, visit } of entered.values()) {
      abort.abort(new PdError('REQUEST_ABORTED', 'its relay process has ended'));
      visit?.end();
    }
    if (this.#draining) return;
    const { log } = this.#options;
    if (ready)
      log.error(
        `relay process ${number} ended (${how}), and ${entered.size} requests with it: another takes over`,
      );
    const pauseMs = ready ? 0 : Math.min(LONGEST_REPLACE_MS, REPLACE_MS * 2 ** this.#failures++);
    setTimeout(() => {
      if (this.#draining) return;
      this.#open(number).catch((error: unknown) => log.error(PdError.from(error).message));
    }, pauseMs).unref();
  }

  /** In turn. */
  #hand(socket: Socket): void {
    this.#unserved.delete(socket);
    const ready = [...this.#relays.values()].filter(({ ready, child }) => ready && child.connected);
    if (ready.length === 0) {
      this.#unserved.add(socket);
      socket.once('close', () => this.#unserved.delete(socket));
      return;
    }
    const relay = ready[this.#next++ % ready.length]!;
    const { child, handing } = relay;
    handing.set(socket, 'waits');
    relay.takeTimer ??= this.#takeTimer(relay);
    // Kept open until it is taken: of what a process had not taken when it was killed Node lets go without a word.
    child.send('connection', socket, { keepOpen: true }, (error) => {
      if (!handing.has(socket)) return;
      if (error) this.#letGo(relay, socket);
      else handing.set(socket, 'sent');
    });
  }

  /** It is the process's, which goes on with it, or nobody's. */
  #letGo(relay: Relay, socket: Socket): void {
    relay.handing.delete(socket);
    socket.destroy();
    clearTimeout(relay.takeTimer);
    relay.takeTimer = relay.handing.size > 0 ? this.#takeTimer(relay) : undefined;
  }

  /** Kills a process that stands still: others serve what waits for it, and another takes its place. */
  #takeTimer(relay: Relay): NodeJS.Timeout {
    const timer = setTimeout(() => {
      // Where it was this process that stood still, what has come meanwhile is heard first.
      setImmediate(() => {
        if (relay.takeTimer !== timer) return;
        const { log } = this.#options;
        log.error(
          { pid: relay.child.pid },
          `a relay process took no connection for ${TAKE_MS} ms: it is killed`,
        );
        relay.child.kill('SIGKILL');
      });
    }, TAKE_MS);
    return timer.unref();
  }

  #receive(relay: Relay, message: FromRelay, started: Deferred<void>): void {
    const { entered } = relay;
    switch (message.type) {
      case 'ready':
        started.resolve();
        break;
      case 'taken': {
        const [socket] = relay.handing.keys();
        if (!socket) break;
        this.#letGo(relay, socket);
        break;
      }
      case 'failed':
        started.reject(PdError.fromData(message.error));
        break;
      case 'metrics':
        relay.metrics = message.metrics;
        relay.asked?.resolve();
        relay.asked = undefined;
        break;
      case 'receipts':
        relay.receipts.get(message.seq)?.resolve(message.receipts);
        break;
      case 'enter':
        void this.#enter(relay, message.id, message.wish);
        break;
      case 'retry':
        void this.#retry(relay, message);
        break;
      case 'prefilled': {
        const { visit, placements } = entered.get(message.id) ?? {};
        visit?.prefilled(placements![message.at]!, message.tookMs);
        break;
      }
      case 'judge': {
        const { visit, placements } = entered.get(message.id) ?? {};
        visit?.judge(placements![message.at]!, message.role, message.ok, message.firstEventMs);
        break;
      }
      case 'end': {
        const request = entered.get(message.id);
        entered.delete(message.id);
        request?.abort.abort(new PdError('REQUEST_ABORTED', 'the client went away'));
        request?.visit?.end();
        break;
      }
      default:
        unreachable(message, 'message of a relay process');
    }
  }

  async #enter({ channel, entered }: Relay, id: number, { prompt, ...wish }: SentWish): Promise<void> {
    const request: Entered = { abort: new Cancellation(), placements: [] };
    entered.set(id, request);
    try {
      const blockKeys = new Map(prompt.blockKeys);
      const visit = await this.#options.coordinator.enter(
        { ...wish, prompt: { ...prompt, blockKeys } },
        request.abort,
      );
      if (request.abort.aborted) {
        visit.end();
        return;
      }
      request.visit = visit;
      request.placements.push(visit.placement);
      channel.send(placed(id, visit, visit.placement));
    } catch (error) {
      channel.send({ type: 'refused', id, error: PdError.from(error).toData() });
    }
  }

  async #retry(
    { channel, entered }: Relay,
    { id, refused }: Extract<FromRelay, { type: 'retry' }>,
  ): Promise<void> {
    const request = entered.get(id);
    const placement = await request?.visit?.retry(refused);
    if (!request || !placement) {
      channel.send({ type: 'refused', id });
      return;
    }
    request.placements.push(placement);
    channel.send(placed(id, request.visit!, placement));
  }

  #tellWanted(): void {
    const { wanted } = this.#options.coordinator;
    const now = JSON.stringify(wanted);
    if (now === this.#wanted) return;
    this.#wanted = now;
    for (const { channel } of this.#relays.values()) channel.send({ type: 'wanted', wanted });
  }
}

/** In the folder that both ends know. */
export function ownerPath(folder: string): string {
  return join(folder, 'owner.sock');
}

function placed(id: number, { count, queuedMs }: Visit, { pair, ...others }: Placement): ToRelay {
  const { producer, consumer } = pair;
  const placement: SentPlacement = {
    ...others,
    pair: { producer: producer.httpAddress, consumer: consumer.httpAddress },
  };
  return { type: 'placed', id, count, queuedMs, placement };
}

async function gone(child: ChildProcess): Promise<void> {
  if (child.exitCode === null && child.signalCode === null) await once(child, 'exit');
}
