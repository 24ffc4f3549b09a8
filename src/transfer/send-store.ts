/**
 * The books of KV kept for asking (GET): found by full id first, then by transfer id; evicted oldest first when room is short, but never
 * while it is being sent. Pure.
 */
import type { Dtype } from '../wire/dtype.ts';
import { splitTensorId, type TensorId, transferIdOf } from '../wire/ids.ts';
import type { DenseBlocks } from './form.ts';
import { belongsTo, type Held } from './store.ts';

export interface KeptTensor {
  readonly tensorId: TensorId;
  readonly requestId: string;
  readonly layerName: string;
  readonly shape: readonly number[];
  readonly dtype: Dtype;
  /** Where it was gathered from blocks: how its tokens lie. */
  readonly dense?: DenseBlocks | undefined;
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
  /** Several requests share the transfer id and none has the full id: nobody can say which is meant. */
  | { readonly kind: 'ambiguous'; readonly requestIds: readonly string[] };

export class SendStore {
  readonly #exactOnly: boolean;
  /** Oldest first. */
  readonly #byTensor = new Map<TensorId, Mutable>();
  readonly #byStem = new Map<string, Set<Mutable>>();
  #heldBytes = 0;
  #count = 0;

  /** `exactOnly`: a tensor is found by its full id alone, as in vLLM. */
  constructor({ exactOnly = false }: { readonly exactOnly?: boolean } = {}) {
    this.#exactOnly = exactOnly;
  }

  /** Bytes of all that is kept or still being sent. */
  get heldBytes(): number {
    return this.#heldBytes;
  }

  /** Tensors that hold memory. */
  get size(): number {
    return this.#count;
  }

  /** A tensor of the same id takes the place of the one before. */
  keep(
    { tensorId, shape, dtype, dense }: Pick<KeptTensor, 'tensorId' | 'shape' | 'dtype' | 'dense'>,
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
      ...splitTensorId(tensorId),
      held,
      since,
      sending: 0,
      gone: false,
    };
    this.#byTensor.set(kept.tensorId, kept);
    const stem = stemOf(kept);
    const set = this.#byStem.get(stem);
    if (set) set.add(kept);
    else this.#byStem.set(stem, new Set([kept]));
    this.#heldBytes += held.bytes;
    this.#count++;
    return kept;
  }

  lookup(tensorId: TensorId): Lookup {
    const exact = this.#byTensor.get(tensorId);
    if (exact) return { kind: 'found', tensor: exact };
    if (this.#exactOnly) return { kind: 'absent' };
    const { requestId, layerName } = splitTensorId(tensorId);
    // Who asks may have a suffix, who keeps may have one, or both; or the name asked for is a transfer id that itself looks suffixed.
    const candidates = this.#near(requestId).filter(
      (kept) =>
        kept.layerName === layerName &&
        (belongsTo(kept.requestId, requestId) || belongsTo(kept.requestId, transferIdOf(requestId))),
    );
    const [first, ...others] = candidates;
    if (!first) return { kind: 'absent' };
    if (others.length === 0) return { kind: 'found', tensor: first };
    return { kind: 'ambiguous', requestIds: candidates.map((kept) => kept.requestId) };
  }

  /** Tensors of the same layer under another id of the same request: what came instead. At most `most`. */
  nearMisses(tensorId: TensorId, most = 3): TensorId[] {
    const { requestId, layerName } = splitTensorId(tensorId);
    const near = this.#near(requestId).filter(
      (kept) => kept.layerName === layerName && kept.tensorId !== tensorId,
    );
    return near.slice(0, most).map((kept) => kept.tensorId);
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
    const mine = this.#near(id).filter((kept) => belongsTo(kept.requestId, id));
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
    const indexed = [...this.#byStem.values()].reduce((sum, set) => sum + set.size, 0);
    if (indexed !== this.#byTensor.size) wrong.push(`${this.#byTensor.size} kept, ${indexed} indexed`);
    let bytes = 0;
    for (const kept of this.#byTensor.values()) {
      bytes += kept.held.bytes;
      if (kept.gone) wrong.push(`${kept.tensorId} is gone and still listed`);
    }
    if (bytes > this.#heldBytes) wrong.push(`${bytes} bytes kept, ${this.#heldBytes} counted`);
    return wrong;
  }

  /** Those whose transfer id is `id`, or the transfer id of `id`. */
  #near(id: string): Mutable[] {
    const stems = new Set([id, transferIdOf(id)]);
    return [...stems].flatMap((stem) => [...(this.#byStem.get(stem) ?? [])]);
  }

  #remove(kept: Mutable): void {
    if (kept.gone) return;
    kept.gone = true;
    this.#byTensor.delete(kept.tensorId);
    const set = this.#byStem.get(stemOf(kept));
    set?.delete(kept);
    if (set?.size === 0) this.#byStem.delete(stemOf(kept));
    this.#freeUnsent(kept);
  }

  #freeUnsent(kept: Mutable): void {
    if (kept.sending > 0) return;
    this.#heldBytes -= kept.held.bytes;
    this.#count--;
    kept.held.free();
  }
}

function stemOf({ requestId }: KeptTensor): string {
  return transferIdOf(requestId);
}

function mutable(tensor: KeptTensor): Mutable {
  return tensor as Mutable;
}
