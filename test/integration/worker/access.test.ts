/** A worker that asks for a key. */
import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { expect, it } from 'vitest';
import { BYTE_READER, saying } from '../../support/fake-core.ts';
import { COMPLETIONS, startServer } from '../../support/http-worker.ts';
import { sharedTempDir } from '../../support/temp-dir.ts';

const KEY = 'sk-worker-0123456789abcdef';
const DIR = sharedTempDir();

it('asks for it on every route but those that probes and scrapers use', async () => {
  const apiKeyFile = join(DIR, 'keys');
  writeFileSync(apiKeyFile, `proxy ${KEY}\n`);
  const { server } = await startServer(saying('hello'), { debugState: 'anyone' }, BYTE_READER, {
    apiKeyFile,
  });
  const status = async (method: 'GET' | 'POST', url: string, authorization?: string) => {
    const headers = {
      'content-type': 'application/json',
      ...(authorization !== undefined && { authorization }),
    };
    const payload = method === 'POST' ? { prompt: 'abc', transfer_id: 'x' } : undefined;
    return (await server.inject({ method, url, headers, ...(payload && { payload }) })).statusCode;
  };
  for (const url of ['/health', '/ready', '/metrics']) expect(await status('GET', url)).toBe(200);
  for (const url of ['/v1/models', '/instance', '/debug/state', '/version', '/openapi.json', '/nowhere'])
    expect(await status('GET', url)).toBe(401);
  for (const url of [COMPLETIONS, '/kv/release', '/kv/prefilled', '/kv/failed', '/tokenize'])
    expect(await status('POST', url)).toBe(401);
  expect(await status('POST', COMPLETIONS, `Bearer ${KEY}`)).toBe(200);
  expect(await status('GET', '/v1/models', `Bearer ${KEY}`)).toBe(200);
});
