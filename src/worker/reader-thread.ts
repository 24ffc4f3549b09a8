/** The reader thread's entry: `ReaderInit` in, one body after another, each answered. Its owner (request-reader.ts) ends it. */
import { parentPort, workerData } from 'node:worker_threads';
import { PdError } from '../errors.ts';
import type { FromReader, ReaderInit, ToReader } from './request-reader.ts';
import { loadTextModel } from './server/model-text.ts';
import { type Readings, type Route, readBody } from './server/reading.ts';

if (!parentPort) throw new PdError('INTERNAL', 'the reader thread was started as a program');
const port = parentPort;

try {
  const { modelDir } = workerData as ReaderInit;
  const model = await loadTextModel(modelDir);
  port.on('message', ({ served, route, body }: ToReader) => {
    try {
      const reading = readBody(served, model, route, body);
      post({ type: 'read', reading }, buffersOf(reading));
    } catch (error) {
      post({ type: 'refused', error: PdError.from(error).toData() });
    }
  });
  post({ type: 'ready' });
} catch (error) {
  post({ type: 'failed', error: PdError.from(error).toData() });
}

function post(message: FromReader, transfer: readonly ArrayBuffer[] = []): void {
  port.postMessage(message, transfer);
}

/** They move to the other thread instead of being copied. */
function buffersOf(reading: Readings[Route]): ArrayBuffer[] {
  if (reading instanceof Uint8Array) return [reading.buffer];
  return reading.asked.prompts.map(({ tokens }) => tokens.buffer);
}
