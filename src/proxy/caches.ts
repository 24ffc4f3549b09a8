/**
 * What this proxy thinks each instance has cached. Of one that says what it has (kv-feeds.ts), exactly that, where the prompt's token ids
 * are known; of all others, and else, by the text of the prompts that it was sent.
 */
import type { ProxyConfig } from '../config/proxy-config.ts';
import type { Logger } from '../observability/log.ts';
import { NO_KEYS, type PromptFacts, type WantedKeys } from './body.ts';
import { KvFeeds } from './kv-feeds.ts';
import type { ProxyMetrics } from './metrics.ts';
import { PrefixIndex, TEXT_CHUNK } from './prefix-index.ts';
import type { Instance, RegistryChange } from './registry.ts';

const CHARACTERS_PER_TOKEN = 4;
const TOKENS_PER_KEY = TEXT_CHUNK / CHARACTERS_PER_TOKEN;
/** Texts of one instance, where it does not tell how large its cache is. */
const MOST_TEXTS = 16_384;
/** Tokens of a block, where it is not told. */
const USUAL_BLOCK = 16;
/** Blocks of one instance, whatever it tells. */
const MOST_BLOCKS = 2 ** 20;

/** Close it. */
export class PromptCaches {
  readonly #texts = new PrefixIndex();
  readonly #blocks = new PrefixIndex();
  /** Absent where nobody goes by what is cached. */
  readonly #feeds: KvFeeds | undefined;

  constructor(
    { policy, prefillPolicy = policy, decodePolicy = policy }: ProxyConfig,
    log: Logger,
    metrics: Pick<ProxyMetrics, 'feedsLost'>,
  ) {
    if (prefillPolicy !== 'kv-aware' && decodePolicy !== 'kv-aware') return;
    this.#feeds = new KvFeeds(
      log,
      (instance) => this.#blocksOf(instance),
      (reason) => metrics.feedsLost.inc({ reason }),
    );
  }

  /** What is to be known of a prompt. */
  get wanted(): WantedKeys {
    return this.#feeds ? { text: true, blockSizes: this.#feeds.blockSizes } : NO_KEYS;
  }

  /** Blocks that instances have said they have. */
  get size(): number {
    return this.#blocks.size;
  }

  /** About how many tokens of the prompt, from the first. */
  cached(address: string, { textKeys, blockKeys, tokens }: PromptFacts): number {
    const blockSize = this.#feeds?.blockSizeOf(address);
    const keys = blockSize === undefined ? undefined : blockKeys.get(blockSize);
    if (blockSize !== undefined && keys && keys.length > 0)
      return this.#blocks.leading(address, keys) * blockSize;
    return Math.min(tokens, this.#texts.leading(address, textKeys) * TOKENS_PER_KEY);
  }

  /** The prompt has been sent there, and will be cached once it has been computed. */
  sent({ httpAddress, load }: Instance, { textKeys }: PromptFacts): void {
    if (textKeys.length === 0) return;
    const most = load ? Math.floor((load.kvBlocks * USUAL_BLOCK) / TOKENS_PER_KEY) : MOST_TEXTS;
    this.#texts.use(httpAddress, textKeys, Math.min(most, MOST_TEXTS));
  }

  changed({ kind, instance }: RegistryChange): void {
    const { httpAddress } = instance;
    this.#feeds?.remove(httpAddress);
    this.#texts.forget(httpAddress);
    this.#blocks.forget(httpAddress);
    if (kind === 'added') this.#feeds?.add(instance);
  }

  close(): void {
    this.#feeds?.close();
  }

  #blocksOf({ httpAddress, load }: Instance) {
    const most = Math.min(load?.kvBlocks ?? MOST_BLOCKS, MOST_BLOCKS);
    return {
      replace: (keys: readonly string[]) => {
        this.#blocks.forget(httpAddress);
        this.#blocks.insert(httpAddress, keys, most);
      },
      insert: (keys: readonly string[]) => this.#blocks.insert(httpAddress, keys, most),
      remove: (keys: readonly string[]) => this.#blocks.remove(httpAddress, keys),
    };
  }
}
