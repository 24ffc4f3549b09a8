/**
 * The books of KV kept for asking (GET): found by exactly its id, or by a peer that is not ours under that id with a random suffix; evicted
 * oldest first when room is short, but never while it is being sent. Pure.
 */
import type { Dtype } from '../../wire/dtype.ts';
import { splitTensorId, type TensorId, type TransferId, tensorIdOf, withoutSuffix } from '../../wire/ids.ts';
import type { Held } from '../kv-memory.ts';
import type { DenseBlocks } from './form.ts';

export interface KeptTensor {
  readonly tensorId: TensorId;
  readonly requestId: string;
  readonly layerName: string;
  readonly shape: readonly number[];
  readonly dtype: Dtype;
  /** Where it was gathered from blocks: how its tokens lie. */
  readonly dense?: DenseBlocks | undefined;
  /** Of the prompt, where whoever keeps it has told it. */
  readonly promptDigest?: string | undefined;
  readonly held: Held;
  readonly since: number;
  /** Sends under way. */
  readonly sending: number;
  /** Out of the books; its memory goes when the last send is over. */
  readonly gone: boolean;
}

type Mutable = { -readonly [K in keyof KeptTensor]: KeptTensor[K] };

export type Lookup =
  | { readonly kind: 'found'; readonly tensor: KeptTensor }
  | { readonly kind: 'absent' }
  /** It has been asked for under another suffix before: nobody can say which of the two is meant. */
  | { readonly kind: 'ambiguous'; readonly requestIds: readonly string[] };

/** Of one tensor, in an answer. */
const MOST_NEAR_MISSES = 3;

export class SendStore {
  /** Oldest first. */
  readonly #byTensor = new Map<TensorId, Mutable>();
  /** By the id of their request. */
  readonly #byRequest = new Map<string, Set<Mutable>>();
  /** Ids that look like one another, for messages: to those of the same text but for what may be a suffix. */
  readonly #byLook = new Map<string, Set<Mutable>>();
  /** Under which id a peer that is not ours has asked for a request. */
  readonly #askedAs = new Map<string, string>();
  #count = 0;

  /** Tensors that hold memory. */
  get size(): number {
    return this.#count;
  }

  /** A tensor of the same id takes the place of the one before. */
  keep(
    {
      tensorId,
      shape,
      dtype,
      dense,
      promptDigest,
    }: Pick<KeptTensor, 'tensorId' | 'shape' | 'dtype' | 'dense' | 'promptDigest'>,
    held: Held,
    since: number,
  ): KeptTensor {
    const before = this.#byTensor.get(tensorId);
    if (before) this.#remove(before);
    const kept: Mutable = {
      tensorId,
      shape,
      dtype,
      dense,
      promptDigest,
      ...splitTensorId(tensorId),
      held,
      since,
      sending: 0,
      gone: false,
    };
    this.#byTensor.set(kept.tensorId, kept);
    enter(this.#byRequest, kept.requestId, kept);
    enter(this.#byLook, lookOf(kept.requestId), kept);
    this.#count++;
    return kept;
  }

  /** `standsFor`: the request that a peer which is not ours may mean beside that of exactly the id it asks for. */
  lookup(tensorId: TensorId, standsFor?: TransferId): Lookup {
    const exact = this.#byTensor.get(tensorId);
    if (exact) return { kind: 'found', tensor: exact };
    if (standsFor === undefined) return { kind: 'absent' };
    const { requestId, layerName } = splitTensorId(tensorId);
    const tensor = this.#byTensor.get(tensorIdOf(standsFor, layerName));
    if (!tensor) return { kind: 'absent' };
    const asked = this.#askedAs.get(standsFor) ?? requestId;
    if (asked !== requestId) return { kind: 'ambiguous', requestIds: [asked, requestId] };
    this.#askedAs.set(standsFor, requestId);
    return { kind: 'found', tensor };
  }

  /** Tensors of the same layer under an id that looks like this one: what came instead. */
  nearMisses(tensorId: TensorId): TensorId[] {
    const { requestId, layerName } = splitTensorId(tensorId);
    return [...(this.#byLook.get(lookOf(requestId)) ?? [])]
      .filter((kept) => kept.layerName === layerName && kept.tensorId !== tensorId)
      .slice(0, MOST_NEAR_MISSES)
      .map((kept) => kept.tensorId);
  }

  beginSend(tensor: KeptTensor): void {
    mutable(tensor).sending++;
  }

  /** `leave`: it has been fetched and nobody will ask again. */
  endSend(tensor: KeptTensor, leave: boolean): void {
    mutable(tensor).sending--;
    if (tensor.gone) this.#freeUnsent(mutable(tensor));
    else if (leave) this.#remove(mutable(tensor));
  }

  /** Evicts the oldest that is not being sent. */
  evict(): KeptTensor | undefined {
    for (const kept of this.#byTensor.values()) {
      if (kept.sending > 0) continue;
      this.#remove(kept);
      return kept;
    }
    return undefined;
  }

  /** A request is over: the number of its tensors that left. */
  finish(id: string): number {
    const mine = [...(this.#byRequest.get(id) ?? [])];
    for (const kept of mine) this.#remove(kept);
    return mine.length;
  }

  /** Frees what nobody has asked for since `before`. */
  freeOrphans(before: number): KeptTensor[] {
    const orphans: KeptTensor[] = [];
    for (const kept of this.#byTensor.values()) {
      if (kept.since >= before) break;
      if (kept.sending > 0) continue;
      this.#remove(kept);
      orphans.push(kept);
    }
    return orphans;
  }

  /** What is wrong, in words. */
  checkIntegrity(): string[] {
    const wrong: string[] = [];
    for (const index of [this.#byRequest, this.#byLook]) {
      const indexed = [...index.values()].reduce((sum, set) => sum + set.size, 0);
      if (indexed !== this.#byTensor.size) wrong.push(`${this.#byTensor.size} kept, ${indexed} indexed`);
    }
    for (const id of this.#askedAs.keys()) {
      if (!this.#byRequest.has(id)) wrong.push(`${id} is remembered as asked for and not kept`);
    }
    for (const kept of this.#byTensor.values()) {
      if (kept.gone) wrong.push(`${kept.tensorId} is gone and still listed`);
    }
    if (this.#byTensor.size > this.#count) wrong.push(`${this.#byTensor.size} kept, ${this.#count} counted`);
    return wrong;
  }

  #remove(kept: Mutable): void {
    if (kept.gone) return;
    kept.gone = true;
    this.#byTensor.delete(kept.tensorId);
    leave(this.#byRequest, kept.requestId, kept);
    leave(this.#byLook, lookOf(kept.requestId), kept);
    if (!this.#byRequest.has(kept.requestId)) this.#askedAs.delete(kept.requestId);
    this.#freeUnsent(kept);
  }

  #freeUnsent(kept: Mutable): void {
    if (kept.sending > 0) return;
    this.#count--;
    kept.held.free();
  }
}

function lookOf(requestId: string): string {
  return withoutSuffix(requestId) ?? requestId;
}

function enter(index: Map<string, Set<Mutable>>, key: string, kept: Mutable): void {
  const set = index.get(key);
  if (set) set.add(kept);
  else index.set(key, new Set([kept]));
}

function leave(index: Map<string, Set<Mutable>>, key: string, kept: Mutable): void {
  const set = index.get(key);
  set?.delete(kept);
  if (set?.size === 0) index.delete(key);
}

function mutable(tensor: KeptTensor): Mutable {
  return tensor as Mutable;
}
