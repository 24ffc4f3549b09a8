/**
 * Who the native hand-over is connected with, and how bytes come from each producer: by `direct` where both offer it on one host, by a pair
 * where it is refused or takes too long, with the reason. On the core thread; sockets and mappings are direct.ts's and the wire's.
 *
 *   met (its hello) --both offer direct--> waits for it to map our cache --open--> direct
 *                  \                                            \--refused, late--> nccl
 *                   \--else--> nccl, host; neither: lost
 */
import type { ErrorData } from '../../errors.ts';
import type { Logger } from '../../observability/log.ts';
import type { MetricsPage } from '../../observability/metrics.ts';
import type { NativeInit } from './channel.ts';
import type { DirectWays } from './direct.ts';
import type { ConnectionState, MappingState } from './hand-over-api.ts';
import { directFallback, FALLBACK_REASONS, type Fallback, pairWay } from './hello.ts';
import { type HelloMessage, type NativeTransport, type Nonce, TRANSPORTS } from './messages.ts';

interface ConnectionEvents {
  /** That producer may be asked. */
  ready(peer: string): void;
  /** Nothing can be had from it, and the connection is of no use. */
  useless(peer: string, error: ErrorData): void;
  /** That process is dead, and nothing of it is under way any more. */
  died(peer: string, nonce: Nonce): void;
  /** Whether nothing is computed or written here. */
  idle(): boolean;
}

interface ConnectionsOptions {
  readonly init: NativeInit;
  readonly role: 'producer' | 'consumer';
  readonly direct: Pick<DirectWays, 'serve' | 'pageOf' | 'expect' | 'connect' | 'mappings'> | undefined;
  readonly log: Logger;
  readonly on: ConnectionEvents;
}

/** A producer that has said hello on the connection of now. */
interface Producer {
  readonly hello: HelloMessage;
  /** How its bytes come; undefined while that is being found out. */
  transport: NativeTransport | undefined;
  /** Why not by `direct`, between GPUs. */
  fallback: Fallback | undefined;
  /** Until when `direct` is waited for. */
  patience: NodeJS.Timeout | undefined;
}

/** For a producer of this host to map our cache, before its bytes go by a pair. */
const DIRECT_MS = 5_000;

export class Connections {
  readonly #options: ConnectionsOptions;
  readonly #producers = new Map<string, Producer>();
  /** Where a process was heard of last; those linked by `direct`. */
  readonly #peers = new Map<Nonce, string>();

  constructor(options: ConnectionsOptions) {
    this.#options = options;
    options.direct?.serve({
      open: (nonce) => this.#open(nonce),
      refused: (nonce, why) => this.#refused(nonce, { reason: 'refused', why }),
      died: (nonce) => this.#died(nonce),
      idle: () => options.on.idle(),
    });
  }

  /** The producer at that address, once the way of its bytes is known. */
  ready(peer: string): { readonly hello: HelloMessage; readonly transport: NativeTransport } | undefined {
    const producer = this.#producers.get(peer);
    if (!producer?.transport) return undefined;
    return { hello: producer.hello, transport: producer.transport };
  }

  has(peer: string): boolean {
    return this.#producers.has(peer);
  }

  /** A producer has answered our hello; `ready` or `useless` follows. */
  met(peer: string, hello: HelloMessage): void {
    const { direct, init } = this.#options;
    const fallback = directFallback(init, hello);
    const producer: Producer = { hello, transport: undefined, fallback, patience: undefined };
    this.#producers.set(peer, producer);
    if (!direct || fallback) {
      this.#takePair(peer, producer);
      return;
    }
    this.#peers.set(hello.from, peer);
    if (direct.pageOf(hello.from)) {
      this.#ready(peer, producer, 'direct');
      return;
    }
    direct.expect(hello.from);
    const why = `its producer has not mapped the cache within ${DIRECT_MS / 1_000} s`;
    producer.patience = setTimeout(() => this.#refused(hello.from, { reason: 'late', why }), DIRECT_MS);
  }

  /** A consumer has said hello: its cache is mapped, where that is possible. */
  admitted(peer: string, hello: HelloMessage): void {
    const { direct, init } = this.#options;
    if (!direct || !hello.direct || directFallback(init, hello)) return;
    this.#peers.set(hello.from, peer);
    direct.connect(peer, hello.from, hello.direct.path);
  }

  /** The connection to a producer is over. Whether there was one. */
  lost(peer: string): boolean {
    clearTimeout(this.#producers.get(peer)?.patience);
    return this.#producers.delete(peer);
  }

  states(): ConnectionState[] {
    return [...this.#producers].map(([peer, { transport, fallback }]) => ({
      peer,
      transport,
      ...(transport === 'nccl' && fallback && { fallback }),
    }));
  }

