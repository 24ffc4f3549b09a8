/** The entry of the proxy's reader thread: one body after another, each answered. Its owner (body.ts) ends it. */
import { workerData } from 'node:worker_threads';
import { answerReadings } from '../reading-thread.ts';
import { type BodyThreadInit, type RequestBody, readBody, type ToBodyThread } from './body.ts';

await answerReadings(async () => {
  const { tokenizer } = workerData as BodyThreadInit;
  // What reads prompts is a good part of a worker: only where it is asked for.
  const prompts =
    tokenizer === undefined
      ? undefined
      : await (await import('./prompt-reader.ts')).PromptReader.load(tokenizer);
  return ({ body, wanted, tokenize: path }: ToBodyThread) => {
    if (!prompts || path === undefined) return readBody(body, wanted);
    return readBody(body, wanted, (model) => prompts.idsOf(path, body, model));
  };
}, buffersOf);

function buffersOf({ original, prefill, nativePrefill, ids }: RequestBody): readonly ArrayBuffer[] {
  const buffers = [original.buffer, prefill.buffer, nativePrefill.buffer];
  return [...new Set(ids ? [...buffers, ids.buffer] : buffers)];
}
