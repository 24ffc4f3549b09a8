/** The reader thread's entry: `ReaderInit` in, one body after another, each answered. Its owner (request-body-reader.ts) ends it. */
import { workerData } from 'node:worker_threads';
import { Tokenizer } from '../model/tokenizer.ts';
import { answerReadings } from '../reading-thread.ts';
import { GrammarCompiler } from './grammar-compiler.ts';
import {
  type ReaderInit,
  type Readings,
  type Route,
  readRequestBody,
  type ToReader,
  withGrammar,
} from './request-body-reader.ts';

await answerReadings(async () => {
  const { modelDir } = workerData as ReaderInit;
  const model = await Tokenizer.load(modelDir);
  const grammars = new GrammarCompiler(model);
  return ({ served, route, body }: ToReader) =>
    withGrammar(readRequestBody(served, model, route, body), grammars, served);
}, buffersOf);

function buffersOf(reading: Readings[Route]): readonly ArrayBuffer[] {
  if (reading instanceof Uint8Array) return [reading.buffer];
  return reading.asked.prompts.map(({ tokens }) => tokens.buffer);
}
