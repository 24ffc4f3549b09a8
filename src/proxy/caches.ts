/**
 * What this proxy thinks each instance has cached. Of one that says what it has (kv-feeds.ts), exactly that, and what it is about to have
 * computed, where the prompt's token ids are known; of all others, and else, by the text of the prompts that it was sent.
 */
import type { ProxyConfig } from '../config/proxy-config.ts';
import type { Logger } from '../observability/log.ts';
import type { BlockKey } from '../wire/kv-events.ts';
import { NO_KEYS, type PromptFacts, type WantedKeys } from './body.ts';
import { KvFeeds } from './kv-feeds.ts';
import type { ProxyMetrics } from './metrics.ts';
import { PrefixIndex } from './prefix-index.ts';
import { type Instance, instanceLabel, type RegistryChange } from './registry.ts';
import { TextIndex } from './text-index.ts';

/** Of the texts of one instance, tokens, where it does not tell how large its cache is. */
const MOST_TEXT_TOKENS = 2 ** 19;
/** Tokens of a block, where it is not told. */
const USUAL_BLOCK = 16;
/** Blocks of one instance, whatever it tells. */
const MOST_BLOCKS = 2 ** 20;

/** An instance as a prompt meets it. */
interface Known {
  readonly instance: Instance;
  /** Blocks of prompts that are under way there, by how many of these have them. */
  readonly coming: Map<BlockKey, number>;
}

/** Close it. */
export class PromptCaches {
  readonly #texts = new TextIndex();
  readonly #blocks = new PrefixIndex();
  readonly #known = new Map<string, Known>();
  readonly #log: Logger;
  /** Absent where nobody goes by what is cached. */
  readonly #feeds: KvFeeds | undefined;
  /** Also of a vLLM worker. */
  readonly #always: boolean;
  /** Digest of this proxy's own tokenizer, if it has one. */
  readonly #tokenizer: string | undefined;
  /** As long as no instance comes or goes and no block size is news. */
  #wanted: WantedKeys | undefined;

  constructor(
    { policy, prefillPolicy = policy, decodePolicy = policy }: ProxyConfig,
    log: Logger,
    metrics: Pick<ProxyMetrics, 'feedsLost'>,
    tokenizer?: string,
  ) {
    this.#log = log;
    this.#tokenizer = tokenizer;
    const policies = [prefillPolicy, decodePolicy];
    this.#always = policies.includes('kv-aware');
    if (!this.#always && !policies.includes('auto')) return;
    this.#feeds = new KvFeeds(
      log,
      (instance) => this.#blocksOf(instance),
      (reason) => metrics.feedsLost.inc({ reason }),
    );
  }

  /** What is to be known of a prompt. */
  get wanted(): WantedKeys {
    const { blockSizes } = this.#feeds ?? NO_KEYS;
    if (this.#wanted?.blockSizes === blockSizes) return this.#wanted;
    const instances = [...this.#known.values()].map(({ instance }) => instance);
    const ours = instances.some(({ fingerprint }) => fingerprint !== undefined);
    this.#wanted = {
      text: this.#feeds !== undefined && (this.#always || ours),
      blockSizes,
      // By whoever takes ids, or says what it has cached.
      ids: instances.some((instance) => this.#reads(instance) && (this.#feeds || instance.takesIds)),
    };
    return this.#wanted;
  }

  /** Blocks that instances have said they have. */
  get size(): number {
    return this.#blocks.size;
  }

  /** Of those, an instance's; undefined where it does not say. */
  blocksOf(address: string): number | undefined {
    return this.#feeds?.blockSizeOf(address) === undefined ? undefined : this.#blocks.sizeOf(address);
  }

  /** About how many tokens of the prompt, from the first. */
  cached(address: string, body: PromptFacts): number {
    const { textKeys, tokens } = body;
    const known = this.#known.get(address);
    const blockSize = this.#feeds?.blockSizeOf(address);
    const keys = known && blockSize !== undefined ? this.#keysFor(known.instance, body, blockSize) : [];
    if (known && blockSize !== undefined && keys.length > 0) {
      return this.#blocks.leading(address, keys, known.coming) * blockSize;
    }
    return Math.min(tokens, this.#texts.leading(address, textKeys));
  }

  /** It takes ids of a prompt's tokens, and would make the same. */
  takesIds(instance: Instance): boolean {
    return Boolean(instance.takesIds) && this.#reads(instance);
  }

  /** The prompt has been sent there, and will be cached once it has been computed. Returns what is to be called once it has, or will not. */
  sent({ httpAddress, load }: Instance, body: PromptFacts): () => void {
    const { textKeys } = body;
    if (textKeys.length > 0) {
      const most = load ? load.kvBlocks * USUAL_BLOCK : MOST_TEXT_TOKENS;
      this.#texts.use(httpAddress, textKeys, Math.min(most, MOST_TEXT_TOKENS));
    }
    const known = this.#known.get(httpAddress);
    const blockSize = this.#feeds?.blockSizeOf(httpAddress);
    if (!known || blockSize === undefined) return () => {};
    const { coming } = known;
    const keys = this.#keysFor(known.instance, body, blockSize);
    for (const key of keys) coming.set(key, (coming.get(key) ?? 0) + 1);
    return () => {
      for (const key of keys) {
        const left = coming.get(key)! - 1;
        if (left > 0) coming.set(key, left);
        else coming.delete(key);
      }
    };
  }

  changed({ kind, instance }: RegistryChange): void {
    const { httpAddress, tokenizer } = instance;
    this.#wanted = undefined;
    this.#feeds?.remove(httpAddress);
    this.#texts.forget(httpAddress);
    this.#blocks.forget(httpAddress);
    this.#known.delete(httpAddress);
    if (kind !== 'added') return;
    this.#known.set(httpAddress, { instance, coming: new Map() });
    this.#feeds?.add(instance);
    if (this.#tokenizer === undefined || tokenizer === undefined || this.#reads(instance)) return;
    const why = 'tokenizes by something else than --tokenizer: its prompts are placed by their text';
    this.#log.warn({ tokenizer, own: this.#tokenizer }, `${instanceLabel(instance)} ${why}`);
  }

  close(): void {
    this.#feeds?.close();
  }

  /** Ids that are made here are those that it would make. */
  #reads({ tokenizer }: Instance): boolean {
    return tokenizer !== undefined && tokenizer === this.#tokenizer;
  }

  /** None where the ids are not those that the instance would make. */
  #keysFor(
    instance: Instance,
    { tokenized, blockKeys }: PromptFacts,
    blockSize: number,
  ): readonly BlockKey[] {
    if (tokenized && !this.#reads(instance)) return [];
    return blockKeys.get(blockSize) ?? [];
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
