/** A system started by `pd-launch`: its addresses, and the metrics of its workers. */
import { type Metrics, parseMetrics } from '../src/doctor/worker-state.ts';

export interface Addresses {
  readonly proxy: { readonly url: string; readonly discovery: string };
  readonly producers: readonly { readonly name: string; readonly url: string; readonly kv: string }[];
  readonly consumers: readonly { readonly name: string; readonly url: string; readonly kv: string }[];
}

const DEADLINE_MS = 60_000;

export async function metricsOf(url: string): Promise<Metrics> {
  const response = await fetch(`${url}/metrics`, { signal: AbortSignal.timeout(DEADLINE_MS) });
  return parseMetrics(await response.text());
}
