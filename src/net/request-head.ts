/** What our HTTP servers refuse by the head of a request, before its body is read: methods that a path does not have, bodies that are encoded. */
import type { FastifyInstance, FastifyRequest } from 'fastify';
import { PdError } from '../errors.ts';

interface Path {
  readonly pattern: RegExp;
  readonly methods: Set<string>;
}

/** Characters of a path in errors and logs; a head may have 16 KiB of it. */
const MOST_SHOWN = 200;

/** What a request asks for, as far as it is repeated: without its query, which may say what is nobody else's. */
export function askedPath({ url }: Pick<FastifyRequest, 'url'>): string {
  const [path = ''] = url.split('?');
  return path.length > MOST_SHOWN ? `${path.slice(0, MOST_SHOWN)}...` : path;
}

/** No route has it. */
export function noSuchPath(request: FastifyRequest): PdError {
  return new PdError('REQUEST_INVALID', `there is no ${request.method} ${askedPath(request)} here`);
}

/** The router cannot decode it. */
export function unreadablePath(request: FastifyRequest): PdError {
  return new PdError('REQUEST_INVALID', `${askedPath(request)} is no path: its escapes (%) are no UTF-8`);
}

/** To be called once, before the routes. Requests fail with METHOD_NOT_ALLOWED, where the answer has `Allow`, and BODY_ENCODED. */
export function checkHeads(app: FastifyInstance): void {
  const paths = new Map<string, Path>();
  app.addHook('onRoute', ({ url, method }) => {
    const path = paths.get(url) ?? { pattern: patternOf(url), methods: new Set() };
    paths.set(url, path);
    for (const one of [method].flat()) path.methods.add(one);
  });
  app.addHook('onRequest', async (request, reply) => {
    const { method, url, headers, is404 } = request;
    if (is404) {
      const [asked = ''] = url.split('?');
      const path = paths.get(asked) ?? [...paths.values()].find(({ pattern }) => pattern.test(asked));
      if (!path) return; // there is none: said by whoever answers for that
      const allowed = [...path.methods].sort().join(', ');
      reply.header('allow', allowed);
      throw new PdError('METHOD_NOT_ALLOWED', `${askedPath(request)} takes ${allowed}, not ${method}`);
    }
    const encoding = headers['content-encoding']?.trim().toLowerCase();
    if (!encoding || encoding === 'identity') return;
    reply.header('accept-encoding', 'identity');
    throw new PdError(
      'BODY_ENCODED',
      `bodies in ${encoding.slice(0, 100)} (Content-Encoding) are not read here`,
    );
  });
}

/** Of a route as it was declared: `:name` is a part of the path, `*` the rest of it. */
function patternOf(route: string): RegExp {
  const source = route.replace(/[.+?^${}()|[\]\\]/g, '\\$&').replace(/:\w+/g, '[^/]+');
  return new RegExp(`^${source.replace('*', '.*')}$`);
}
