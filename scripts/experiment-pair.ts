/** One producer and one consumer of the experiment: real cores on threads, the bundled model, one prompt at a time. */

import { randomBytes } from 'node:crypto';
import { workerConfig } from '../src/config/embedded.ts';
import type { KvKey } from '../src/config/transfer-options.ts';
import { prepareNativeEnvironment } from '../src/device/native-env.ts';
import { PdError } from '../src/errors.ts';
import { GREEDY } from '../src/model/sampler.ts';
import { parseHostPort } from '../src/net/address.ts';
import { MetricsPage, readMetric } from '../src/observability/metrics.ts';
import type { CoreRequest } from '../src/scheduler/types.ts';
import { type EngineRequestId, engineRequestId, kvKeyOf, proxyRequestId } from '../src/wire/ids.ts';
import type { SendType } from '../src/wire/messages.ts';
import { CoreClient } from '../src/worker/core-client.ts';

export interface MatrixSettings {
  readonly device: 'host' | 'cuda';
  readonly executor: 'host' | 'cuda';
  readonly sendType: SendType;
  readonly kvKey: KvKey;
  /** Deadline for KV that should not arrive. */
  readonly deadlineMs: number;
}

/** Deadline for KV that should arrive and for all other waits, only to end what hangs. */
const PATIENCE_MS = 60_000;

export interface MatrixRequest {
  readonly randomized: boolean;
  /** Its KV should arrive, so a slow machine is no reason to stop. */
  readonly shouldPass: boolean;
  /** Suffixes of the producer's and the consumer's engine id; undefined: none. */
  readonly suffixes: readonly [string | undefined, string | undefined];
}

export interface MatrixCell {
  readonly sendType: SendType;
  readonly kvKey: KvKey;
  readonly randomized: boolean;
  readonly producerId: string;
  readonly consumerId: string;
  readonly result: 'passes' | 'stops';
  /** KV bytes that the consumer received, and prompt tokens that it computed. */
  readonly bytes: number;
  readonly computed: number;
  readonly code: string;
  readonly message: string;
  readonly milliseconds: number;
}

/** More than one block, so that more than a padded block moves. */
const PROMPT_TOKENS = 40;

export interface MatrixPair {
  readonly kvKey: KvKey;
  request(request: MatrixRequest): Promise<MatrixCell>;
  close(): Promise<void>;
}

interface Side {
  readonly client: CoreClient;
  readonly pages: { readonly core: MetricsPage; readonly transfer: MetricsPage };
}

export async function createMatrixPair(settings: MatrixSettings): Promise<MatrixPair> {
  const started = await Promise.allSettled([start(settings, 'producer'), start(settings, 'consumer')]);
  const close = async () => {
    // The consumer first, as it would wait for the producer.
    for (const side of [...started].reverse())
      if (side.status === 'fulfilled') await side.value.client.close();
  };
  const [producer, consumer] = started;
  if (producer.status === 'fulfilled' && consumer.status === 'fulfilled') {
    const request = (cell: MatrixRequest) => cellOf(settings, producer.value, consumer.value, cell);
    return { kvKey: settings.kvKey, request, close };
  }
  await close();
  throw PdError.from(
    producer.status === 'rejected' ? producer.reason : (consumer as PromiseRejectedResult).reason,
  );
}

async function start(settings: MatrixSettings, role: 'producer' | 'consumer'): Promise<Side> {
  const { device, executor, sendType, kvKey, deadlineMs } = settings;
  const config = workerConfig({
    role,
    device: device === 'host' ? 'host' : `cuda:${role === 'producer' ? 0 : 1}`,
    executor,
    sendType,
    kvKey,
    loadFailure: 'fail',
    kvBufferSize: 64e6,
    memPoolSize: 64 * 2 ** 20,
    numBlocks: 64,
    timeouts: {
      load: deadlineMs,
      // In GET a producer holds its answer back for half of this, and the consumer hears of near misses by it.
      answer: sendType === 'GET' && role === 'producer' ? Math.max(100, deadlineMs / 4) : PATIENCE_MS,
      connect: PATIENCE_MS,
    },
    log: { level: 'error' },
  });
  prepareNativeEnvironment(config.transfer);
  const pages = { core: new MetricsPage(), transfer: new MetricsPage() };
  const metrics = { core: pages.core.buffer, transfer: pages.transfer.buffer };
  return { client: await CoreClient.start({ config, metrics }), pages };
}

async function cellOf(
  { sendType, kvKey }: MatrixSettings,
  producer: Side,
  consumer: Side,
  { randomized, shouldPass, suffixes }: MatrixRequest,
): Promise<MatrixCell> {
  const [prefill, decode] = [producer, consumer].map(({ client }) =>
    parseHostPort(client.info.kvAddress ?? ''),
  );
  const serverId = `cmpl-${proxyRequestId(prefill!, decode!, randomBytes(16).toString('hex'))}-0`;
  const [producerId, consumerId] = suffixes.map((suffix) => engineRequestId(serverId, suffix)) as [
    EngineRequestId,
    EngineRequestId,
  ];
  // Different each time, so that no prefix cache holds it.
  const promptTokens = Int32Array.from(randomBytes(PROMPT_TOKENS), (byte) => 10 + byte);
  const before = counters(consumer);
  const keyed = (requestId: EngineRequestId) => ({
    requestId,
    transferId: kvKeyOf({ serverId, requestId }, kvKey),
  });
  await generate(producer, keyed(producerId), promptTokens, 1);
  const began = performance.now();
  const patience = shouldPass ? PATIENCE_MS : 0;
  const error = await generate(consumer, keyed(consumerId), promptTokens, 4, patience).then(
    () => undefined,
    (cause: unknown) => PdError.from(cause),
  );
  const after = counters(consumer);
  const passes = error === undefined && after.loads > before.loads;
  return {
    sendType,
    kvKey,
    randomized,
    producerId,
    consumerId,
    result: passes ? 'passes' : 'stops',
    bytes: after.bytes - before.bytes,
    computed: after.computed - before.computed,
    code: error?.code ?? (passes ? '' : 'NOTHING_LOADED'),
    message: error?.message ?? '',
    milliseconds: performance.now() - began,
  };
}

function counters({ pages }: Side) {
  return {
    loads: readMetric([pages.core], 'pd_kv_loads_total', 'ok'),
    computed: readMetric([pages.core], 'pd_prompt_tokens_total', 'computed'),
    bytes: readMetric([pages.transfer], 'pd_kv_received_bytes_total'),
  };
}

async function generate(
  side: Side,
  ids: Pick<CoreRequest, 'requestId' | 'transferId'>,
  promptTokens: Int32Array,
  maxTokens: number,
  patienceMs = 0,
): Promise<void> {
  const sampling = { ...GREEDY, maxTokens };
  // Added to the deadline of its KV, as for a prompt that is still being computed.
  const patience = patienceMs > 0 ? { prefillWithinMs: patienceMs } : {};
  const request: CoreRequest = { ...ids, promptTokens, sampling, n: 1, ...patience };
  for await (const output of side.client.generate(request)) {
    if (output.error) throw PdError.fromData(output.error);
  }
}
