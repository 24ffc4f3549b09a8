/** A system started by `pd-launch`: its addresses, and the metrics of its workers. */

export interface Addresses {
  readonly proxy: { readonly url: string; readonly discovery: string };
  readonly producers: readonly { readonly name: string; readonly url: string; readonly kv: string }[];
  readonly consumers: readonly { readonly name: string; readonly url: string; readonly kv: string }[];
}

const DEADLINE_MS = 60_000;

/** `name{labels}` -> value; the label model_name, the same on all, is left out. */
export async function metricsOf(url: string): Promise<ReadonlyMap<string, number>> {
  const response = await fetch(`${url}/metrics`, { signal: AbortSignal.timeout(DEADLINE_MS) });
  const metrics = new Map<string, number>();
  for (const line of (await response.text()).split('\n')) {
    const match = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)$/.exec(line);
    if (!match) continue;
    const labels = (match[2] ?? '').replace(/model_name="[^"]*",?/, '').replace(/,$/, '');
    metrics.set(labels ? `${match[1]}{${labels}}` : match[1]!, Number(match[3]));
  }
  return metrics;
}
