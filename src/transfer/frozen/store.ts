/**
 * The books of received KV: which tensors are held, and for whom. Pure; the memory itself is behind `Held`.
 *
 *   announced --> receiving --> ready --> claimed --> (freed)
 *                    |            |          by a load until it is in the cache, by a caller until `finish`
 *                    |            +--> freed at finish, or as an orphan
 *                    +--> dropped: its request is over, but what was answered `0` is received all the same, then freed
 */
import type { Dtype } from '../../wire/dtype.ts';
import { splitTensorId, type TensorId, type TransferId, withoutSuffix } from '../../wire/ids.ts';
import type { Held } from '../kv-memory.ts';

interface Prompted {
  readonly promptDigest?: string | undefined;
}

/** Both know of which prompt they are, and it is not the same one. */
export function contradicts(a: Prompted, b: Prompted): boolean {
  return a.promptDigest !== undefined && b.promptDigest !== undefined && a.promptDigest !== b.promptDigest;
}

export interface TensorInfo {
  readonly tensorId: TensorId;
  readonly shape: readonly number[];
  readonly dtype: Dtype;
  /** Routing id of the sender. */
  readonly peer: string;
  /** What two blocks of either family are; undefined: as in our own cache. */
  readonly twoBlocks?: 'kv-first' | 'blocks-first' | undefined;
  /** Of a peer that is not ours: the request of ours that it may mean beside that of exactly its id. */
  readonly standsFor?: TransferId | undefined;
  /** Of the prompt, where its sender has told it. */
  readonly promptDigest?: string | undefined;
}

export type EntryState = 'receiving' | 'ready' | 'claimed' | 'owned' | 'dropped' | 'freed';

export interface StoreEntry extends TensorInfo {
  readonly requestId: string;
  readonly layerName: string;
  readonly held: Held;
  /** When it was announced; the clock of the engine. */
  readonly since: number;
  readonly state: EntryState;
}

type Mutable = { -readonly [K in keyof StoreEntry]: StoreEntry[K] };

/** Requests that one message names. */
const MOST_NEAR_MISSES = 5;

export class ReceiveStore {
  readonly #byTensor = new Map<TensorId, Mutable>();
  /** The id of a request to the entries that it may mean, in order of announcement. */
  readonly #byId = new Map<string, Set<Mutable>>();
  /** Every entry that holds memory, dropped ones too, oldest first. */
  readonly #all = new Set<Mutable>();

  get size(): number {
    return this.#all.size;
  }

  get(tensorId: TensorId): StoreEntry | undefined {
    return this.#byTensor.get(tensorId);
  }

  /**
   * Enters an announced tensor. `dropped`: its request is over, it is only received. `claimed`: it is somebody's already (a GET's), and
   * nobody else may find it.
   */
  open(
    tensor: TensorInfo,
    held: Held,
    since: number,
    state: 'receiving' | 'dropped' | 'claimed' = 'receiving',
  ): StoreEntry {
    const { requestId, layerName } = splitTensorId(tensor.tensorId);
    const entry: Mutable = {
      // Field by field: a spread costs microseconds, and this runs for every tensor.
      tensorId: tensor.tensorId,
      shape: tensor.shape,
      dtype: tensor.dtype,
      peer: tensor.peer,
      twoBlocks: tensor.twoBlocks,
      standsFor: tensor.standsFor,
      promptDigest: tensor.promptDigest,
      requestId,
      layerName,
      held,
      since,
      state,
    };
    this.#all.add(entry);
    if (state === 'receiving') this.#index(entry);
    return entry;
  }

  /** Its bytes have come. False where it has been dropped meanwhile: it is freed now. */
  arrived(entry: StoreEntry): boolean {
    if (entry.state === 'dropped') {
      this.release(entry);
      return false;
    }
    mutable(entry).state = 'ready';
    return true;
  }

  /** Nobody may find what is on its way; it is freed when it has come. */
  drop(entry: StoreEntry): void {
    this.#unindex(mutable(entry));
    mutable(entry).state = 'dropped';
  }

