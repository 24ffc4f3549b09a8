/**
 * The transfer engine proper: it runs on the transfer thread, and tests run it in-process. It owns the ROUTER, every pair, the device's
 * transfer memory and the books of what is in it.
 *
 *   send --> staging --> OutgoingPeer --> Link (DEALER + pair) --> peer
 *   load <-- Intake  <-- Incoming (ROUTER + pairs)             <-- peer        PUT
 *   load --> GET     --> OutgoingPeer --> Link                 <-- Keeper      GET
 */

import type { TransferOptions } from '../config/transfer-options.ts';
import { createDevice } from '../device/create-device.ts';
import type { Device } from '../device/device.ts';
import { EventPoller } from '../device/poller.ts';
import { PdError } from '../errors.ts';
import { formatHostPort, type HostPort } from '../net/address.ts';
import { AllowList } from '../net/allow-list.ts';
import { ZapGate } from '../net/zap.ts';
import { createLogger, type Logger, RateLimitedLog } from '../observability/log.ts';
import { MetricsPage } from '../observability/metrics.ts';
import { createTransport } from '../transport/create-transport.ts';
import type { Transport } from '../transport/transport.ts';
import type { TensorId, TransferId } from '../wire/ids.ts';
import type { WorkerLoad } from '../wire/messages.ts';
import { Announcer } from './announcer.ts';
import { logTensor, type TransferContext } from './context.ts';
import { Deadlines } from './deadlines.ts';
import { Failures } from './failures.ts';
import { formed } from './frozen/form.ts';
import { Incoming } from './frozen/incoming.ts';
import { Intake } from './frozen/intake.ts';
import { Keeper } from './frozen/keeper.ts';
import { Loads } from './frozen/loads.ts';
import { OutgoingPeers } from './frozen/peer.ts';
import { PutAnnouncement, type SendReply } from './frozen/put.ts';
import { Stager } from './frozen/stager.ts';
import { helloOf } from './hello.ts';
import { KvMemory } from './kv-memory.ts';
import type { FromWire, NativeInit, ToWire } from './native/channel.ts';
import { nativeBodyBytes } from './native/codec.ts';
import { NativeRefusal } from './native/probe.ts';
import { NativeWire } from './native/wire.ts';
import { Router } from './router.ts';
import type {
  LoadRequest,
  LoadResult,
  PairState,
  ProxyPing,
  SendRequest,
  StoredTensor,
  TransferState,
} from './types.ts';

export interface ServiceParts {
  readonly metrics?: MetricsPage;
  /** Absent: the frozen wire alone is spoken. */
  readonly native?: { readonly init: NativeInit; tell(event: FromWire): void };
  /** For tests: another device or transport than the options name; the service disposes them. */
  readonly device?: Device;
  readonly wrapTransport?: (transport: Transport) => Transport;
}

export class TransferService {
  readonly address: HostPort;
  readonly #context: TransferContext;
  readonly #router: Router;
  /** Closed after the router. */
  readonly #gate: ZapGate | undefined;
  readonly #intake: Intake;
  readonly #stager: Stager;
  readonly #keeper: Keeper;
  readonly #incoming: Incoming;
  readonly #native: NativeWire | undefined;
  readonly #loads: Loads;
  readonly #outgoing: OutgoingPeers;
  #announcer: Announcer | undefined;
  /** The last one has taken back what it announced. */
  #left: Promise<void> | undefined;
  /** As it was told last. */
  #load: WorkerLoad | undefined;
  #disposed: Promise<void> | undefined;

