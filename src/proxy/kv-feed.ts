/**
 * One worker's cache as its events tell. Pure: batches and snapshots come in, and what is to be asked for goes out.
 *
 *   asking --(snapshot, and the batches after it)--> following --(a sequence that is not the next)--> asking
 *
 * While it asks, batches are kept for after the snapshot; what the worker was known to have meanwhile stays, as a hint like any other. A
 * worker that has restarted begins anew at 0, which is not the next either.
 */
import type { BlockKey, KvEvent, KvEventBatch, KvSnapshot } from '../wire/kv-events.ts';

/** Batches that are kept while a snapshot is on its way, and keys in them. */
const MOST_KEPT = 256;
const MOST_KEPT_KEYS = 2 ** 16;

/** Where the feed writes what the worker has. */
export interface CachedBlocks {
  replace(keys: readonly BlockKey[]): void;
  insert(keys: readonly BlockKey[]): void;
  remove(keys: readonly BlockKey[]): void;
}

export class KvFeed {
  readonly #blocks: CachedBlocks;
  /** Of the last batch that is in `#blocks`; undefined: a snapshot is needed. */
  #sequence: number | undefined;
  #kept: { readonly sequence: number; readonly batch: KvEventBatch; readonly keys: number }[] = [];
  /** In `#kept`. */
  #keys = 0;
  /** Tokens per block, once it is known. */
  blockSize: number | undefined;

  constructor(blocks: CachedBlocks) {
    this.#blocks = blocks;
  }

  get following(): boolean {
    return this.#sequence !== undefined;
  }

  /** The connection is new, or was lost: what was published meanwhile may be missing. A snapshot has to be asked for. */
  restart(): void {
    this.#sequence = undefined;
    // Published before the question, it will be in the answer.
    this.#takeKept();
  }

  /** True where a snapshot has to be asked for. */
  batch(sequence: number, batch: KvEventBatch): boolean {
    if (this.#sequence !== undefined && sequence === this.#sequence + 1) {
      this.#apply(sequence, batch);
      return false;
    }
    const lost = this.#sequence !== undefined;
    this.#sequence = undefined;
    this.#keep(sequence, batch);
    return lost;
  }

  /** True where another has to be asked for: between it and the batches that have come since, some are missing. */
  snapshot({ sequence, blockSize, keys }: KvSnapshot): boolean {
    this.blockSize = blockSize;
    this.#blocks.replace(keys);
    this.#sequence = sequence;
    const kept = this.#takeKept().filter((one) => one.sequence > sequence);
    for (const one of kept) {
      if (!this.batch(one.sequence, one.batch)) continue;
      this.restart();
      return true;
    }
    return false;
  }

  /** The oldest go where there are too many: they will be missing, and another snapshot has to be asked for. */
  #keep(sequence: number, { time, events }: KvEventBatch): void {
    // Tokens are most of a batch, and of no use here.
    const bare = events.map((event) => (event.type === 'stored' ? { ...event, tokens: [] } : event));
    const keys = bare.reduce((sum, event) => sum + (event.type === 'cleared' ? 1 : event.keys.length), 0);
    this.#kept.push({ sequence, batch: { time, events: bare }, keys });
    this.#keys += keys;
    while (this.#kept.length > MOST_KEPT || this.#keys > MOST_KEPT_KEYS) {
      this.#keys -= this.#kept.shift()!.keys;
    }
  }

  #takeKept() {
    const kept = this.#kept;
    this.#kept = [];
    this.#keys = 0;
    return kept;
  }

  #apply(sequence: number, { events }: KvEventBatch): void {
    for (const event of events) this.#take(event);
    this.#sequence = sequence;
  }

  #take(event: KvEvent): void {
    switch (event.type) {
      case 'stored':
        this.blockSize = event.blockSize;
        this.#blocks.insert(event.keys);
        return;
      case 'removed':
        this.#blocks.remove(event.keys);
        return;
      case 'cleared':
        this.#blocks.replace([]);
        return;
    }
  }
}
