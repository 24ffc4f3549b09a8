/** One request on its way through the proxy, and what is needed to move it. */
import type { IncomingHttpHeaders, ServerResponse } from 'node:http';
import type { Logger } from '../observability/log.ts';
import type { ProxyMetrics } from './metrics.ts';
import type { JsonObject } from './prefill-copy.ts';
import type { Prefills } from './prefills.ts';
import type { Pair } from './registry.ts';
import type { Upstream } from './upstream.ts';

/** A client's request as it came. */
export interface ClientRequest {
  readonly route: string;
  readonly headers: IncomingHttpHeaders;
  readonly body: Buffer;
  readonly out: ServerResponse;
  /** Aborted when the proxy stops. */
  readonly stop: AbortSignal;
}

/** A request under way. */
export interface Exchange extends ClientRequest {
  readonly json: JsonObject;
  readonly arrivedMs: number;
  /** Aborted once the client has gone or the proxy stops. */
  readonly signal: AbortSignal;
  /** Of the last pair tried. */
  requestId: string | undefined;
}

/** One try of it, with one pair. */
export interface Attempt {
  readonly exchange: Exchange;
  readonly pair: Pair;
  readonly requestId: string;
  /** For both instances. */
  readonly headers: Readonly<Record<string, string>>;
}

export interface ForwardParts {
  readonly upstream: Upstream;
  readonly metrics: ProxyMetrics;
  readonly log: Logger;
  readonly prefills: Prefills;
  readonly prefillTimeoutMs: number;
  readonly decodeIdleTimeoutMs: number;
}

/** Of an error answer, bytes. */
export const MAX_ERROR_BODY = 1024 * 1024;
