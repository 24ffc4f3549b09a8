/**
 * What relay processes and the process that owns what all requests share (relays.ts, relay-process.ts) tell each other, over a socket: JSON,
 * one line for all that a turn of the event loop has to say. A request takes five of them, so under load it is the line that costs, and it
 * is shared.
 */
import type { Socket } from 'node:net';
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
  /** The connection that it was sent first of those that it has not said this of. */
  | { readonly type: 'taken' }
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
  | {
      readonly type: 'start';
      readonly config: ProxyConfig;
      readonly pseudonym: string;
      readonly folder: string;
      readonly number: number;
    }
  /** Since it started or pinged for the first time. */
  | { readonly type: 'instance'; readonly instance: Instance }
  /** No request is placed there from now on. */
  | { readonly type: 'gone'; readonly httpAddress: string }
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

const LF = 0x0a;
/** Of a line: many times what the requests of one turn are. */
const MAX_LINE = 256 * 2 ** 20;

export class Channel<Out, In> {
  readonly #socket: Socket;
  readonly #onMessage: (message: In) => void;
  #outgoing: Out[] = [];
  /** Of a line that is not whole yet. */
  #held: Buffer[] = [];
  #heldBytes = 0;

  /** Both ends are ours, and believed. `onEnd`: the other process has ended. */
  constructor(socket: Socket, onMessage: (message: In) => void, onEnd: () => void) {
    this.#socket = socket;
    this.#onMessage = onMessage;
    socket.on('data', (bytes: Buffer) => this.#read(bytes));
    socket.on('error', () => socket.destroy());
    socket.once('close', onEnd);
  }

  /** Goes at the end of this turn of the loop. */
  send(message: Out): void {
    if (this.#outgoing.push(message) === 1) setImmediate(() => this.#flush());
  }

  /** Resolves once all has been written. */
  close(): Promise<void> {
    this.#flush();
    return new Promise((resolve) => this.#socket.end(resolve));
  }

  #flush(): void {
    const messages = this.#outgoing;
    if (messages.length === 0) return;
    this.#outgoing = [];
    if (this.#socket.writable) this.#socket.write(`${JSON.stringify(messages)}\n`);
  }

  #read(bytes: Buffer): void {
    let from = 0;
    for (let end = bytes.indexOf(LF); end >= 0; end = bytes.indexOf(LF, from)) {
      this.#held.push(bytes.subarray(from, end));
      const line = Buffer.concat(this.#held).toString('utf8');
      this.#held = [];
      this.#heldBytes = 0;
      from = end + 1;
      for (const message of JSON.parse(line) as In[]) this.#onMessage(message);
    }
    if (from === bytes.length) return;
    this.#held.push(bytes.subarray(from));
    this.#heldBytes += bytes.length - from;
    if (this.#heldBytes > MAX_LINE) this.#socket.destroy();
  }
}
