/**
 * Whether what a connection says still comes back answered. ZeroMQ tells when a connection is closed. It does not tell when another takes our
 * name (routing id) at the other end's ROUTER: ours then stays open, nobody reads it, and what answers it goes to the other. Pure: it is told
 * what happens, and says what to ask once its time has come (`at`).
 *
 *   quiet --what must be answered is said--> owed --SILENT_MS--> asked here --patience--> asked elsewhere, on a connection of its own
 *     ^                                                               ^                        |            |
 *     |                                                               |       (waits longer) --+-- nobody   +-- answers --patience--> lost
 *     +--------------------------------------------- anything is heard ------------------------------------------'
 *
 * So a connection is given up only where its peer answers others and not it: not while a peer computes, whose wire answers, nor while it is
 * stopped, when it answers nobody and what is said meanwhile waits for it here as well as anywhere.
 */

import { unreachable } from '../../errors.ts';

/** What is said is repeated each second, and answered then at the latest. */
const SILENT_MS = 1_500;
/** A peer that answers nobody is asked again so often at the least. */
const LONGEST_MS = 10_000;
const SHORTEST_MS = 250;

/** Of each of the two waits for an answer: with the rest far below the deadline of a load, after which a want is of no use. */
export function patienceOf({ answer, load }: { readonly answer: number; readonly load: number }): number {
  return Math.max(Math.min(answer, load / 12), SHORTEST_MS);
}

type Step = 'owed' | 'asked here' | 'asked elsewhere' | 'nobody' | 'answered elsewhere' | 'lost';

export class Silence {
  readonly #patienceMs: number;
  #step: Step | undefined;
  #since = 0;
  #at: number | undefined;
  #waitMs: number;

  constructor(patienceMs: number) {
    this.#patienceMs = patienceMs;
    this.#waitMs = patienceMs;
  }

  /** Something that must be answered. */
  said(now: number): void {
    if (this.#step) return;
    this.#since = now;
    this.#enter('owed', now + SILENT_MS);
  }

  /** Anything. Whether it had been asked for. */
  heard(): boolean {
    const asked = this.#step !== undefined && this.#step !== 'owed';
    this.#step = undefined;
    this.#at = undefined;
    this.#waitMs = this.#patienceMs;
    return asked;
  }

  /** What came of `ask elsewhere`. */
  elsewhere(answered: boolean, now: number): void {
    if (this.#step !== 'asked elsewhere') return;
    if (answered) {
      this.#enter('answered elsewhere', now + this.#patienceMs);
      return;
    }
    this.#enter('nobody', now + this.#waitMs);
    this.#waitMs = Math.min(2 * this.#waitMs, LONGEST_MS);
  }

  /** When `due` is to be asked; undefined while nothing is waited for, or an answer from elsewhere is. */
  get at(): number | undefined {
    return this.#at;
  }

  /** For how long nothing has been heard that is owed. */
  lasted(now: number): number {
    return this.#step ? now - this.#since : 0;
  }

  /** What is to be done now: say hello on this connection, or on another of its own (`elsewhere` follows), or give this one up. */
  due(now: number): 'ask here' | 'ask elsewhere' | 'lost' | undefined {
    if (!this.#step || this.#at === undefined || now < this.#at) return undefined;
    if (now - this.#at >= this.#patienceMs / 2) {
      // This process stood still: what has come meanwhile is heard first.
      this.#at = now + this.#patienceMs;
      return undefined;
    }
    switch (this.#step) {
      case 'owed':
        this.#enter('asked here', now + this.#patienceMs);
        return 'ask here';
      case 'asked here':
      case 'nobody':
        this.#enter('asked elsewhere', undefined);
        return 'ask elsewhere';
      case 'answered elsewhere':
        this.#enter('lost', undefined);
        return 'lost';
      case 'asked elsewhere':
      case 'lost':
        return undefined;
      default:
        return unreachable(this.#step, 'step of a silence');
    }
  }

  #enter(step: Step, at: number | undefined): void {
    this.#step = step;
    this.#at = at;
  }
}
