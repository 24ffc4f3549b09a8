/** What relay processes and the process that owns what all requests share tell each other (relays.ts, relay-process.ts). */
import type { ProxyConfig } from '../config/proxy-config.ts';
import type { ErrorData } from '../errors.ts';
import type { BlockKey } from '../wire/kv-events.ts';
import type { PromptFacts, WantedKeys } from './body.ts';
import type { Placement, Wish } from './coordinator.ts';
import type { ExportedMetrics } from './metrics.ts';
import type { Receipt } from './receipts.ts';
import type { Instance, InstanceRole } from './registry.ts';

/** A wish as it travels: what is no plain data is a list. */
export interface SentWish extends Omit<Wish, 'prompt'> {
  readonly prompt: Omit<PromptFacts, 'blockKeys'> & {
    readonly blockKeys: readonly (readonly [number, readonly BlockKey[]])[];
  };
}

/** A placement as it travels: instances by their HTTP addresses. */
export interface SentPlacement extends Omit<Placement, 'pair'> {
  readonly pair: Readonly<Record<InstanceRole, string>>;
}

/** `id`: the request's, of that relay process. `at`: which of its placements, from 0. */
export type FromRelay =
  | { readonly type: 'ready' }
  | { readonly type: 'failed'; readonly error: ErrorData }
  | { readonly type: 'enter'; readonly id: number; readonly wish: SentWish }
  | {
      readonly type: 'prefilled';
      readonly id: number;
      readonly at: number;
      readonly tookMs?: number | undefined;
    }
  | {
      readonly type: 'judge';
      readonly id: number;
      readonly at: number;
      readonly role: InstanceRole;
      readonly ok: boolean;
      readonly firstEventMs?: number | undefined;
    }
  | { readonly type: 'retry'; readonly id: number; readonly refused: InstanceRole }
  | { readonly type: 'end'; readonly id: number }
  | { readonly type: 'metrics'; readonly metrics: ExportedMetrics }
  | { readonly type: 'receipts'; readonly seq: number; readonly receipts: readonly Receipt[] };

export type ToRelay =
  | { readonly type: 'start'; readonly config: ProxyConfig; readonly folder: string; readonly number: number }
  /** Since it started or pinged for the first time. */
  | { readonly type: 'instance'; readonly instance: Instance }
  | { readonly type: 'wanted'; readonly wanted: WantedKeys }
  | {
      readonly type: 'placed';
      readonly id: number;
      readonly count: number;
      readonly queuedMs: number;
      readonly placement: SentPlacement;
    }
  /** Absent: there is no other pair. */
  | { readonly type: 'refused'; readonly id: number; readonly error?: ErrorData }
  | { readonly type: 'metrics' }
  /** `of`: an id of the one request that is asked for; absent: all, or the latest. */
  | {
      readonly type: 'receipts';
      readonly seq: number;
      readonly of?: string | undefined;
      readonly most?: number | undefined;
    }
  | { readonly type: 'drain'; readonly ms: number };
