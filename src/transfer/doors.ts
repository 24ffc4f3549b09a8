/** `--allow-peers`, at both doors of an engine: the KV listener and the data port of the host transport. */

import type { TransferOptions } from '../config/transfer-options.ts';
import { formatHostPort, type HostPort } from '../net/address.ts';
import { AllowList } from '../net/allow-list.ts';
import { ZapGate } from '../net/zap.ts';
import type { Logger } from '../observability/log.ts';
import type { MetricsPage } from '../observability/metrics.ts';
import type { Guard } from '../transport/host/acceptor.ts';

export interface Doors {
  /** For the ROUTER; to be closed after it. */
  readonly gate: ZapGate;
  readonly guard: Guard;
}

/** Undefined where everyone may come. Throws CONFIG_INVALID for a list that is none. */
export async function openDoors(
  { allowPeers }: TransferOptions,
  listener: HostPort,
  metrics: MetricsPage,
  log: Logger,
): Promise<Doors | undefined> {
  if (!allowPeers) return undefined;
  const allow = AllowList.parse(allowPeers);
  const onRefused = () => metrics.inc('pd_peers_refused_total', 1);
  const gate = await ZapGate.open({ allow, what: `KV listener ${formatHostPort(listener)}`, log, onRefused });
  return { gate, guard: { allow, log, onRefused } };
}