  /** For a load: it will be released when it is in the cache. For a caller (`owned`): at finish. */
  claim(entry: StoreEntry, as: 'claimed' | 'owned'): void {
    mutable(entry).state = as;
    // What a caller owns must be found when its request finishes.
    if (as === 'owned' && !this.#isIndexed(entry)) this.#index(mutable(entry));
  }

  /** Frees it. Idempotent. */
  release(entry: StoreEntry): void {
    if (entry.state === 'freed') return;
    mutable(entry).state = 'freed';
    this.#unindex(mutable(entry));
    this.#all.delete(mutable(entry));
    entry.held.free();
  }

  /** Tensors whose bytes are on their way from a peer. */
  receivingFrom(peer: string): number {
    let count = 0;
    for (const entry of this.#all) {
      const under = entry.state === 'receiving' || entry.state === 'dropped';
      if (under && entry.peer === peer) count++;
    }
    return count;
  }

  /** Entries that the request `id` may mean: of exactly that id, and of peers that are not ours with a random suffix. */
  find(id: string): StoreEntry[] {
    return [...(this.#byId.get(id) ?? [])];
  }

  /**
   * What a request that is over leaves: freed at once, or dropped when it has come. Tensors claimed by a load are the load's to free, those
   * of another prompt a later request's.
   */
  finish(id: string, promptDigest?: string): { freed: number; dropped: number } {
    let freed = 0;
    let dropped = 0;
    for (const entry of this.find(id)) {
      if (contradicts(entry, { promptDigest })) continue;
      if (entry.state === 'ready' || entry.state === 'owned') {
        this.release(entry);
        freed++;
      } else if (entry.state === 'receiving') {
        this.drop(entry);
        dropped++;
      }
    }
    return { freed, dropped };
  }

  /** Frees tensors that came before `before` and that nobody has claimed. */
  freeOrphans(before: number): StoreEntry[] {
    const orphans: StoreEntry[] = [];
    for (const entry of this.#all) {
      if (entry.since >= before) break;
      if (entry.state !== 'ready') continue;
      this.release(entry);
      orphans.push(entry);
    }
    return orphans;
  }

  /** What looks like `id`: perhaps the same request under another suffix. One tensor of each, for messages. */
  nearMisses(id: string): string[] {
    const stem = withoutSuffix(id) ?? id;
    const found = new Map<string, { readonly first: StoreEntry; count: number }>();
    for (const entry of this.#all) {
      // What a load has taken is not what came instead.
      if (entry.state !== 'ready' && entry.state !== 'receiving') continue;
      const known = found.get(entry.requestId);
      if (known) known.count++;
      else if (found.size < MOST_NEAR_MISSES && looksLike(entry.requestId, stem)) {
        found.set(entry.requestId, { first: entry, count: 1 });
      }
    }
    return [...found.values()].map(({ first, count }) => {
      const more = count > 1 ? ` and ${count - 1} more layers of it` : '';
      return `${first.tensorId} (${first.state})${more}`;
    });
  }

  /** What is wrong, in words. */
  checkIntegrity(): string[] {
    const wrong: string[] = [];
    for (const entry of this.#all) {
      const { tensorId, state } = entry;
      if (state === 'freed') wrong.push(`${tensorId} is freed and still counted`);
      // What a GET has brought for a load is in no index, what a PUT has is.
      if (state !== 'claimed' && this.#isIndexed(entry) === (state === 'dropped')) {
        wrong.push(`${tensorId} (${state}) is wrongly indexed`);
      }
    }
    for (const [id, entries] of this.#byId) {
      if (entries.size === 0) wrong.push(`empty set under ${id}`);
      for (const entry of entries) if (!this.#all.has(entry)) wrong.push(`${id} names a tensor that is gone`);
    }
    return wrong;
  }

  /** Others may find it by its ids. */
  #isIndexed(entry: StoreEntry): boolean {
    return this.#byId.get(entry.requestId)?.has(mutable(entry)) ?? false;
  }

  #index(entry: Mutable): void {
    this.#byTensor.set(entry.tensorId, entry);
    this.#enter(entry.requestId, entry);
    if (entry.standsFor !== undefined) this.#enter(entry.standsFor, entry);
  }

  #enter(id: string, entry: Mutable): void {
    const set = this.#byId.get(id);
    if (set) set.add(entry);
    else this.#byId.set(id, new Set([entry]));
  }

  #unindex(entry: Mutable): void {
    if (this.#byTensor.get(entry.tensorId) === entry) this.#byTensor.delete(entry.tensorId);
    for (const id of [entry.requestId, entry.standsFor]) {
      if (id === undefined) continue;
      const set = this.#byId.get(id);
      set?.delete(entry);
      if (set?.size === 0) this.#byId.delete(id);
    }
  }
}

function looksLike(requestId: string, stem: string): boolean {
  return requestId.startsWith(stem) || stem.startsWith(withoutSuffix(requestId) ?? requestId);
}

/** Only the store changes entries; to everyone else they are read-only. */
function mutable(entry: StoreEntry): Mutable {
  return entry as Mutable;
}
