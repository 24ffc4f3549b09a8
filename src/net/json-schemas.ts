/** For `schemaController` of a fastify server. Pure. */
import type { FastifyServerOptions } from 'fastify';
import { PdError } from '../errors.ts';

function none(): never {
  throw new PdError('INTERNAL', 'no route of ours has a JSON schema');
}

/** Our routes have no JSON schemas (bodies are checked where they are read), so nobody waits for fastify to load two compilers of them. */
export const NO_JSON_SCHEMAS = {
  compilersFactory: { buildValidator: none, buildSerializer: none },
} satisfies FastifyServerOptions['schemaController'];
