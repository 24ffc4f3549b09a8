/**
 * Who waits for which tensor. A tensor goes to the claimant of its full id, else to the one of its transfer id. A claimant found by
 * transfer id is bound to the sender's request it first met, so that two requests that share a transfer id are never mixed up. Pure.
 */
import { PdError } from '../errors.ts';
import { type TransferId, transferIdOf } from '../wire/ids.ts';
import type { StoreEntry } from './store.ts';

export interface Claimant {
  readonly requestId: string;
  readonly transferId: TransferId;
  /** Routing id of the peer that it comes from. */
  readonly peer: string;
  wants(layerName: string): boolean;
  /** The tensor is the claimant's now. */
  take(entry: StoreEntry): void;
  /** A tensor of its request has come that nobody takes: its layer may be none of this end's. */
  stray?(entry: StoreEntry): void;
  /** The KV will not come. */
  fail(reason: PdError): void;
}

/** Two requests share a transfer id: told once per pair, for the log. */
export type CollisionHandler = (transferId: string, requestIds: readonly string[]) => void;

interface Registration {
  readonly claimant: Claimant;
  /** Another claimant was there first: only tensors of the full id go here. */
  readonly exactOnly: boolean;
  /** Full id, as the sender has it, that this claimant's transfer id stands for. */
  source: string | undefined;
}

export class ClaimBook {
  readonly #byId = new Map<string, Set<Registration>>();
  /** Transfer id to the full ids it has stood for, until the request is finished. */
  readonly #sources = new Map<string, Set<string>>();
  readonly #onCollision: CollisionHandler;

  constructor(onCollision: CollisionHandler) {
    this.#onCollision = onCollision;
  }

  /** Enters a claimant and gives it what is there already (`entries`: ready ones under its ids). */
  register(claimant: Claimant, entries: readonly StoreEntry[]): void {
    const { requestId, transferId } = claimant;
    const rivals = [...(this.#byId.get(transferId) ?? [])].filter((r) => r.claimant.requestId !== requestId);
    const exactOnly = rivals.some((r) => r.claimant.transferId === transferId);
    if (exactOnly) this.#onCollision(transferId, [...rivals.map((r) => r.claimant.requestId), requestId]);
    const registration: Registration = { claimant, exactOnly, source: undefined };
    for (const id of new Set([requestId, transferId])) {
      const set = this.#byId.get(id);
      if (set) set.add(registration);
      else this.#byId.set(id, new Set([registration]));
    }
    const exact = entries.filter((entry) => entry.requestId === requestId);
    if (exact.length > 0) registration.source = requestId;
    else if (!exactOnly) {
      const free = entries.filter((entry) => !this.#boundElsewhere(entry.requestId, registration));
      const sources = [...new Set(free.map((entry) => entry.requestId))];
      if (sources.length > 1) {
        this.#onCollision(transferId, sources);
        this.unregister(claimant);
        const message = `${sources.join(' and ')} share the transfer id ${transferId}, and neither is ${requestId}`;
        claimant.fail(new PdError('KV_LOAD_FAILED', message, { requestId, transferId }));
        return;
      }
    }
    for (const entry of entries) {
      if (entry.state === 'ready' && !this.#offer(registration, entry)) this.#stray(registration, entry);
    }
  }

  unregister(claimant: Claimant): void {
    for (const id of [claimant.requestId, claimant.transferId]) {
      const set = this.#byId.get(id);
      for (const registration of set ?? []) if (registration.claimant === claimant) set?.delete(registration);
      if (set?.size === 0) this.#byId.delete(id);
    }
  }

  /** A tensor has come. True where somebody took it. */
  arrived(entry: StoreEntry): boolean {
    const candidates = this.#of(entry.requestId);
    const [only, ...others] = candidates;
    if (only && others.length === 0 && this.#offer(only, entry)) return true;
    const exact = candidates.filter((r) => r.claimant.requestId === entry.requestId);
    const taken = [...exact, ...candidates].some((registration) => this.#offer(registration, entry));
    if (!taken) for (const registration of candidates) this.#stray(registration, entry);
    return taken;
  }

  /** Claimants that a tensor of `requestId` may concern. */
  claimantsOf(requestId: string): Claimant[] {
    return this.#of(requestId)
      .filter((r) => this.#matches(r, requestId))
      .map((r) => r.claimant);
  }

  /** Full ids that `transferId` has stood for; forgets them. */
  takeSources(transferId: string): ReadonlySet<string> {
    const sources = this.#sources.get(transferId) ?? new Set<string>();
    this.#sources.delete(transferId);
    return sources;
  }

  /** Every claimant. */
  all(): Claimant[] {
    return [...new Set([...this.#byId.values()].flatMap((set) => [...set]))].map((r) => r.claimant);
  }

  #of(requestId: string): Registration[] {
    const exact = this.#byId.get(requestId);
    const transferId = transferIdOf(requestId);
    const named = transferId === requestId ? undefined : this.#byId.get(transferId);
    if (!exact || !named) return [...(exact ?? named ?? [])];
    return [...new Set([...exact, ...named])];
  }

  #offer(registration: Registration, entry: StoreEntry): boolean {
    const { claimant } = registration;
    if (!this.#matches(registration, entry.requestId) || !claimant.wants(entry.layerName)) return false;
    if (registration.source === undefined) {
      registration.source = entry.requestId;
      this.#remember(claimant.transferId, entry.requestId);
    }
    claimant.take(entry);
    return true;
  }

  #stray(registration: Registration, entry: StoreEntry): void {
    if (this.#matches(registration, entry.requestId)) registration.claimant.stray?.(entry);
  }

  #matches(registration: Registration, requestId: string): boolean {
    const { claimant, exactOnly, source } = registration;
    if (claimant.requestId === requestId) return source === undefined || source === requestId;
    if (exactOnly || (source !== undefined && source !== requestId)) return false;
    const named = requestId === claimant.transferId || transferIdOf(requestId) === claimant.transferId;
    return named && !this.#boundElsewhere(requestId, registration);
  }

  /** Bound to a claimant of another request. */
  #boundElsewhere(source: string, except: Registration): boolean {
    return this.#of(source).some(
      (r) => r.source === source && r.claimant.requestId !== except.claimant.requestId,
    );
  }

  #remember(transferId: string, source: string): void {
    const set = this.#sources.get(transferId);
    if (set) set.add(source);
    else this.#sources.set(transferId, new Set([source]));
    // A caller that never finishes its requests must not make this grow for ever.
    if (this.#sources.size > 65_536) this.#sources.delete(this.#sources.keys().next().value!);
  }
}
