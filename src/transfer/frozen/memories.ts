/** What must be remembered of requests that hold no tensor: those that are over, and those that lost one. Pure, and bounded. */
import type { PdError } from '../../errors.ts';
import type { TensorId } from '../../wire/ids.ts';

/** A tensor of which request it is, as its sender calls it, and which of ours that may mean besides. */
interface Named {
  readonly requestId: string;
  readonly standsFor?: string | undefined;
  readonly promptDigest?: string | undefined;
}

type Prompted = Pick<Named, 'promptDigest'>;

/** Both know of which prompt they are, and it is not the same one. */
export function contradicts(a: Prompted, b: Prompted): boolean {
  return a.promptDigest !== undefined && b.promptDigest !== undefined && a.promptDigest !== b.promptDigest;
}

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
  readonly #finished = new Aging<Prompted>();

  /** `prompt`: KV of another one is a later request's of the same id, and not late. */
  add(id: string, prompt: Prompted, now: number): void {
    this.#finished.set(id, prompt, now);
  }

  has(tensor: Named): boolean {
    return [tensor.requestId, tensor.standsFor].some((id) => {
      const prompt = id === undefined ? undefined : this.#finished.get(id);
      return prompt !== undefined && !contradicts(prompt, tensor);
    });
  }

  /** Somebody asks for it again, so it is not over. */
  revive(id: string): void {
    this.#finished.delete(id);
  }

  get size(): number {
    return this.#finished.size;
  }

  sweep(before: number): void {
    this.#finished.sweep(before);
  }
}

/** Tensors that gave way to others before anybody asked: who asks now need not ask again. */
export class GivenUpTensors {
  readonly #tensors = new Aging<true>();

  add(tensorId: TensorId, now: number): void {
    this.#tensors.set(tensorId, true, now);
  }

  has(tensorId: TensorId): boolean {
    return this.#tensors.get(tensorId) ?? false;
  }

  /** It is there again. */
  delete(tensorId: TensorId): void {
    this.#tensors.delete(tensorId);
  }

  get size(): number {
    return this.#tensors.size;
  }

  sweep(before: number): void {
    this.#tensors.sweep(before);
  }
}

/** Requests of which a tensor was refused or lost: a load of one need not wait for its deadline. */
export class LostRequests {
  readonly #lost = new Aging<Prompted & { readonly reason: PdError }>();

  add({ requestId, standsFor, promptDigest }: Named, reason: PdError, now: number): void {
    this.#lost.set(requestId, { reason, promptDigest }, now);
    if (standsFor !== undefined) this.#lost.set(standsFor, { reason, promptDigest }, now);
  }

  /** `prompt`: what another one has lost is nothing to it. */
  get(id: string, prompt: Prompted): PdError | undefined {
    const lost = this.#lost.get(id);
    return lost && !contradicts(lost, prompt) ? lost.reason : undefined;
  }

  delete(id: string): void {
    this.#lost.delete(id);
  }

  get size(): number {
    return this.#lost.size;
  }

  sweep(before: number): void {
    this.#lost.sweep(before);
  }
}
