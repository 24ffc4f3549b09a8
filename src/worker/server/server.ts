/** The HTTP server of a worker: OpenAI's API, and what operators look at. */
import fastify, { type FastifyError, type FastifyInstance, type FastifyReply } from 'fastify';
import { Gauge, type Registry } from 'prom-client';
import { PdError } from '../../errors.ts';
import { isLoopback } from '../../net/address.ts';
import { NO_JSON_SCHEMAS } from '../../net/json-schemas.ts';
import { keepReading } from '../../net/keep-reading.ts';
import { checkHeads, noSuchPath, unreadablePath } from '../../net/request-head.ts';
import { limitUnread } from '../../net/unread.ts';
import { createRegistry } from '../../observability/registry.ts';
import { modelNotFound, openAiError, refuseUnparsed, retryHeaders } from '../../openai-error.ts';
import { pingFields } from '../../wire/codec.ts';
import { chatFormat } from './chat.ts';
import { completionFormat } from './completions.ts';
import { readRequest, type ServerContext } from './context.ts';
import { NOTICE_LIMIT, postFailed, postPrefilled, postReceipt, postRelease } from './notices.ts';
import { openApi } from './openapi.ts';
import { postGeneration, STALL_MS } from './respond.ts';
import { responseFormat } from './response-answers.ts';

/** Bytes; a prompt of a million token ids fits. */
const BODY_LIMIT = 16 * 2 ** 20;

/** How other routers (llm-d, Dynamo, AIBrix) learn about a worker's cache, under vLLM's name: values as labels. */
function registerCacheConfig(registry: Registry, { core }: ServerContext): void {
  const { blockSize, numBlocks } = core.info;
  const labels = { block_size: String(blockSize), cache_dtype: 'auto', num_gpu_blocks: String(numBlocks) };
  const common = { name: 'vllm:cache_config_info', help: 'The paged KV cache: tokens per block, and blocks' };
  new Gauge({ ...common, labelNames: Object.keys(labels), registers: [registry] }).set(labels, 1);
}

/** For the whole of a request to come in. */
const REQUEST_TIMEOUT_MS = 60_000;

