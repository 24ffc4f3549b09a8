/**
 * Long work of the HTTP thread in short turns, between which other requests get theirs: the size of an answer is bounded by the model's
 * context and the completions asked for, not by what a turn may take.
 */
import { setImmediate } from 'node:timers/promises';

/** Well under the time between two tokens of a stream. */
const TURN_MS = 5;

/** Elements of an array that are written at once. */
const SLICE = 4_096;

/** To be awaited between pieces of work: lets the event loop run once a turn is over. */
export type Turn = () => Promise<void> | undefined;

export function turns(): Turn {
  let over = performance.now() + TURN_MS;
  return () => {
    if (performance.now() < over) return undefined;
    return setImmediate().then(() => {
      over = performance.now() + TURN_MS;
    });
  };
}

/** What JSON.stringify makes of plain data. */
export async function jsonInTurns(value: unknown, turn: Turn = turns()): Promise<string> {
  if (isFlat(value)) return await flatJson(value, turn);
  const parts: string[] = [];
  if (Array.isArray(value)) {
    for (const one of value) parts.push(await jsonInTurns(one, turn));
    return `[${parts.join(',')}]`;
  }
  for (const [key, one] of Object.entries(value as object)) {
    if (one !== undefined) parts.push(`${JSON.stringify(key)}:${await jsonInTurns(one, turn)}`);
  }
  return `{${parts.join(',')}}`;
}

/** Nothing within that has parts itself. */
function isFlat(value: unknown): boolean {
  if (typeof value !== 'object' || value === null) return true;
  return Object.values(value).every((one) => typeof one !== 'object' || one === null);
}

async function flatJson(value: unknown, turn: Turn): Promise<string> {
  await turn();
  if (!Array.isArray(value) || value.length <= SLICE) return JSON.stringify(value);
  const parts: string[] = [];
  for (let i = 0; i < value.length; i += SLICE) {
    parts.push(JSON.stringify(value.slice(i, i + SLICE)).slice(1, -1));
    await turn();
  }
  return `[${parts.join(',')}]`;
}
