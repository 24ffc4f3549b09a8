/**
 * Parts of masks that a grammar will need soon, found where it is built rather than where streams wait for its masks: those of the states of its
 * tables that are nearest to the start. Bounded in time and memory; what is left out is found when it is needed, and is the same.
 */
import { PdError } from '../errors.ts';
import type { CompiledGrammar } from './compile.ts';
import { MaskParts, type PartsAhead } from './mask-parts.ts';
import { GrammarStates } from './states.ts';
import type { MaskPart, Vocabulary } from './vocabulary.ts';

/** A state takes well below a tenth of a millisecond, a few take milliseconds. */
const MOST_MS = 100;
const MOST_BYTES = 2 ** 20;

/** `now` in milliseconds. */
export function partsAhead(tables: CompiledGrammar, vocabulary: Vocabulary, now: () => number): PartsAhead {
  const { numStates, start, edgeStart, edgeTo, callStart, callTarget, callReturn } = tables;
  const states = new GrammarStates(tables);
  const parts = new MaskParts(tables, states, vocabulary, undefined);
  const rows = new Int32Array(numStates).fill(-1);
  const [tokenStart, tokens, exitStart, exits]: [number[], number[], number[], number[]] = [[0], [], [0], []];
  const large: [number, MaskPart][] = [];
  const until = now() + MOST_MS;
  const near = new Set([start]);
  let bytes = 0;
  let depth = 0;
  for (const state of near) {
    if (now() >= until) break;
    for (let edge = edgeStart[state]!; edge < edgeStart[state + 1]!; edge++) near.add(edgeTo[edge]!);
    for (let call = callStart[state]!; call < callStart[state + 1]!; call++) {
      near.add(callTarget[call]!).add(callReturn[call]!);
    }
    if (edgeStart[state] === edgeStart[state + 1]) continue;
    states.begin();
    const part = unlessAmbiguous(() => parts.first(state));
    if (!part) continue;
    if (bytes + bytesOf(part) > MOST_BYTES) continue;
    bytes += bytesOf(part);
    if (part.tokens instanceof Uint32Array || part.byCount || part.exitAt) {
      large.push([state, part]);
      continue;
    }
    rows[state] = tokenStart.length - 1;
    depth = Math.max(depth, part.depth);
    for (const token of part.tokens) tokens.push(token);
    for (const exit of part.exits) exits.push(exit);
    tokenStart.push(tokens.length);
    exitStart.push(exits.length);
  }
  return {
    rows,
    tokenStart: Int32Array.from(tokenStart),
    tokens: Int32Array.from(tokens),
    exitStart: Int32Array.from(exitStart),
    exits: Int32Array.from(exits),
    large,
    depth,
  };
}

/** Parts that many grammars have, by the shape of their rule: all that these have. */
export function commonParts(
  grammars: readonly CompiledGrammar[],
  vocabulary: Vocabulary,
): (readonly [shape: string, part: MaskPart])[] {
  const common = new Map<string, MaskPart>();
  for (const tables of grammars) {
    const { numStates, edgeStart } = tables;
    const parts = new MaskParts(tables, new GrammarStates(tables), vocabulary, undefined);
    for (let state = 0; state < numStates; state++) {
      const key = parts.shapeKey(state);
      if (key === undefined || common.has(key) || edgeStart[state] === edgeStart[state + 1]) continue;
      const part = parts.first(state);
      if (part) common.set(key, part);
    }
  }
  return [...common];
}

/** Too ambiguous a grammar fails where its masks are asked for. */
function unlessAmbiguous(find: () => MaskPart | undefined): MaskPart | undefined {
  try {
    return find();
  } catch (error) {
    if (error instanceof PdError && error.code === 'REQUEST_INVALID') return undefined;
    throw error;
  }
}

function bytesOf({ tokens, exits, exitAt, exitCounts, byCount }: MaskPart): number {
  const arrays = [tokens, exits, exitAt, exitCounts, byCount?.tokens, byCount?.counts];
  return arrays.reduce((sum, array) => sum + (array?.byteLength ?? 0), 0);
}
