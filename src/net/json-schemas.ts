/** `schemaController` of our fastify servers. */
import type { FastifyServerOptions } from 'fastify';
import { PdError } from '../errors.ts';

function none(): never {
  throw new PdError('INTERNAL', 'no route of ours has a JSON schema');
}

/** Our routes have no JSON schemas (bodies are checked where they are read), so fastify need not load its two schema compilers. */
export const NO_JSON_SCHEMAS = {
  compilersFactory: { buildValidator: none, buildSerializer: none },
} satisfies FastifyServerOptions['schemaController'];
