/** What a link tells its owner. */
import type { PdError } from '../../errors.ts';
import type { Pair } from '../../transport/transport.ts';
import type { Announcement } from './announcement.ts';

export interface LinkEnd {
  readonly error: PdError;
  /** Announced and not answered, oldest first. */
  readonly unanswered: readonly Announcement[];
  /** The peer has answered `2`: it knows no pair. */
  readonly noPair: boolean;
  /** It was closed because nothing used it. */
  readonly idle: boolean;
}

export interface LinkEvents {
  onOpen(): void;
  /** The pair is open, and what the peer is, is known: announcements may leave. */
  onGreeted(): void;
  /** More may be announced; `again`: to be announced anew, first of all. */
  onSpace(again: readonly Announcement[]): void;
  /** Once. */
  onEnd(end: LinkEnd): void;
  /** A peer that is not ours keeps one pair per address, the newest: its own, where it has sent NEW after us. */
  newerPair(since: number): Pair | undefined;
  /** A PUT goes to a peer that is not ours. */
  onForeignPut(): void;
}
