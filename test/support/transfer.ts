/** Transfer services and engines for tests: on the host, on loopback, with deadlines that only end what hangs. */
import { randomFillSync } from 'node:crypto';
import { afterEach } from 'vitest';
import { transferOptions as completeOptions } from '../../src/config/embedded.ts';
import {
  DEFAULT_TIMEOUTS,
  type TransferOptions,
  type TransferTimeouts,
} from '../../src/config/transfer-options.ts';
import { deferred } from '../../src/deferred.ts';
import type { MemoryRef, PagedLayer } from '../../src/device/device.ts';
import { hostMemory, hostView } from '../../src/device/memory.ts';
import { PdError } from '../../src/errors.ts';
import { layerBytes, type PagedLayout } from '../../src/kv/layout.ts';
import type { HostPort } from '../../src/net/address.ts';
import { freePorts } from '../../src/net/free-ports.ts';
import { type MetricName, type MetricsPage, readMetric } from '../../src/observability/metrics.ts';
import { type ServiceParts, TransferService } from '../../src/transfer/service.ts';
import type { SendRequest } from '../../src/transfer/types.ts';
import { type TensorId, type TransferId, tensorIdOf } from '../../src/wire/ids.ts';
import { transferOf } from '../../support/ids.ts';

/** A busy machine is slow, not broken: tests set a shorter one where it is to pass. */
export const PATIENT_TIMEOUTS: TransferTimeouts = {
  ...DEFAULT_TIMEOUTS,
  ...{ connect: 60_000, answer: 60_000, pairInit: 60_000, transfer: 60_000 },
};

/** A port for one that is started again at its address: the system gives it to nobody else meanwhile. */
export async function keptPort(host = '127.0.0.1'): Promise<number> {
  const [port] = await freePorts(1, host);
  return port!;
}

export interface TestOptions extends Partial<Omit<TransferOptions, 'timeouts' | 'limits'>> {
  readonly timeouts?: Partial<TransferTimeouts>;
  readonly limits?: Partial<TransferOptions['limits']>;
  readonly host?: string;
  readonly port?: number;
}

export function transferOptions(overrides: TestOptions = {}): TransferOptions {
  const { host = '127.0.0.1', port = 0, timeouts, ...rest } = overrides;
  return completeOptions({
    bind: { host, port },
    kvBufferSize: 2 ** 20,
    memPoolSize: 2 ** 20,
    log: { level: (process.env['PD_TEST_LOG'] as 'debug') ?? 'silent', format: 'json' },
    ...rest,
    timeouts: { ...PATIENT_TIMEOUTS, ...timeouts },
  });
}

/** Services made by a test, disposed together. */
export class Services {
  readonly #made: { dispose(): Promise<void> }[] = [];

  async make(overrides: TestOptions = {}, parts: ServiceParts = {}): Promise<TransferService> {
    const service = await TransferService.create(transferOptions(overrides), parts);
    this.#made.push(service);
    return service;
  }

  add<T extends { dispose(): Promise<void> }>(one: T): T {
    this.#made.push(one);
    return one;
  }