  mappings(): MappingState[] {
    return this.#options.direct?.mappings((nonce) => this.#peers.get(nonce)) ?? [];
  }

  measure(metrics: MetricsPage): void {
    const states = this.states();
    for (const way of TRANSPORTS) {
      const count = states.filter(({ transport }) => transport === way).length;
      metrics.set('pd_native_connections', count, way);
    }
    for (const reason of FALLBACK_REASONS) {
      const count = states.filter(({ fallback }) => fallback?.reason === reason).length;
      metrics.set('pd_native_fallbacks', count, reason);
    }
  }

  /** Waits for no mapping any more. */
  close(): void {
    for (const { patience } of this.#producers.values()) clearTimeout(patience);
  }

  /** By a pair: of both ends' ways the first that is one. */
  #takePair(peer: string, producer: Producer): void {
    const way = pairWay(this.#options.init, producer.hello);
    if (way) {
      this.#ready(peer, producer, way);
      return;
    }
    const why = producer.fallback?.why ?? 'direct is refused';
    const message = `no way for KV is open at both ends: ${why}, and ${peer} has no other in common with this worker`;
    this.#options.on.useless(peer, { code: 'TRANSPORT_MISMATCH', message, context: { peer } });
  }

  #ready(peer: string, producer: Producer, transport: NativeTransport): void {
    clearTimeout(producer.patience);
    producer.patience = undefined;
    producer.transport = transport;
    if (transport === 'direct') producer.fallback = undefined;
    this.#options.on.ready(peer);
  }

  #open(nonce: Nonce): void {
    const peer = this.#peers.get(nonce);
    if (peer === undefined) return;
    const { log, role } = this.#options;
    log.info({ peer }, `🤝direct Success, ${role === 'producer' ? `👉${peer}` : `👈${peer}`}`);
    // what is wanted already goes on as it began
    const producer = this.#producers.get(peer);
    if (producer?.hello.from === nonce) this.#ready(peer, producer, 'direct');
  }

  #refused(nonce: Nonce, fallback: Fallback): void {
    const peer = this.#peers.get(nonce);
    if (peer === undefined) return;
    this.#options.log.warn(
      { peer, reason: fallback.reason },
      `direct writes between this worker and ${peer} are not possible, KV goes another way: ${fallback.why}`,
    );
    const producer = this.#producers.get(peer);
    if (producer?.hello.from !== nonce) {
      // its next hello tries anew
      this.#peers.delete(nonce);
      return;
    }
    if (producer.transport) return;
    producer.fallback = fallback;
    this.#takePair(peer, producer);
  }

  /** Its socket has ended. */
  #died(nonce: Nonce): void {
    const peer = this.#peers.get(nonce);
    if (peer === undefined) return;
    this.#peers.delete(nonce);
    const { on, log } = this.#options;
    log.info({ peer, nonce }, `the process of ${peer} that was linked by direct is gone`);
    on.died(peer, nonce);
    // Its connection should be over as well. Where it is not, it would be asked in vain.
    if (this.#producers.get(peer)?.hello.from !== nonce) return;
    const message = `${peer} has ended its link for direct writes`;
    on.useless(peer, { code: 'PEER_LOST', message, context: { peer } });
  }
}
