/**
 * Who waits for which tensor. A tensor goes to the claimants of exactly its id; one of a peer that is not ours may also stand for the
 * request whose id it has but for a random suffix (`standsFor`). All tensors of a request come from one source, the id under which its
 * sender knows it, so that two requests are never mixed up. Pure.
 */
import { PdError } from '../../errors.ts';
import type { TransferId } from '../../wire/ids.ts';
import { contradicts, type StoreEntry } from './store.ts';

export interface Claimant {
  readonly transferId: TransferId;
  /** Routing id of the peer that it comes from. */
  readonly peer: string;
  /** Of the prompt whose KV it wants, where it knows it. */
  readonly promptDigest?: string | undefined;
  wants(layerName: string): boolean;
  /** The tensor is the claimant's now. */
  take(entry: StoreEntry): void;
  /** A tensor of its request has come that nobody takes: its layer may be none of this end's. */
  stray?(entry: StoreEntry): void;
  /** KV of another prompt has come under its id, and has been dropped. */
  otherPrompt?(entry: StoreEntry): void;
  /** GET: what the producer keeps of this request under another id. */
  seenAtPeer?(tensorIds: readonly string[]): void;
  /** The KV will not come. */
  fail(reason: PdError): void;
}

/** Tensors under several ids could be meant by one transfer id: for the log. */
export type CollisionHandler = (transferId: TransferId, sources: readonly string[]) => void;

interface Claim {
  readonly transferId: TransferId;
  readonly claimants: Set<Claimant>;
  /** The id under which the sender knows the request; kept until the request is finished, as what follows. */
  source: string | undefined;
  promptDigest: string | undefined;
  /** All of its KV has come: nothing of it can come late. */
  complete: boolean;
}

/** What is known of a request when it is over. */
export type Finished = Readonly<Pick<Claim, 'promptDigest' | 'complete'>>;

/** Requests that a caller never finishes must not make the book grow for ever. */
const MOST = 65_536;

export class ClaimBook {
  readonly #claims = new Map<string, Claim>();
  readonly #onCollision: CollisionHandler;

  constructor(onCollision: CollisionHandler) {
    this.#onCollision = onCollision;
  }

  /** Enters a claimant and gives it what is there already: `entries`, ready or on their way, that its id may mean. */
  register(claimant: Claimant, entries: readonly StoreEntry[]): void {
    const claim = this.#open(claimant.transferId);
    claim.claimants.add(claimant);
    claim.promptDigest = claimant.promptDigest ?? claim.promptDigest;
    if (claim.source === undefined) {
      const sources = [...new Set(entries.map(({ requestId }) => requestId))];
      const exact = sources.find((source) => source === claim.transferId);
      if (exact === undefined && sources.length > 1) {
        this.#collide(claim, sources);
        return;
      }
      claim.source = exact ?? sources[0];
    }
    for (const entry of entries) {
      if (entry.state === 'ready' && entry.requestId === claim.source) this.#offer(claim, entry);
    }
  }

  unregister(claimant: Claimant): void {
    const claim = this.#claims.get(claimant.transferId);
    claim?.claimants.delete(claimant);
    // What is known of it stays until it is finished.
    if (claim?.claimants.size === 0 && claim.source === undefined && claim.promptDigest === undefined)
      this.#claims.delete(claim.transferId);
  }

  /** A tensor has come. True where somebody took it. */
  arrived(entry: StoreEntry): boolean {
    return this.#meant(entry).some((claim) => this.#arrivedFor(claim, entry));
  }

  /** Claimants that wait for the same layer of another prompt than what has come under their id. */
  contradicted(entry: StoreEntry): Claimant[] {
    return this.#waiting(entry).filter((one) => contradicts(one, entry));
  }

  /** Somebody waits for exactly this tensor. */
  awaits(entry: StoreEntry): boolean {
    return this.#waiting(entry).some((one) => !contradicts(one, entry));
  }

  complete(transferId: TransferId): void {
    const claim = this.#claims.get(transferId);
    if (claim) claim.complete = true;
  }

  /** Claimants that a tensor may concern. */
  claimantsOf(tensor: Pick<StoreEntry, 'requestId' | 'standsFor'>): Claimant[] {
    return this.#meant(tensor)
      .filter(({ source }) => source === undefined || source === tensor.requestId)
      .flatMap(({ claimants }) => [...claimants]);
  }

  /** Somebody waits for KV of exactly this id. */
  waits(transferId: string): boolean {
    return (this.#claims.get(transferId)?.claimants.size ?? 0) > 0;
  }

  /** The request is over, and what was known of it is forgotten. */
  finish(transferId: TransferId): Finished {
    const claim = this.#claims.get(transferId);
    if (!claim) return { promptDigest: undefined, complete: false };
    const { promptDigest, complete } = claim;
    claim.source = undefined;
    claim.complete = false;
    if (claim.claimants.size === 0) this.#claims.delete(transferId);
    return { promptDigest, complete };
  }

  /** Every claimant. */
  all(): Claimant[] {
    return [...this.#claims.values()].flatMap(({ claimants }) => [...claimants]);
  }

  #open(transferId: TransferId): Claim {
    const known = this.#claims.get(transferId);
    if (known) return known;
    const claim: Claim = {
      transferId,
      claimants: new Set(),
      source: undefined,
      promptDigest: undefined,
      complete: false,
    };
    this.#claims.set(transferId, claim);
    if (this.#claims.size > MOST) {
      for (const [id, { claimants }] of this.#claims) {
        if (claimants.size > 0) continue;
        this.#claims.delete(id);
        break;
      }
    }
    return claim;
  }

  #waiting(entry: StoreEntry): Claimant[] {
    return this.#meant(entry).flatMap(({ claimants }) =>
      [...claimants].filter((one) => one.wants(entry.layerName)),
    );
  }

  /** The request of exactly its id first. */
  #meant({ requestId, standsFor }: Pick<StoreEntry, 'requestId' | 'standsFor'>): Claim[] {
    const exact = this.#claims.get(requestId);
    const suffixed = standsFor === undefined ? undefined : this.#claims.get(standsFor);
    if (!exact) return suffixed ? [suffixed] : [];
    return suffixed ? [exact, suffixed] : [exact];
  }

  #arrivedFor(claim: Claim, entry: StoreEntry): boolean {
    claim.source ??= entry.requestId;
    if (claim.source !== entry.requestId) {
      this.#collide(claim, [claim.source, entry.requestId]);
      return false;
    }
    return this.#offer(claim, entry);
  }

  #offer({ claimants }: Claim, entry: StoreEntry): boolean {
    for (const claimant of claimants) {
      if (!claimant.wants(entry.layerName)) continue;
      claimant.take(entry);
      return true;
    }
    for (const claimant of claimants) claimant.stray?.(entry);
    return false;
  }

  /** Nobody can say which of them is meant, so none is, unless one has exactly the id. */
  #collide(claim: Claim, sources: readonly string[]): void {
    const { transferId, claimants } = claim;
    this.#onCollision(transferId, sources);
    if (claim.source === transferId) return;
    const message =
      `${sources.join(' and ')} could both be ${transferId}: each is that id with another random suffix, ` +
      'and nothing tells which is meant';
    for (const claimant of [...claimants])
      claimant.fail(new PdError('KV_LOAD_FAILED', message, { transferId }));
  }
}
