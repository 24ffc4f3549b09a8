/** What the routes share. */
import type { WorkerConfig } from '../../config/worker-config.ts';
import { PdError } from '../../errors.ts';
import type { Logger } from '../../observability/log.ts';
import type { MetricsPage } from '../../observability/metrics.ts';
import type { CoreClient } from '../core-client.ts';
import type { InFlight } from './in-flight.ts';
import type { TextModel } from './text.ts';

export interface ServerContext {
  readonly config: Pick<
    WorkerConfig,
    'servedModelNames' | 'randomizeRequestIds' | 'kvKey' | 'role' | 'maxNumSeqs' | 'debugState'
  >;
  readonly core: Pick<CoreClient, 'generate' | 'info' | 'kvFailed' | 'prefilled' | 'release' | 'state'>;
  readonly model: TextModel;
  readonly inFlight: InFlight;
  /** The main thread's own page. */
  readonly metrics: MetricsPage;
  /** Every thread's page, for /metrics. */
  readonly pages: readonly MetricsPage[];
  readonly version: string;
  readonly log: Logger;
}

/** The name that answers carry. Throws MODEL_NOT_FOUND where a request names one that is not served. */
export function servedModel({ config }: ServerContext, requested: string | undefined): string {
  const names = config.servedModelNames;
  if (requested !== undefined && !names.includes(requested)) {
    throw new PdError(
      'MODEL_NOT_FOUND',
      `model ${JSON.stringify(requested)} is not served here; served: ${names.join(', ')}`,
      { param: 'model' },
    );
  }
  return names[0]!;
}