export function createServer(context: ServerContext): FastifyInstance {
  const { config, core, log, guard, limited } = context;
  // Of a server with TLS everything that is used here has the same type.
  const server = fastify({
    https: guard.https,
    bodyLimit: BODY_LIMIT,
    requestTimeout: REQUEST_TIMEOUT_MS,
    // The worker drains first; whatever connection is left then is cut.
    forceCloseConnections: true,
    // A worker that drains answers 503 itself, with the code that says so.
    return503OnClosing: false,
    clientErrorHandler: refuseUnparsed,
    schemaController: NO_JSON_SCHEMAS,
    frameworkErrors: (_cause, request, reply: FastifyReply) =>
      reply.status(400).send(openAiError(unreadablePath(request))),
  }) as unknown as FastifyInstance;
  guard.attach(server);
  checkHeads(server);
  limitUnread(server, STALL_MS);
  const registry = createRegistry(context.pages, { model_name: config.servedModelNames[0] ?? '' });
  registerCacheConfig(registry, context);
  const created = Math.floor(Date.now() / 1_000);

  server.setErrorHandler((cause: FastifyError | PdError, request, reply) => {
    const { status, error } = asHttpError(cause);
    // A flood of requests refused as busy must not flood the log too.
    if (status === 503)
      limited.log(error.code, (suppressed) =>
        log.warn({ code: error.code, url: request.url, suppressed }, error.message),
      );
    else if (status >= 500) log.error({ code: error.code, url: request.url, err: error }, error.message);
    else log.debug({ code: error.code, url: request.url }, error.message);
    if (status === 413) keepReading(reply);
    return reply.status(status).headers(retryHeaders(error)).send(openAiError(error));
  });
  server.setNotFoundHandler((request, reply) => reply.status(404).send(openAiError(noSuchPath(request))));

  // Bodies stay bytes until someone with time for them reads them.
  server.removeAllContentTypeParsers();
  server.addContentTypeParser('application/json', { parseAs: 'buffer' }, (_request, body, done) =>
    done(null, body),
  );
  server.post('/v1/completions', (request, reply) =>
    postGeneration(context, 'completions', completionFormat, request, reply),
  );
  server.post('/v1/chat/completions', (request, reply) =>
    postGeneration(context, 'chat', chatFormat, request, reply),
  );
  server.post('/v1/responses', (request, reply) =>
    postGeneration(context, 'responses', responseFormat, request, reply),
  );
  for (const route of ['tokenize', 'detokenize'] as const) {
    server.post(`/${route}`, async (request, reply) => {
      const { buffer, byteOffset, byteLength } = await readRequest(context, route, request);
      reply.type('application/json; charset=utf-8');
      return Buffer.from(buffer, byteOffset, byteLength);
    });
  }
  const notice = { bodyLimit: NOTICE_LIMIT };
  server.post('/kv/release', notice, async (request) => postRelease(context, request));
  server.post('/kv/prefilled', notice, async (request) => postPrefilled(context, request));
  server.post('/kv/failed', notice, async (request) => postFailed(context, request));
  server.post('/kv/receipt', notice, async (request) => postReceipt(context, request));
  const models = config.servedModelNames.map((id) => ({
    id,
    object: 'model',
    created,
    owned_by: 'pd-worker',
    root: id,
    parent: null,
    max_model_len: core.info.maxModelLen,
  }));
  server.get('/v1/models', async () => ({ object: 'list', data: models }));
  // Names of models have slashes, which some clients escape.
  server.get<{ Params: { '*': string } }>('/v1/models/*', async ({ params: { '*': name } }) => {
    const model = models.find(({ id }) => id === name);
    if (!model) throw modelNotFound(name, config.servedModelNames);
    return model;
  });
  server.get('/health', async (_request, reply) => {
    // A core that hangs must not look healthy.
    await core.state();
    if (context.inFlight.draining) reply.status(503);
    return { status: context.inFlight.draining ? 'draining' : 'ok', role: config.role };
  });
  server.get('/ready', async (_request, reply) => {
    await core.state();
    if (context.inFlight.draining) reply.status(503);
    return { ready: !context.inFlight.draining };
  });
  server.get('/instance', async (_request, reply) => {
    if (context.inFlight.draining) throw new PdError('SERVER_DRAINING', 'the worker is stopping');
    const { ping } = await core.state();
    if (ping) return pingFields(ping);
    const text = 'this worker is no instance of a pair: its role is both, or it is not rank 0';
    return reply.status(404).send(openAiError(new PdError('REQUEST_INVALID', text)));
  });
  if (config.debugState !== undefined) {
    server.get('/debug/state', async (request, reply) => {
      // It reveals ids and addresses of other people's requests.
      if (config.debugState === 'loopback' && !isLoopback(request.socket.remoteAddress ?? '')) {
        const text = '/debug/state is for clients on this machine (--debug-state-remote: for all)';
        return reply.status(403).send(openAiError(new PdError('REQUEST_INVALID', text)));
      }
      const { size: requests, timelines } = context.inFlight;
      return { role: config.role, requests, recentRequests: timelines.recent(), core: await core.inspect() };
    });
  }
  let document: Promise<string> | undefined;
  server.get('/openapi.json', async (_request, reply) => {
    document ??= openApi(context.version);
    reply.type('application/json; charset=utf-8');
    return await document;
  });
  server.get('/version', async () => ({ version: context.version }));
  server.get('/metrics', async (_request, reply) => {
    reply.header('content-type', registry.contentType);
    return await registry.metrics();
  });
  return server;
}

/** Fastify's own refusals (body too large, media type) keep their status; the code is ours. */
function asHttpError(cause: FastifyError | PdError): { readonly status: number; readonly error: PdError } {
  if (cause instanceof PdError) return { status: cause.status, error: cause };
  const status = cause.statusCode;
  if (status !== undefined && status >= 400 && status < 500) {
    const why = status === 415 ? 'send its body with content-type: application/json' : cause.message;
    const error = new PdError('REQUEST_INVALID', `the request cannot be read: ${why}`);
    return { status, error };
  }
  return { status: 500, error: PdError.from(cause) };
}
