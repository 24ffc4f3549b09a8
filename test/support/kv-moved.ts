/** Did the KV truly move? Text may be equal because the consumer computed everything itself; these numbers cannot. */
import { readFileSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import type { Wire } from '../../src/wire/overlap.ts';

interface DemoConfig {
  readonly num_hidden_layers: number;
  readonly num_key_value_heads: number;
  readonly head_dim: number;
}

const BLOCK = 16;
const FLOAT32 = 4;

/** Bytes on the wire for one prompt of the demo model: layers x K and V x tokens (blocks rounded up) x heads x dim x element. */
function demoKvBytes(promptTokens: number, elementBytes = FLOAT32): number {
  const path = fileURLToPath(new URL('../../models/demo/config.json', import.meta.url));
  const config = JSON.parse(readFileSync(path, 'utf8')) as DemoConfig;
  const tokens = Math.ceil(promptTokens / BLOCK) * BLOCK;
  return config.num_hidden_layers * 2 * tokens * config.num_key_value_heads * config.head_dim * elementBytes;
}

/** What the consumers' metrics must show for requests of these prompt lengths; each mismatch is a line. Empty: it moved. */
export function kvMovedProblems(
  before: readonly ReadonlyMap<string, number>[],
  after: readonly ReadonlyMap<string, number>[],
  promptTokens: readonly number[],
  { elementBytes = FLOAT32, wire = 'frozen' }: { elementBytes?: number; wire?: Wire } = {},
): string[] {
  const delta = (name: string) => {
    const sum = (pages: readonly ReadonlyMap<string, number>[]) =>
      pages.reduce((total, page) => total + (page.get(name) ?? Number.NaN), 0);
    return sum(after) - sum(before);
  };
  const requests = promptTokens.length;
  const expected: [string, number][] = [
    ['pd_kv_loads_total{result="ok"}', requests],
    ['pd_kv_loads_total{result="recomputed"}', 0],
    ['pd_kv_loads_total{result="failed"}', 0],
    [
      'pd_kv_received_bytes_total',
      promptTokens.reduce((sum, tokens) => sum + demoKvBytes(tokens, elementBytes), 0),
    ],
    // by the native hand-over the first token comes along, so the last position is not computed again
    ['pd_prompt_tokens_total{source="computed"}', wire === 'native' ? 0 : requests],
  ];
  return expected
    .filter(([name, value]) => delta(name) !== value)
    .map(([name, value]) => `${name} rose by ${delta(name)}, not ${value}`);
}
