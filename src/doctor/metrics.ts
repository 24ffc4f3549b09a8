/** Counters of a running worker, read from its /metrics page. */
import { ask } from '../net/http.ts';

export type Metrics = ReadonlyMap<string, number>;

/** `name{labels}` -> value, the label model_name left out; empty where the page cannot be had. */
export async function metricsOf(url: string, timeoutMs: number): Promise<Metrics> {
  const metrics = new Map<string, number>();
  let text = '';
  try {
    text = (await ask(url, timeoutMs)).text;
  } catch {
    // whoever asks sees that nothing is there
  }
  for (const line of text.split('\n')) {
    const match = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)$/.exec(line);
    if (!match) continue;
    const labels = (match[2] ?? '').replace(/model_name="[^"]*",?/, '').replace(/,$/, '');
    metrics.set(labels === '' ? match[1]! : `${match[1]}{${labels}}`, Number(match[3]));
  }
  return metrics;
}

export function rise(before: Metrics, after: Metrics, name: string): number {
  return (after.get(name) ?? 0) - (before.get(name) ?? 0);
}
