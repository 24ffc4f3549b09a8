/** Which cores a benchmark may use, and who gets which. */

import { readFileSync } from 'node:fs';
import { availableParallelism } from 'node:os';

export interface Layout {
  /** The proxy's. Where there are enough, nobody else has their other hardware threads. */
  readonly proxy: readonly number[];
  readonly backends: readonly number[];
  readonly load: readonly number[];
  /** Everybody has cores of their own. */
  readonly apart: boolean;
}

/** As many for the proxy, the rest for instances and load. */
export function layoutFor(proxyCores: number): Layout {
  const cores = usableCores();
  if (cores.length < proxyCores + 2) {
    const others = cores.length > 1 ? cores.slice(1) : cores;
    return { proxy: cores.slice(0, proxyCores), backends: others, load: others, apart: false };
  }
  const proxy = cores.slice(0, proxyCores);
  const rest = cores.slice(proxyCores);
  const siblings = new Set(proxy.flatMap(siblingsOf));
  const quiet = rest.filter((core) => !siblings.has(core));
  const others = quiet.length >= 6 ? quiet : rest;
  const load = Math.max(1, Math.min(4, Math.floor(others.length / 2)));
  return { proxy, backends: others.slice(load), load: others.slice(0, load), apart: true };
}

/** One hardware thread of each core, then the others. */
function usableCores(): number[] {
  const status = readFileSync('/proc/self/status', 'latin1');
  const allowed = listOf(/Cpus_allowed_list:\s*(\S+)/.exec(status)?.[1] ?? `0-${availableParallelism() - 1}`);
  const first = allowed.filter((core) => allowed.find((other) => siblingsOf(core).includes(other)) === core);
  return [...first, ...allowed.filter((core) => !first.includes(core))];
}

/** Hardware threads of the same core, itself among them. */
function siblingsOf(core: number): number[] {
  try {
    return listOf(
      readFileSync(`/sys/devices/system/cpu/cpu${core}/topology/thread_siblings_list`, 'latin1').trim(),
    );
  } catch {
    return [core];
  }
}

/** `0-3,8` */
function listOf(text: string): number[] {
  return text.split(',').flatMap((part) => {
    const [from, to = from] = part.split('-').map(Number);
    return Array.from({ length: to! - from! + 1 }, (_, i) => from! + i);
  });
}
