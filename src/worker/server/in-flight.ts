/** Requests under way: their ids, which are unique, and the wait of a draining worker for their end. */
import { randomBytes } from 'node:crypto';
import type { FastifyReply, FastifyRequest } from 'fastify';
import { deferred, withDeadline } from '../../deferred.ts';
import { PdError } from '../../errors.ts';
import { Timelines } from '../../observability/timelines.ts';
import { type TransferId, transferIdOf } from '../../wire/ids.ts';
import { z } from '../../zod.ts';
import { badField } from './fields.ts';

const HEADER = 'x-request-id';
/** Printable and without blanks: it becomes part of log lines, ZeroMQ messages and tensor ids. */
export const requestIdSchema = z
  .string()
  .regex(/^[\x21-\x7e]{1,512}$/, 'expected 1 to 512 printable ASCII characters');

/** The id that a request came with, or a random one; the answer names it in the same header. */
export function requestIdOf(request: FastifyRequest, reply: FastifyReply): string {
  const { data, error } = requestIdSchema.optional().safeParse(request.headers[HEADER]);
  if (error) throw badField('X-Request-Id', error.issues[0]!.message);
  const id = data ?? randomBytes(16).toString('hex');
  reply.header(HEADER, id);
  return id;
}

/** Routes whose prompts have KV, by their paths. */
export const GENERATION_ROUTES = {
  '/v1/completions': 'completions',
  '/v1/chat/completions': 'chat',
  '/v1/responses': 'responses',
} as const;
export type GenerationRoute = (typeof GENERATION_ROUTES)[keyof typeof GENERATION_ROUTES];

const ID_PREFIXES = { completions: 'cmpl-', chat: 'chatcmpl-', responses: 'resp_' } as const;

/** The id that answers to a request carry. */
export function serverIdOf(route: GenerationRoute, requestId: string): string {
  return `${ID_PREFIXES[route]}${requestId}`;
}

/** For each prompt of the request that `serverIdOf` names what producer and consumer agree on (wire/ids.ts). Only completions have several. */
export function promptIdsOf(route: GenerationRoute, serverId: string, prompts: number): string[] {
  return route === 'completions'
    ? Array.from({ length: prompts }, (_, index) => `${serverId}-${index}`)
    : [serverId];
}

/**
 * Of a request on the main thread, which knows it by the id of its answer: `received` with its whole body, `parsed`, handed to the core by
 * its first prompt (`submitted`), its first output `heard`, the first bytes of a stream or a whole answer `written`, all of it `ended`.
 */
export type AnswerStage = 'received' | 'parsed' | 'submitted' | 'heard' | 'written' | 'ended';

export class InFlight {
  readonly timelines = new Timelines<AnswerStage>();
  readonly #ids = new Set<string>();
  /** What the KV of a prompt is known by, where that is not the server's own id for it (`--kv-key engine`). */
  readonly #keys = new Map<string, TransferId>();
  readonly #idle = deferred<true>();
  #draining = false;

  get size(): number {
    return this.#ids.size;
  }

  get draining(): boolean {
    return this.#draining;
  }

  /** Returns the function that ends the request. Throws SERVER_DRAINING, or REQUEST_INVALID where the id is under way. */
  enter(id: string): () => void {
    if (this.#draining) throw new PdError('SERVER_DRAINING', 'this worker is stopping');
    if (this.#ids.has(id)) {
      // Both would have one transfer id: KV of the one would reach the other.
      throw new PdError('REQUEST_INVALID', `a request with id ${id} is under way`, { param: 'X-Request-Id' });
    }
    this.#ids.add(id);
    this.timelines.begin(id, 'received');
    return () => {
      this.timelines.stamp(id, 'ended');
      this.#ids.delete(id);
      this.#lookIdle();
    };
  }

  /** Returns the function that ends it. */
  know(serverId: string, transferId: TransferId): () => void {
    this.#keys.set(serverId, transferId);
    return () => void this.#keys.delete(serverId);
  }

  /** What the KV of a prompt is known by, under way or not. */
  transferIdOf(serverId: string): TransferId {
    return this.#keys.get(serverId) ?? transferIdOf(serverId);
  }

  /** From now on nothing new. Resolves with whether all was done within `timeoutMs`. */
  async drain(timeoutMs: number): Promise<boolean> {
    this.#draining = true;
    this.#lookIdle();
    return (await withDeadline(this.#idle.promise, timeoutMs)) ?? false;
  }

  #lookIdle(): void {
    if (this.#draining && this.#ids.size === 0) this.#idle.resolve(true);
  }
}
