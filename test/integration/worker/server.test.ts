import { describe, expect, it } from 'vitest';
import type { DebugAudience } from '../../../src/config/worker-config.ts';
import { readPing } from '../../../src/wire/codec.ts';
import { saying } from '../../support/fake-core.ts';

import { type Answer, COMPLETIONS, startServer, user } from '../../support/http-worker.ts';

describe('the rest', () => {
  it('tells its state only where that was asked for, and by default to this machine alone', async () => {
    const ask = async (audience: DebugAudience | undefined, remoteAddress: string) => {
      const { server } = await startServer(saying('hello'), audience && { debugState: audience });
      const response = await server.inject({ url: '/debug/state', remoteAddress });
      return [response.statusCode, response.json() as Answer] as const;
    };
    expect((await ask(undefined, '127.0.0.1'))[0]).toBe(404);
    for (const local of ['127.0.0.1', '::1', '::ffff:127.0.0.1']) {
      const state = { role: 'both', requests: 0, core: { blocks: { total: 64 } } };
      expect(await ask('loopback', local)).toMatchObject([200, state]);
    }
    for (const remote of ['10.0.0.7', '::ffff:10.0.0.7', 'fd00::1']) {
      expect((await ask('loopback', remote))[0]).toBe(403);
      expect((await ask('anyone', remote))[0]).toBe(200);
    }
  });

  it('says what it pings to whoever asks, and nothing where it is no instance or stops', async () => {
    const { server, core, inFlight } = await startServer();
    const get = async () => {
      const response = await server.inject({ url: '/instance' });
      return [response.statusCode, response.json()] as const;
    };
    expect(await get()).toMatchObject([404, { error: { code: 'REQUEST_INVALID' } }]);
    const load = { running: 1, waiting: 2, kvUsed: 3, kvBlocks: 4, queuedTokens: 5 };
    core.ping = {
      ...{ type: 'D', http_address: '10.0.0.1:8083', zmq_address: '10.0.0.1:8084' },
      native: { version: 1, digest: 'd', model: 'm', sendType: 'PUT', features: ['native'], load },
    };
    const [status, said] = await get();
    expect([status, said]).toMatchObject([200, { type: 'D', pd: { send_type: 'PUT', load: { queued: 5 } } }]);
    expect(readPing(said)).toEqual(core.ping);
    await inFlight.drain(0);
    expect(await get()).toMatchObject([503, { error: { code: 'SERVER_DRAINING' } }]);
  });

  it('lists models, version and health', async () => {
    const { server, inFlight, core, json } = await startServer();
    const get = async (url: string) => {
      const response = await server.inject({ url });
      return [response.statusCode, response.json() as Answer] as const;
    };
    const [, models] = await get('/v1/models');
    expect(models.data.map((model) => model.id)).toEqual(['demo', 'alias']);
    expect(models.data[0]).toMatchObject({ object: 'model', max_model_len: 256 });
    expect(await get('/version')).toEqual([200, { version: '1.2.3' }]);
    expect(await get('/health')).toEqual([200, { status: 'ok', role: 'both' }]);
    // Who asks every second must not have millions of blocks looked through.
    const asked = core.received.filter(({ type }) => type === 'state');
    expect(asked).toMatchObject([{ integrity: false }]);
    await inFlight.drain(0);
    expect(await get('/health')).toMatchObject([503, { status: 'draining' }]);
    expect(await json(COMPLETIONS, { prompt: 'a' })).toMatchObject({
      status: 503,
      body: { error: { code: 'SERVER_DRAINING' } },
    });
    core.emit({ type: 'fatal', error: { code: 'CUDA_ERROR', message: 'gone', context: {} } });
    expect(await get('/health')).toMatchObject([500, { error: { code: 'CUDA_ERROR' } }]);
  });

  it('tells of one model, whose name may have slashes, or that there is none', async () => {
    const { server } = await startServer(saying('hello'), { servedModelNames: ['org/demo', 'alias'] });
    const get = async (name: string) => {
      const response = await server.inject({ url: `/v1/models/${name}` });
      return [response.statusCode, response.json()] as const;
    };
    const { data } = (await server.inject({ url: '/v1/models' })).json() as Answer;
    for (const name of ['org/demo', 'org%2Fdemo']) expect(await get(name)).toEqual([200, data[0]]);
    expect(await get('alias')).toEqual([200, data[1]]);
    const error = { type: 'invalid_request_error', param: 'model', code: 'model_not_found' };
    for (const name of ['org', 'demo', '']) expect(await get(name)).toMatchObject([404, { error }]);
  });

  it('tells which methods a path has, and answers HEAD as it would GET, without a body', async () => {
    const { server, core } = await startServer();
    const ask = async (method: 'GET' | 'HEAD' | 'PUT' | 'OPTIONS' | 'POST', url: string) => {
      // What cannot be read is not looked at.
      const headers = { 'content-type': 'text/plain' };
      const { statusCode, headers: said, body } = await server.inject({ method, url, headers });
      return [statusCode, said['allow'], body] as const;
    };
    for (const method of ['GET', 'PUT', 'OPTIONS'] as const) {
      const [status, allow, body] = await ask(method, '/v1/chat/completions?x=1');
      expect([status, allow, JSON.parse(body)]).toMatchObject([
        405,
        'POST',
        { error: { type: 'invalid_request_error', param: null, code: 'METHOD_NOT_ALLOWED' } },
      ]);
    }
    expect((await ask('POST', '/v1/models')).slice(0, 2)).toEqual([405, 'GET, HEAD']);
    expect((await ask('POST', '/v1/models/demo')).slice(0, 2)).toEqual([405, 'GET, HEAD']);
    expect(await ask('HEAD', COMPLETIONS)).toEqual([405, 'POST', '']);
    expect((await ask('GET', '/v1/other')).slice(0, 2)).toEqual([404, undefined]);
    const { headers, body } = await server.inject({ method: 'HEAD', url: '/v1/models/demo' });
    const whole = await server.inject({ url: '/v1/models/demo' });
    expect([headers['content-length'], headers['content-type'], body]).toEqual([
      whole.headers['content-length'],
      whole.headers['content-type'],
      '',
    ]);
    expect(core.added).toEqual([]);
  });

  it('says of a path what is wrong with it, and no more of it than anybody reads', async () => {
    const { server } = await startServer();
    const of = async (method: 'GET' | 'POST', url: string) => {
      const response = await server.inject({ method, url });
      const { error } = response.json() as Answer;
      expect(error).toMatchObject({ type: 'invalid_request_error', param: null, code: expect.any(String) });
      return [response.statusCode, error.message] as const;
    };
    const long = 'x'.repeat(10_000);
    expect(await of('GET', `/${long}`)).toEqual([404, expect.stringMatching(/^.{1,300}$/)]);
    expect(await of('GET', '/v1/other?secret')).toEqual([404, 'there is no GET /v1/other here']);
    expect(await of('POST', `/v1/models/${long}`)).toEqual([405, expect.stringMatching(/^.{1,300}$/)]);
    expect(await of('GET', '/v1/models/50%')).toEqual([400, expect.stringContaining('/v1/models/50%')]);
    expect(await of('GET', `/%ff${long}`)).toEqual([400, expect.stringMatching(/^.{1,300}$/)]);
  });

  it('tells what may be asked, in OpenAPI', async () => {
    const { server } = await startServer();
    const { paths } = (await server.inject({ url: '/openapi.json' })).json() as {
      paths: Record<string, { post: { requestBody: { content: Record<string, { schema: object }> } } }>;
    };
    const schemaOf = (path: string) => paths[path]!.post.requestBody.content['application/json']!.schema;
    expect(Object.keys(paths)).toEqual(expect.arrayContaining([COMPLETIONS, '/v1/responses', '/tokenize']));
    expect(paths['/v1/models/{model}']).toMatchObject({
      get: { parameters: [{ name: 'model', in: 'path' }] },
    });
    expect(schemaOf(COMPLETIONS)).toMatchObject({
      type: 'object',
      required: ['prompt'],
      properties: {
        prompt: { anyOf: expect.arrayContaining([{ type: 'string' }]) },
        temperature: { anyOf: [{ type: 'number', minimum: 0, maximum: 2 }, { type: 'null' }] },
        user: { description: 'Taken, and changes nothing' },
        use_beam_search: { enum: [null, false] },
      },
    });
    expect(schemaOf('/v1/chat/completions')).toMatchObject({ required: ['messages'] });
  });

  it('tokenizes and back', async () => {
    const { json } = await startServer();
    expect((await json('/tokenize', { prompt: 'ab', return_token_strs: true })).body).toEqual({
      count: 2,
      max_model_len: 256,
      tokens: [97, 98],
      token_strs: ['a', 'b'],
    });
    const chat = await json('/tokenize', { messages: user('x') });
    expect(chat.body['count']).toBe('user:x;assistant:'.length);
    expect((await json('/detokenize', { tokens: [97, 0xc3, 0xa9] })).body).toEqual({ prompt: 'aé' });
    expect((await json('/detokenize', { tokens: [999] })).status).toBe(400);
    expect((await json('/tokenize', {})).status).toBe(400);
    expect((await json('/tokenize', { prompt: 'a', model: 'gpt' })).status).toBe(404);
  });
});
