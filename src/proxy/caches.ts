/** What this proxy thinks each instance has cached: by the text of the prompts that it has sent there. Pure. */
import type { RequestBody } from './body.ts';
import { PrefixIndex, TEXT_CHUNK } from './prefix-index.ts';
import type { Instance } from './registry.ts';

const CHARACTERS_PER_TOKEN = 4;
const TOKENS_PER_KEY = TEXT_CHUNK / CHARACTERS_PER_TOKEN;
/** Of one instance, where it does not tell how large its cache is. */
const MOST_KEYS = 16_384;
/** Tokens of a block, where it is not told. */
const USUAL_BLOCK = 16;

export class PromptCaches {
  readonly #texts = new PrefixIndex();

  /** About how many tokens of the prompt, from the first. */
  cached(address: string, { textKeys, tokens }: RequestBody): number {
    return Math.min(tokens, this.#texts.leading(address, textKeys) * TOKENS_PER_KEY);
  }

  /** The prompt has been sent there, and will be cached once it has been computed. */
  sent({ httpAddress, load }: Instance, { textKeys }: RequestBody): void {
    if (textKeys.length === 0) return;
    const most = load ? Math.floor((load.kvBlocks * USUAL_BLOCK) / TOKENS_PER_KEY) : MOST_KEYS;
    this.#texts.add(httpAddress, textKeys, Math.min(most, MOST_KEYS));
  }

  forget(address: string): void {
    this.#texts.forget(address);
  }
}
