/**
 * Tensors that lie one after the other in memory travel as one region. Both ends must cut alike, so each tells the other its runs: how
 * many tensors of a bundle are neighbours in its memory. A region ends where a run of either end does. Pure.
 *
 *   sender     |t0 t1 t2 t3|t4 t5|      runs 4 2
 *   receiver   |t0 t1|t2 t3 t4 t5|      runs 2 4
 *   regions    |t0 t1|t2 t3|t4 t5|
 */
import type { MemoryRef } from '../../device/device.ts';
import { PdError } from '../../errors.ts';

/** Lengths of the runs of neighbours, in tensors. One without memory is a run of its own. */
export function runsOf(memory: readonly (MemoryRef | undefined)[]): number[] {
  const runs: number[] = [];
  memory.forEach((ref, index) => {
    const before = memory[index - 1];
    if (before && ref && touches(before, ref)) runs[runs.length - 1]!++;
    else runs.push(1);
  });
  return runs;
}

/** Runs over all tensors as runs over those that are taken; one that is left out divides its run. */
export function runsOfTaken(runs: readonly number[], taken: readonly boolean[]): number[] {
  const result: number[] = [];
  let index = 0;
  for (const run of runs) {
    let joined = false;
    for (let i = 0; i < run; i++, index++) {
      if (!taken[index]) joined = false;
      else if (joined) result[result.length - 1]!++;
      else {
        result.push(1);
        joined = true;
      }
    }
  }
  return result;
}

/**
 * The regions of `memory` between the ends of all `runs`; `alone`: tensors that are regions of their own. Throws INTERNAL where tensors
 * of one region do not touch.
 */
export function regionsOf(
  memory: readonly MemoryRef[],
  runs: readonly (readonly number[])[],
  alone: readonly boolean[] = [],
): MemoryRef[] {
  const cuts = new Set<number>([0]);
  for (const list of runs) {
    let at = 0;
    for (const run of list) {
      at += run;
      cuts.add(at);
    }
  }
  alone.forEach((is, index) => {
    if (is) cuts.add(index).add(index + 1);
  });
  const regions: MemoryRef[] = [];
  let first = 0;
  memory.forEach((ref, index) => {
    const before = memory[index - 1];
    if (index > first && before && !cuts.has(index)) {
      if (!touches(before, ref))
        throw new PdError('INTERNAL', 'tensors that do not touch cannot be one region');
      return;
    }
    if (index > 0) regions.push(joined(memory, first, index));
    first = index;
  });
  if (memory.length > 0) regions.push(joined(memory, first, memory.length));
  return regions;
}

function joined(memory: readonly MemoryRef[], from: number, to: number): MemoryRef {
  let bytes = 0;
  for (let index = from; index < to; index++) bytes += memory[index]!.bytes;
  return { ...memory[from]!, bytes };
}

function touches(a: MemoryRef, b: MemoryRef): boolean {
  if (a.kind === 'host') return b.kind === 'host' && a.buffer === b.buffer && a.offset + a.bytes === b.offset;
  if (a.kind === 'cuda' && (b.kind !== 'cuda' || b.device !== a.device)) return false;
  return b.kind === a.kind && (a.pointer as bigint) + BigInt(a.bytes) === b.pointer;
}
