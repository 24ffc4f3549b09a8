/** The books of the producer's ledger (grants.ts): WANTs by the process that sent them, and by the request that they are for. Pure. */

import { Aging } from '../../memories.ts';
import type { TransferId } from '../../wire/ids.ts';
import type { Draw } from './actions.ts';
import type { EndMessage, HeldState, Nonce, WantMessage } from './messages.ts';
import { type Process, Processes } from './processes.ts';

export interface Grant {
  readonly owner: Process<Grant>;
  readonly want: WantMessage;
  /** Where it is unbound. */
  readonly deadline: number;
  request: Request | undefined;
  /** Blocks whose write has been asked for, from the prompt's start; those that are skipped count as written. */
  written: number;
  /** A write has been asked for. */
  begun: boolean;
  readonly launches: Set<number>;
  /** Decided. Told once no launch is left. */
  end: EndMessage | undefined;
  /** When the end was last said; undefined before. */
  saidAt: number | undefined;
  /** Until it is said again: longer each time, as a peer that lives and does not acknowledge is asked for little. */
  repeatMs: number;
}

export interface Request {
  readonly id: TransferId;
  readonly promptDigest: string;
  readonly tokens: number;
  readonly grants: Set<Grant>;
  computed: number;
  sources: readonly number[];
  draw: Draw | undefined;
  /** Where its KV is leased: when that ends. */
  leasedUntil: number | undefined;
  /** Its consumer has said that it will not ask (again). */
  unwanted: boolean;
}

interface Launch {
  readonly grant: Grant;
  readonly sources: readonly number[];
}

interface EndedId {
  readonly why: string;
  /** Before its request had begun. */
  readonly unwanted: boolean;
}

/** Of an end that is not acknowledged, the first time. */
const REPEAT_MS = 1_000;

export class GrantBooks {
  readonly processes: Processes<Grant>;
  readonly requests = new Map<TransferId, Request>();
  readonly launches = new Map<number, Launch>();
  readonly endedIds = new Aging<EndedId>();
  readonly #unbound = new Map<TransferId, Set<Grant>>();

  constructor(nonce: Nonce) {
    this.processes = new Processes(nonce);
  }

  /** Enters a WANT, which is unbound. */
  open(owner: Process<Grant>, want: WantMessage, deadline: number): Grant {
    const grant: Grant = {
      owner,
      want,
      deadline,
      request: undefined,
      written: want.skip,
      begun: false,
      launches: new Set(),
      end: undefined,
      saidAt: undefined,
      repeatMs: REPEAT_MS,
    };
    owner.books.set(want.seq, grant);
    const waiting = this.#unbound.get(want.id) ?? new Set();
    this.#unbound.set(want.id, waiting.add(grant));
    return grant;
  }

  /** WANTs that wait for a request of that id. */
  unboundTo(id: TransferId): Iterable<Grant> {
    return this.#unbound.get(id) ?? [];
  }

  unbound(): Grant[] {
    return [...this.#unbound.values()].flatMap((grants) => [...grants]);
  }

  /** It waits for a request no more. */
  leaveUnbound(grant: Grant): void {
    const waiting = this.#unbound.get(grant.want.id);
    if (waiting?.delete(grant) && waiting.size === 0) this.#unbound.delete(grant.want.id);
  }

  /** WANTs by state, `told` being those whose end is not acknowledged; then the other books. */
  stats() {
    const states = { unbound: 0, bound: 0, writing: 0, ending: 0, told: 0 };
    for (const process of this.processes.all()) {
      for (const grant of process.books.values()) states[isTold(grant) ? 'told' : stateOf(grant)]++;
    }
    let leases = 0;
    for (const { leasedUntil } of this.requests.values()) if (leasedUntil !== undefined) leases++;
    return {
      ...states,
      requests: this.requests.size,
      leases,
      launches: this.launches.size,
      endedIds: this.endedIds.size,
      /** Seqs that are over and above their process's floor. */
      settled: this.processes.numSettled,
    };
  }

  /** What is wrong, in words; empty when all is well. */
  checkIntegrity(): string[] {
    const problems: string[] = [];
    const launches = new Set<number>();
    const bound = new Set<Grant>();
    for (const request of this.requests.values()) for (const grant of request.grants) bound.add(grant);
    for (const process of this.processes.all()) {
      for (const grant of process.books.values()) {
        const { seq } = grant.want;
        for (const launch of grant.launches) launches.add(launch);
        if (isTold(grant) && grant.launches.size > 0) problems.push(`${seq} is told and is written to`);
        if (grant.end !== undefined && grant.launches.size === 0 && !isTold(grant))
          problems.push(`${seq} has ended untold`);
        // a request that was failed is in no book, but for the WANTs whose writes have not landed
        if (bound.has(grant) && !grant.request) problems.push(`${seq} is bound on one side only`);
        if (grant.request && !grant.request.grants.has(grant))
          problems.push(`${seq} is not in its request's book`);
        if (isTold(grant) && bound.has(grant)) problems.push(`${seq} is told and bound`);
        const waits = this.#unbound.get(grant.want.id)?.has(grant) ?? false;
        if (waits !== (grant.end === undefined && grant.request === undefined))
          problems.push(`${seq} is ${waits ? '' : 'not '}among the unbound`);
      }
    }
    for (const [launch, { grant }] of this.launches) {
      if (!launches.has(launch)) problems.push(`write ${launch} of ${grant.want.seq} is nobody's`);
    }
    if (launches.size !== this.launches.size) problems.push('a write under way is not in the book');
    for (const grants of this.#unbound.values())
      if (grants.size === 0) problems.push('an empty set of unbound');
    return problems;
  }
}

export function isTold(grant: Grant): boolean {
  return grant.saidAt !== undefined;
}

export function stateOf({ end, request, begun }: Grant): HeldState {
  if (end !== undefined) return 'ending';
  if (!request) return 'unbound';
  return begun ? 'writing' : 'bound';
}
