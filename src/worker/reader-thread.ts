/** The reader thread's entry: `ReaderInit` in, one body after another, each answered. Its owner (request-reader.ts) ends it. */
import { workerData } from 'node:worker_threads';
import { answerReadings } from '../reading-thread.ts';
import type { ReaderInit, ToReader } from './request-reader.ts';
import { loadTextModel } from './server/model-text.ts';
import { type Readings, type Route, readBody } from './server/reading.ts';

await answerReadings(async () => {
  const { modelDir } = workerData as ReaderInit;
  const model = await loadTextModel(modelDir);
  return ({ served, route, body }: ToReader) => readBody(served, model, route, body);
}, buffersOf);

function buffersOf(reading: Readings[Route]): readonly ArrayBuffer[] {
  if (reading instanceof Uint8Array) return [reading.buffer];
  return reading.asked.prompts.map(({ tokens }) => tokens.buffer);
}
