/** From a client's body to the ids of its prompt, by the very code that workers read it with. On the proxy's reader thread alone. */
import { type TextModel, Tokenizer } from '../model/tokenizer.ts';
import { dialectOf } from '../parsing/calls.ts';
import { type Route, readRequestBody } from '../worker/request-body-reader.ts';
import { GENERATION_ROUTES } from '../worker/server/in-flight.ts';

/** Paths whose bodies have a prompt. */
const ROUTES: Readonly<Record<string, Route>> = GENERATION_ROUTES;

export class PromptReader {
  readonly #model: TextModel;

  private constructor(model: TextModel) {
    this.#model = model;
  }

  /** Throws CHECKPOINT_INVALID or MODEL_UNSUPPORTED. */
  static async load(dir: string): Promise<PromptReader> {
    return new PromptReader(await Tokenizer.load(dir));
  }

  /** Undefined where the body is one that workers refuse: they say why. `model`: the one it asks for. */
  idsOf(path: string, body: Uint8Array, model: string | undefined): Uint32Array<ArrayBuffer> | undefined {
    const route = ROUTES[path];
    if (!route) return undefined;
    // What else a worker checks is its own: names, context and vocabulary.
    const served = {
      modelNames: [model ?? ''],
      maxModelLen: Number.POSITIVE_INFINITY,
      vocabSize: Number.POSITIVE_INFINITY,
      calls: dialectOf(this.#model.chatTemplate ?? '') ?? ('hermes' as const),
    };
    try {
      const reading = readRequestBody(served, this.#model, route, body);
      if (reading instanceof Uint8Array || reading.asked.prompts.length !== 1) return undefined;
      return Uint32Array.from(reading.asked.prompts[0]!.tokens);
    } catch {
      return undefined;
    }
  }
}