  async dispose(): Promise<void> {
    await Promise.all(this.#made.splice(0).map((one) => one.dispose()));
  }
}

/** Of a file's tests, disposed after each. */
export function testServices(): Services {
  const services = new Services();
  afterEach(() => services.dispose());
  return services;
}

export interface Sent {
  readonly gathered: Promise<void>;
  readonly underWay: Promise<void>;
  readonly sent: Promise<number>;
}

/** `service.send` as promises; neither rejects unhandled. */
export function send(service: TransferService, request: SendRequest): Sent {
  const gathered = deferred<void>();
  const underWay = deferred<void>();
  const sent = deferred<number>();
  underWay.promise.catch(() => undefined);
  gathered.promise.catch(() => undefined);
  sent.promise.catch(() => undefined);
  service.send(request, {
    gathered: (already) => {
      if (already) underWay.resolve();
      gathered.resolve();
    },
    underWay: () => underWay.resolve(),
    sent: (bytes) => {
      underWay.resolve();
      gathered.resolve();
      sent.resolve(bytes);
    },
    failed: (error) => {
      underWay.reject(error);
      gathered.reject(error);
      sent.reject(error);
    },
  });
  return { gathered: gathered.promise, underWay: underWay.promise, sent: sent.promise };
}

/** A flat uint8 tensor of random bytes. */
export function flat(id: string, bytes: number, peer?: HostPort): SendRequest & { readonly data: MemoryRef } {
  const data = hostMemory(bytes);
  randomFillSync(hostView(data));
  return {
    tensorId: id as TensorId,
    shape: [bytes],
    dtype: 'uint8',
    source: { kind: 'flat', memory: data },
    data,
    ...(peer && { peer }),
  };
}

export const LAYOUT: PagedLayout = {
  family: 'kv-first',
  numBlocks: 16,
  blockSize: 4,
  heads: 2,
  headDim: 8,
  dtype: 'float32',
};

/** A paged cache of `layers` layers with random (or zero) contents. */
export function pagedCache(
  layers: number,
  random: boolean,
  layout = LAYOUT,
): { name: string; target: PagedLayer }[] {
  return Array.from({ length: layers }, (_, index) => {
    const memory = hostMemory(layerBytes(layout));
    if (random) randomFillSync(hostView(memory));
    return { name: `model.layers.${index}.self_attn.attn`, target: { memory, layout } };
  });
}

/** Bytes of one block of one layer, K then V. */
export function blockOf(layer: PagedLayer, block: number): Buffer {
  const run = layer.layout.blockSize * layer.layout.heads * layer.layout.headDim * 4;
  const cache = hostView(layer.memory);
  const parts = [0, 1].map((kv) =>
    cache.slice((kv * layer.layout.numBlocks + block) * run, (kv * layer.layout.numBlocks + block + 1) * run),
  );
  return Buffer.concat(parts);
}

/** Sends of all layers of one request from a paged cache. */
export function sendCache(
  service: TransferService,
  id: string,
  cache: readonly { name: string; target: PagedLayer }[],
  blocks: readonly number[],
  peer?: HostPort,
  promptDigest?: string,
): Sent[] {
  return cache.map(({ name, target }) =>
    send(service, {
      tensorId: tensorIdOf(id as TransferId, name),
      shape: [2, blocks.length, target.layout.blockSize, target.layout.heads, target.layout.headDim],
      dtype: target.layout.dtype,
      source: { kind: 'blocks', layer: target, blockIds: Int32Array.from(blocks) },
      ...(promptDigest !== undefined && { promptDigest }),
      ...(peer && { peer }),
    }),
  );
}

export function loadRequest(
  requestId: string,
  cache: readonly { name: string; target: PagedLayer }[],
  blocks: readonly number[],
  peer: HostPort,
  extra: {
    readonly skipBlocks?: number;
    readonly timeoutMs?: number;
    readonly prefillWithinMs?: number;
  } = {},
) {
  return {
    requestId,
    transferId: transferOf(requestId),
    peer,
    layers: cache,
    blockIds: Int32Array.from(blocks),
    skipBlocks: extra.skipBlocks ?? 0,
    ...(extra.timeoutMs === undefined ? {} : { timeoutMs: extra.timeoutMs }),
    ...(extra.prefillWithinMs === undefined ? {} : { prefillWithinMs: extra.prefillWithinMs }),
  };
}

/** One counter or gauge of a service. */
export function count(service: { readonly metrics: MetricsPage }, name: MetricName, label?: string): number {
  const read = readMetric as (pages: readonly MetricsPage[], name: MetricName, label?: string) => number;
  return read([service.metrics], name, label);
}

/** Awaits a condition that nothing announces, event turn by event turn. */
export async function until(what: string, holds: () => boolean, timeoutMs = 60_000): Promise<void> {
  const end = performance.now() + timeoutMs;
  while (!holds()) {
    if (performance.now() > end) throw new Error(`${what} did not come true`);
    await new Promise((resolve) => setTimeout(resolve, 5));
  }
}

/** The PdError that a promise rejects with. */
export async function failure(promise: Promise<unknown>): Promise<PdError> {
  try {
    await promise;
  } catch (error) {
    if (error instanceof PdError) return error;
    throw error;
  }
  throw new Error('did not reject');
}

/** Nothing is held and the books are right. */
export function leftovers(service: TransferService): string[] {
  const { buffer, pool, tensors } = service.state();
  const wrong = service.checkIntegrity();
  if (buffer.usedBytes !== 0) wrong.push(`${buffer.usedBytes} bytes of the buffer are used`);
  if (pool.usedBytes !== 0) wrong.push(`${pool.usedBytes} bytes of the pool are used`);
  if (tensors !== 0) wrong.push(`${tensors} tensors are held`);
  return wrong;
}
