/**
 * A transfer engine with the native hand-over beside it: what a worker's core has, and what a runtime that is not ours gives to both halves
 * of its connector.
 *
 *   create: (a device of its own) --> direct writes, where they may be --> engine --> hand-over
 *   close:  every WANT is answered --> engine --> mappings
 */
import { randomBytes } from 'node:crypto';
import type { TransferOptionsInput } from '../../config/embedded.ts';
import type { TransportChoice } from '../../config/worker-config.ts';
import { createDevice } from '../../device/create-device.ts';
import type { Device } from '../../device/device.ts';
import type { NamedLayer } from '../../device/paged-cache.ts';
import { PdError } from '../../errors.ts';
import { blockBytes } from '../../kv/layout.ts';
import { createLogger, type Logger } from '../../observability/log.ts';
import { MetricsPage } from '../../observability/metrics.ts';
import type { ExportedCache } from '../../transport/direct/exported-cache.ts';
import type { TransferId } from '../../wire/ids.ts';
import type { TransferEngine } from '../engine.ts';
import type { NativeInit } from './channel.ts';
import type { DirectWays } from './direct.ts';
import type { HandOver, HandOverOptions } from './hand-over.ts';
import type { HandOverApi, HandOverStage, HandOverState, MovedKv } from './hand-over-api.ts';
import type { KvCache } from './kv-cache.ts';
import type { Nonce } from './messages.ts';

/** `TransferOptionsInput`, and what the hand-over needs besides. */
export interface NativeTransferOptions extends TransferOptionsInput {
  readonly role: 'producer' | 'consumer';
  /**
   * The paged cache that KV is read from and written to. A consumer's `KvCache` on a GPU is written into by producers of the same host
   * (`direct`); layers in memory of your own are filled over a pair (`nccl`). A producer may write from either. Stays yours.
   */
  readonly cache: KvCache | readonly NamedLayer[];
  /** Default: `auto`. */
  readonly transport?: TransportChoice;
  /** Whether the runtime computes now: a self-test of paths waits until it does not. Default: never. */
  readonly busy?: () => boolean;
  /** For `readMetric`; written by the thread that calls. */
  readonly metrics?: MetricsPage;
}

/** Of whoever has options that are complete. */
export interface NativeTransferParts {
  readonly role: 'producer' | 'consumer';
  readonly rank: number;
  readonly transport: TransportChoice;
  readonly device: Device;
  readonly layers: readonly NamedLayer[];
  readonly exported: ExportedCache | undefined;
  /** How long KV that nobody asks for is kept, ms. */
  readonly leaseMs: number;
  readonly busy: () => boolean;
  readonly log: Logger;
  readonly metrics: MetricsPage;
  readonly onStage?: (id: TransferId, stage: HandOverStage, moved?: MovedKv) => void;
  readonly onFlag?: NonNullable<HandOverOptions['onFlag']>;
  readonly openEngine: (native: NativeInit) => Promise<TransferEngine>;
}

export class NativeTransfer {
  readonly engine: TransferEngine;
  /**
   * As a worker's core holds it.
   * @internal
   */
  readonly whole: HandOver;
  readonly #direct: DirectWays | undefined;
  readonly #dispose: () => void;
  #closing: Promise<void> | undefined;

  private constructor(
    engine: TransferEngine,
    handOver: HandOver,
    direct: DirectWays | undefined,
    dispose: () => void,
  ) {
    this.engine = engine;
    this.whole = handOver;
    this.#direct = direct;
    this.#dispose = dispose;
  }

  /**
   * Binds the KV port and starts the transfer thread. Throws what `TransferEngine.create` throws; REQUEST_INVALID for a cache without layers;
   * DIRECT_REFUSED and others where `transport` is `direct` and that is not possible here. Close it: its thread keeps the process alive.
   */
  static async create(options: NativeTransferOptions): Promise<NativeTransfer> {
    const { transferOptions } = await import('../../config/embedded.ts');
    const { TransferEngine } = await import('../engine.ts');
    const {
      role,
      cache,
      transport = 'auto',
      busy = () => false,
      metrics = new MetricsPage(),
      ...input
    } = options;
    const complete = transferOptions(input);
    const [layers, exported] = 'layers' in cache ? [cache.layers, cache.exported] : [cache, undefined];
    const device = await createDevice(complete.device);
    try {
      const parts = {
        role,
        rank: complete.rank,
        transport,
        device,
        layers,
        exported,
        leaseMs: complete.timeouts.orphan,
        busy,
        log: createLogger(complete.log, 'hand-over'),
        metrics,
        openEngine: (native: NativeInit) => TransferEngine.open(complete, { native }),
      };
      return await NativeTransfer.open(parts, () => device.dispose());
    } catch (error) {
      device.dispose();
      throw error;
    }
  }

