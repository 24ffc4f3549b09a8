/** A worker with a model, and bodies that are made to bring it down: refused by name in OpenAI's form, while another client's stream goes on. */
import { expect, it } from 'vitest';
import { workerConfig } from '../../../src/config/embedded.ts';
import { PdWorker } from '../../../src/worker/worker.ts';
import { HOSTILE_BODIES, TAKEN_BODIES } from '../../../support/hostile-bodies.ts';
import { rows } from '../../support/rows.ts';

/** Those that are refused at a look, and those on which time is spent first. */
const QUICK = HOSTILE_BODIES.filter(({ costly }) => !costly);
const LONG = HOSTILE_BODIES.filter(({ costly }) => costly);

it('refuses what explodes by its field, and goes on with the streams of others', async () => {
  const worker = await PdWorker.start(workerConfig());
  try {
    const { host, port } = worker.httpAddress;
    const post = (path: string, body: string, signal?: AbortSignal) =>
      fetch(`http://${host}:${port}${path}`, {
        method: 'POST',
        headers: { 'content-type': 'application/json' },
        body,
        ...(signal && { signal }),
      });
    const leave = new AbortController();
    let came: () => void = () => {};
    /** One stream after another, as long as the test goes on. */
    const streaming = (async () => {
      while (!leave.signal.aborted) {
        const long = { prompt: 'Once', max_tokens: 1_000, ignore_eos: true, stream: true, temperature: 0 };
        const answer = await post('/v1/completions', JSON.stringify(long), leave.signal);
        for await (const _ of answer.body!) came();
      }
    })().catch((error: unknown) => leave.signal.aborted || Promise.reject(error));
    const nextChunk = () =>
      Promise.race([
        new Promise<string>((resolve) => {
          came = () => resolve('went on');
        }),
        streaming.then(() => 'ended'),
      ]);
    for (const { name, path, body, param } of rows(QUICK, LONG)) {
      const answer = await post(path, body());
      const { error } = (await answer.json()) as { error?: { message: string; param: string | null } };
      expect([name, answer.status, error?.param, typeof error?.message]).toEqual([
        name,
        400,
        param,
        'string',
      ]);
      expect([name, await nextChunk()]).toEqual([name, 'went on']);
    }
    for (const { name, path, body } of rows(TAKEN_BODIES.slice(0, 1), TAKEN_BODIES)) {
      const answer = await post(path, body());
      expect([name, [200, 400].includes(answer.status)]).toEqual([name, true]);
      expect([name, await nextChunk()]).toEqual([name, 'went on']);
    }
    leave.abort();
    await streaming;
    const asked = { prompt: 'The capital of France is', max_tokens: 4, temperature: 0 };
    expect((await post('/v1/completions', JSON.stringify(asked))).status).toBe(200);
  } finally {
    await worker.close();
  }
});