  private constructor(
    context: TransferContext,
    router: Router,
    address: HostPort,
    gate: ZapGate | undefined,
    native: ServiceParts['native'],
  ) {
    this.#gate = gate;
    this.#context = context;
    this.#router = router;
    this.address = address;
    this.#intake = new Intake(context);
    const pairsChanged = () => this.#pairsChanged();
    const newerPair = (peer: string, since: number) => this.#incoming.newerPair(peer, since);
    this.#outgoing = new OutgoingPeers(context, { pairsChanged, newerPair });
    this.#stager = new Stager(context);
    this.#keeper = new Keeper(context, this.#stager);
    this.#loads = new Loads(context, this.#intake, {
      outgoing: this.#outgoing,
      lostPair: (peer) => this.#incoming.lostPair(peer),
      pairs: (peer) => this.#pairs().filter((pair) => pair.peer === peer),
    });
    this.#native =
      native &&
      new NativeWire(context, router, native.init, {
        tell: (event) => native.tell(event),
        pairsChanged,
      });
    this.#incoming = new Incoming(context, router, {
      intake: this.#intake,
      keeper: this.#keeper,
      outgoing: this.#outgoing,
      pairsChanged,
      native:
        this.#native ?? new NativeRefusal(context, router, (id, error) => this.#loads.sendFailed(id, error)),
    });
  }

  static async create(options: TransferOptions, parts: ServiceParts = {}): Promise<TransferService> {
    const log = createLogger(options.log, 'transfer');
    const metrics = parts.metrics ?? new MetricsPage();
    const port = options.bind.port === 0 ? 0 : options.bind.port + options.rank;
    const undo: (() => unknown)[] = [];
    try {
      const bound = { host: options.bind.host, port };
      const doors = await openDoors(options, bound, metrics, log);
      if (doors) undo.push(() => doors.gate.close());
      const { native } = parts;
      const longest = native && nativeBodyBytes({ maxBlocks: native.init.shape.blocks });
      const router = await Router.bind(bound, log, doors?.gate, longest);
      undo.push(() => router.close());
      const device = parts.device ?? (await createDevice(options.device));
      undo.push(() => device.dispose());
      const { announceHost, ncclNumChannels } = options;
      const made = await createTransport(device, {
        bindHost: options.bind.host,
        announceHost,
        ncclNumChannels,
        ...(doors && { guard: doors.guard }),
      });
      const transport = parts.wrapTransport?.(made) ?? made;
      undo.push(() => transport.dispose());
      const deadlines = new Deadlines();
      const memory = new KvMemory({
        device,
        bufferBytes: options.kvBufferSize,
        poolLimitBytes: options.memPoolSize,
        deadlines,
        metrics,
        log,
      });
      const address = { host: announceHost, port: router.port };
      const self = formatHostPort(address);
      const context: TransferContext = {
        options,
        self,
        hello: helloOf(options),
        device,
        transport,
        stream: device.createStream(),
        poller: new EventPoller(),
        memory,
        deadlines,
        metrics,
        log,
        limited: new RateLimitedLog(),
        failures: new Failures(deadlines),
      };
      const service = new TransferService(context, router, address, doors?.gate, native);
      service.#incoming.start();
      const localRank = /^cuda:(\d+)$/.exec(options.device)?.[1] ?? String(options.rank);
      log.info(
        { sendType: options.sendType, device: options.device },
        `💯P2pNcclEngine init, rank:${options.rank}, local_rank:${localRank}, ` +
          `http_address:${options.httpAddress ?? ''}, zmq_address:${self}, ` +
          `proxy_address:${options.proxyAddress ?? ''}, send_type:${options.sendType}, ` +
          `buffer_size_threshold:${options.kvBufferSize.toFixed(2)}, nccl_num_channels:${ncclNumChannels}`,
      );
      return service;
    } catch (error) {
      for (const step of undo.reverse()) await Promise.resolve(step()).catch(() => undefined);
      throw error;
    }
  }

  /** The metrics page that this engine writes. */
  get metrics(): MetricsPage {
    return this.#context.metrics;
  }

  send(request: SendRequest, reply: SendReply): void {
    const { options, failures } = this.#context;
    const peer = request.peer && formatHostPort(request.peer);
    logTensor(this.#context, 'to send', request, peer);
    if (this.#disposed) {
      reply.failed(closed());
      return;
    }
    if (options.sendType === 'GET') {
      this.#keeper.keep(request, reply);
      return;
    }
    if (peer === undefined) {
      const message = `${request.tensorId}: send_type ${options.sendType} needs the peer to send to`;
      reply.failed(new PdError('KV_SEND_FAILED', message, { tensorId: request.tensorId }));
      return;
    }
    const outgoing = this.#outgoing.of(peer);
    const leaving = outgoing.native ? request : formed(request, options);
    const put = new PutAnnouncement(this.#context, leaving, peer, {
      gathered: (underWay) => reply.gathered(underWay),
      underWay: () => reply.underWay(),
      sent: (bytes) => {
        failures.wentWell('send', peer);
        reply.sent(bytes);
      },
      failed: (error) => {
        failures.note('send', peer, error);
        reply.failed(error);
        outgoing.withdraw(put);
      },
    });
    outgoing.submit(put);
    if (!put.cancelled) put.prepare(this.#stager);
  }

  receive(tensorId: TensorId, peer: HostPort, timeoutMs?: number): Promise<StoredTensor> {
    if (this.#disposed) return Promise.reject(closed());
    return this.#loads.receive(tensorId, peer, timeoutMs);
  }

  load(request: LoadRequest): Promise<LoadResult> {
    if (this.#disposed) return Promise.reject(closed());
    return this.#loads.load(request);
  }

  cancelLoad(requestId: string): void {
    this.#loads.cancel(requestId);
  }

  prefilled(id: TransferId): void {
    this.#loads.prefilled(id);
  }

  sendFailed(id: TransferId, reason: PdError): void {
    this.#loads.sendFailed(id, reason);
  }

  finish(id: TransferId, keepSends = false): void {
    this.#intake.finish(id);
    this.#keeper.finish(id, keepSends);
  }

  /** Of the native hand-over. */
  native(command: ToWire): void {
    this.#native?.command(command);
  }

  startPing(ping: ProxyPing): void {
    if (this.#disposed) return;
    this.stopPing();
    try {
      this.#announcer = new Announcer(this.#context, ping);
      if (this.#load) this.#announcer.tell(this.#load);
    } catch (error) {
      this.#context.log.error({ err: PdError.from(error) }, 'pings to the proxy cannot be started');
    }
  }

  stopPing(): void {
    if (this.#announcer) this.#left = this.#announcer.close();
    this.#announcer = undefined;
  }

  reportLoad(load: WorkerLoad): void {
    this.#load = load;
    this.#announcer?.tell(load);
  }

  state(): TransferState {
    const { memory, self, options } = this.#context;
    return {
      address: self,
      sendType: options.sendType,
      kvKey: options.kvKey,
      pairs: this.#pairs(),
      buffer: { usedBytes: memory.bufferUsed, thresholdBytes: memory.thresholdBytes },
      pool: {
        usedBytes: memory.poolUsed,
        reservedBytes: memory.poolReserved,
        limitBytes: memory.limitBytes,
      },
      tensors: this.#intake.store.size + this.#keeper.store.size,
      waiting: this.#loads.waiting(),
      failures: this.#context.failures.state(),
    };
  }

  #pairs(): PairState[] {
    return [...this.#outgoing.states(), ...this.#incoming.states(), ...(this.#native?.states() ?? [])];
  }

  /** What is wrong with the books, in words. */
  checkIntegrity(): string[] {
    return [
      ...this.#context.memory.checkIntegrity(),
      ...this.#intake.store.checkIntegrity(),
      ...this.#keeper.store.checkIntegrity(),
    ];
  }

  /** Ends every pair and everything that waits. Idempotent. */
  dispose(): Promise<void> {
    this.#disposed ??= this.#close();
    return this.#disposed;
  }

  async #close(): Promise<void> {
    const { transport, poller, memory, stream, device, deadlines } = this.#context;
    this.stopPing();
    const reason = closed();
    await this.#router.close();
    await this.#gate?.close();
    this.#loads.dispose(reason);
    this.#outgoing.close(reason);
    this.#incoming.close(reason);
    this.#native?.close(reason);
    memory.dispose();
    await transport.dispose();
    await this.#left;
    poller.dispose(reason);
    deadlines.clear();
    stream.dispose();
    device.dispose();
  }

  get #numPairs(): number {
    return this.#outgoing.openPairs + this.#incoming.openPairs + (this.#native?.openPairs ?? 0);
  }

  #pairsChanged(): void {
    if (this.#disposed) return;
    this.#context.metrics.set('pd_pairs_open', this.#numPairs);
  }
}

function closed(): PdError {
  return new PdError('ENGINE_CLOSED', 'the transfer engine has been disposed');
}

/**
 * `--allow-peers`, at both doors of an engine: the KV listener, whose gate is to be closed after it, and the data port of the host transport.
 * Undefined where everyone may come. Throws CONFIG_INVALID for a list that is none.
 */
async function openDoors(
  { allowPeers }: TransferOptions,
  listener: HostPort,
  metrics: MetricsPage,
  log: Logger,
) {
  if (!allowPeers) return undefined;
  const allow = AllowList.parse(allowPeers);
  const onRefused = () => metrics.inc('pd_peers_refused_total', 1);
  const gate = await ZapGate.open({ allow, what: `KV listener ${formatHostPort(listener)}`, log, onRefused });
  return { gate, guard: { allow, log, onRefused } };
}
