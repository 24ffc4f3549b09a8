/** The entry of the proxy's reader thread: one body after another, each answered. Its owner (body-reader.ts) ends it. */
import { answerReadings } from '../reading-thread.ts';
import { type RequestBody, readBody } from './body.ts';
import type { ToBodyThread } from './body-reader.ts';

const read = ({ body, wanted }: ToBodyThread) => readBody(body, wanted);
await answerReadings(() => read, buffersOf);

function buffersOf({ original, prefill, nativePrefill }: RequestBody): readonly ArrayBuffer[] {
  return [...new Set([original.buffer, prefill.buffer, nativePrefill.buffer])];
}