  /**
   * `dispose`: what goes last.
   * @internal
   */
  static async open(parts: NativeTransferParts, dispose: () => void = () => {}): Promise<NativeTransfer> {
    const nonce = randomBytes(16).toString('hex') as Nonce;
    const direct = await openDirect(parts, nonce);
    let engine: TransferEngine | undefined;
    try {
      const init = initOf(parts, nonce, direct);
      // while the other thread starts
      const rehearsed = direct && rehearseHere(init, parts.log);
      engine = await parts.openEngine(init);
      await rehearsed;
      const wire = engine.native.bind(engine);
      const { HandOver } = await import('./hand-over.ts');
      const handOver = new HandOver({ ...parts, init, wire, ...(direct && { direct }) });
      return new NativeTransfer(engine, handOver, direct, dispose);
    } catch (error) {
      await engine?.dispose();
      await direct?.close();
      throw error;
    }
  }

  /** For `NativeParts` of a `P2pWorkerConnector`. */
  get handOver(): HandOverApi {
    return this.whole;
  }

  /** Connections, wants, leases, quarantine and mappings of now. */
  state(): HandOverState {
    return this.whole.state();
  }

  /** After the last step: answers every WANT, ends the engine, then unmaps. Bounded by some ten seconds. Idempotent. */
  close(): Promise<void> {
    this.#closing ??= this.#close();
    return this.#closing;
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }

  async #close(): Promise<void> {
    await this.whole.close();
    await this.engine.dispose();
    await this.#direct?.close();
    this.#dispose();
  }
}

/** Never rejects: requests are handed over without it as well, the first ones more slowly. */
async function rehearseHere({ shape }: NativeInit, log: Logger): Promise<void> {
  try {
    const { rehearse } = await import('./rehearsal.ts');
    const began = performance.now();
    const requests = await rehearse(shape);
    log.debug({ requests, milliseconds: performance.now() - began }, 'the hand-over has been rehearsed');
  } catch (error) {
    log.warn({ err: PdError.from(error) }, 'the hand-over could not be rehearsed');
  }
}

/** Undefined where it is not wanted, or `auto` and not possible here. */
async function openDirect(
  { transport, device, layers, exported, log, metrics }: NativeTransferParts,
  nonce: Nonce,
): Promise<DirectWays | undefined> {
  if (device.kind !== 'cuda' || (transport !== 'auto' && transport !== 'direct')) return undefined;
  try {
    const { DirectWays } = await import('./direct.ts');
    return await DirectWays.open({ device, layers, exported, nonce, log, metrics });
  } catch (error) {
    if (transport === 'direct') throw error;
    const { code, message } = PdError.from(error);
    log.warn({ code }, `direct writes are not possible here, KV goes by nccl: ${message}`);
    return undefined;
  }
}

function initOf(
  { layers, transport, role, exported }: NativeTransferParts,
  nonce: Nonce,
  direct: DirectWays | undefined,
): NativeInit {
  const [first] = layers;
  if (!first) throw new PdError('REQUEST_INVALID', 'the native hand-over needs a cache with layers');
  const { layout, memory } = first.cache;
  const { numBlocks: blocks, blockSize, family } = layout;
  const pairs =
    memory.kind === 'host' ? (['host'] as const) : transport === 'direct' ? [] : (['nccl'] as const);
  // a consumer in memory of its own cannot be written into
  const offered = role === 'consumer' && !exported ? undefined : direct;
  return {
    nonce,
    layers: layers.map(({ cache }) => cache),
    shape: { blocks, blockSize, layers: layers.length, blockBytes: blockBytes(layout), family },
    transports: [...(offered ? (['direct'] as const) : []), ...pairs],
    ...(offered && { direct: offered.place }),
  };
}
