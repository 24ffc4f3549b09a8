/** What must be remembered of requests that hold no tensor: those that are over, and those that lost one. Pure, and bounded. */
import type { PdError } from '../errors.ts';
import { splitTensorId, type TensorId, tensorIdOf, transferIdOf } from '../wire/ids.ts';
import { belongsTo } from './store.ts';

const MOST = 65_536;

/** A map that forgets its oldest entries: beyond `MOST`, and when told that a time has passed. */
class Aging<V> {
  readonly #map = new Map<string, { readonly value: V; readonly since: number }>();

  set(key: string, value: V, now: number): void {
    this.#map.delete(key);
    this.#map.set(key, { value, since: now });
    if (this.#map.size > MOST) this.#map.delete(this.#map.keys().next().value!);
  }

  get(key: string): V | undefined {
    return this.#map.get(key)?.value;
  }

  delete(key: string): void {
    this.#map.delete(key);
  }

  get size(): number {
    return this.#map.size;
  }

  sweep(before: number): void {
    for (const [key, { since }] of this.#map) {
      if (since >= before) return;
      this.#map.delete(key);
    }
  }
}

/** Requests that are over: tensors of theirs that still come are received, dropped and counted. */
export class FinishedRequests {
  readonly #finished = new Aging<ReadonlySet<string>>();

  /** `sources`: full ids that the transfer id stood for, where known; a later request with the same transfer id is then not meant. */
  add(id: string, sources: ReadonlySet<string>, now: number): void {
    this.#finished.set(id, sources, now);
  }

  has(requestId: string): boolean {
    return [requestId, transferIdOf(requestId)].some((id) => {
      const sources = this.#finished.get(id);
      return sources !== undefined && belongsTo(requestId, id, sources);
    });
  }

  /** Somebody asks for it again, so it is not over. */
  revive(...ids: readonly string[]): void {
    for (const id of ids) this.#finished.delete(id);
  }

  get size(): number {
    return this.#finished.size;
  }

  sweep(before: number): void {
    this.#finished.sweep(before);
  }
}

/** Tensors that gave way to others before anybody asked: who asks now need not ask again. By transfer id and layer. */
export class GivenUpTensors {
  readonly #tensors = new Aging<true>();

  add(tensorId: TensorId, now: number): void {
    this.#tensors.set(stem(tensorId), true, now);
  }

  has(tensorId: TensorId): boolean {
    return this.#tensors.get(stem(tensorId)) ?? false;
  }

  /** It is there again. */
  delete(tensorId: TensorId): void {
    this.#tensors.delete(stem(tensorId));
  }

  get size(): number {
    return this.#tensors.size;
  }

  sweep(before: number): void {
    this.#tensors.sweep(before);
  }
}

function stem(tensorId: TensorId): TensorId {
  const { requestId, layerName } = splitTensorId(tensorId);
  return tensorIdOf(transferIdOf(requestId), layerName);
}

/** Requests of which a tensor was refused or lost: a load of one need not wait for its deadline. */
export class LostRequests {
  readonly #lost = new Aging<PdError>();

  add(requestId: string, reason: PdError, now: number): void {
    this.#lost.set(requestId, reason, now);
    this.#lost.set(transferIdOf(requestId), reason, now);
  }

  get(...ids: readonly string[]): PdError | undefined {
    for (const id of ids) {
      const reason = this.#lost.get(id);
      if (reason) return reason;
    }
    return undefined;
  }

  delete(...ids: readonly string[]): void {
    for (const id of ids) this.#lost.delete(id);
  }

  get size(): number {
    return this.#lost.size;
  }

  sweep(before: number): void {
    this.#lost.sweep(before);
  }
}
