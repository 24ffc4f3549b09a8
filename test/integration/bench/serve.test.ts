import { EventEmitter, once } from 'node:events';
import { Command } from 'commander';
import { describe, expect, it, onTestFinished } from 'vitest';
import { SERVE_OPTIONS, serveOptions } from '../../../bench/cli/serve.ts';
import { NO_PROGRESS } from '../../../bench/measure/progress.ts';
import type { Clock } from '../../../bench/serve/load.ts';
import { type ServeOptions, serve } from '../../../bench/serve/serve.ts';
import { addOptions, resolveOptions } from '../../../src/config/options.ts';
import {
  type Answering,
  answerAtOnce,
  countTokens,
  FakeOpenAi,
  json,
  writeEvent,
} from '../../support/fake-openai.ts';
import { keptPort } from '../../support/transfer.ts';

/** The options of a command line. */
function options(...args: readonly string[]): ServeOptions {
  const command = addOptions(new Command(), SERVE_OPTIONS).exitOverride();
  command.parse([...args], { from: 'user' });
  return serveOptions(resolveOptions(SERVE_OPTIONS, command, {}));
}

async function fake(answer: Answering, settings?: { tokenizes: boolean }): Promise<FakeOpenAi> {
  const server = await FakeOpenAi.start(answer, settings);
  onTestFinished(() => server.close());
  return server;
}

const quiet = () => ({ signal: new AbortController().signal, progress: NO_PROGRESS });

/** Time that the server moves on: after each event it waits until the client has read the clock, which it does once per piece. */
class SharedClock implements Clock {
  readonly #reads = new EventEmitter();
  #now = 0;

  now(): number {
    this.#reads.emit('read');
    return this.#now;
  }

  sleepUntil(): Promise<void> {
    throw new Error('nothing is to wait here');
  }

  advance(ms: number): void {
    this.#now += ms;
  }

  async untilRead(act: () => Promise<void>): Promise<void> {
    const read = once(this.#reads, 'read');
    await act();
    await read;
  }
}

describe('pd-bench serve', () => {
  it('measures what the server takes: to the first text, from text to text, to the end', async () => {
    const clock = new SharedClock();
    const chunk = (text: string, finish: string | null = null) => ({
      choices: [{ text, finish_reason: finish }],
    });
    const server = await fake(async ({ body }, out) => {
      const say = async (ms: number, data: object) => {
        clock.advance(ms);
        await clock.untilRead(() => writeEvent(out, data));
      };
      await say(40, chunk('')); // no text yet: no first token
      await say(60, chunk('Hello'));
      await say(10, chunk(' big'));
      await say(30, chunk(' world', 'length'));
      await say(5, { choices: [], usage: { prompt_tokens: countTokens(body), completion_tokens: 3 } });
      out.end();
    });
    const args = ['--url', server.url, '--num-requests', '3', '--warm-up', '0', '--output-tokens', '3'];
    const { summary, records } = await serve(options(...args, '--prompt-tokens', '20'), {
      ...quiet(),
      clock,
    });
    expect(records[0]).toMatchObject({
      outcome: 'done',
      firstTokenMs: 100,
      gapsMs: [10, 30],
      textMs: 40,
      endToEndMs: 145,
      promptTokens: 20,
      outputTokens: 3,
      countedBy: 'usage',
    });
    expect(summary.ttftMs).toMatchObject({ count: 3, mean: 100, p99: 100 });
    expect(summary.itlMs).toMatchObject({ count: 6, mean: 20, p50: 20 });
    expect(summary.tpotMs).toMatchObject({ count: 3, mean: 20 });
    expect(summary.durationMs).toBe(435);
  });

  it('asks as told: model, lengths to the token, prompts unlike each other, key, further fields', async () => {
    const server = await fake(answerAtOnce);
    const { summary, model } = await serve(
      options(
        ...['--url', `${server.url}/v1/`, '--num-requests', '12', '--concurrency', '3'],
        ...['--prompt-tokens', '30-60', '--output-tokens', '4', '--api-key', 'secret'],
        ...['--extra-body', '{"top_k":7}'],
      ),
      quiet(),
    );
    expect(model).toBe('first');
    expect(summary.requests).toEqual({ planned: 12, done: 12, failed: 0, interrupted: 0 });
    expect(summary.otherPromptLength).toBe(0);
    expect(summary.otherOutputLength).toBe(0);
    expect(server.authorization).toBe('Bearer secret');
    expect(server.asked).toHaveLength(15); // with three to warm up
    const prompts = server.asked.map(({ body }) => body['prompt'] as string);
    expect(new Set(prompts.map((prompt) => prompt.split(' ').slice(0, 4).join(' '))).size).toBe(15);
    for (const { path, body } of server.asked) {
      expect(path).toBe('/v1/completions');
      expect(countTokens(body)).toBeGreaterThanOrEqual(30);
      expect(countTokens(body)).toBeLessThanOrEqual(60);
      expect(body).toMatchObject({
        ...{ model: 'first', max_tokens: 4, temperature: 0, stream: true, ignore_eos: true, top_k: 7 },
        stream_options: { include_usage: true },
      });
    }
  });

  it('chats, at a rate, with a prefix that all share and without ignore_eos', async () => {
    const server = await fake(async ({ body }, out) => {
      await writeEvent(out, { choices: [{ delta: { role: 'assistant', content: '' } }] });
      await writeEvent(out, { choices: [{ delta: { content: 'Hi' }, finish_reason: 'stop' }] });
      await writeEvent(out, {
        choices: [],
        usage: { prompt_tokens: countTokens(body), completion_tokens: 1 },
      });
      out.end('data: [DONE]\n\n');
    });
    const { summary } = await serve(
      options(
        ...['--url', server.url, '--endpoint', 'chat', '--request-rate', '500', '--num-requests', '8'],
        ...['--prompt-tokens', '40', '--shared-prefix', '20', '--no-ignore-eos', '--model', 'mine'],
      ),
      quiet(),
    );
    expect(summary.requests).toMatchObject({ done: 8, failed: 0 });
    expect(summary.otherOutputLength).toBe(8); // 128 were asked for
    expect(summary.lateMs?.count).toBe(8);
    const texts = server.asked.map(({ path, body }) => {
      expect(path).toBe('/v1/chat/completions');
      expect(body).not.toHaveProperty('ignore_eos');
      expect(countTokens(body)).toBe(40);
      return (body['messages'] as { content: string }[])[0]!.content.split(' ');
    });
    expect(new Set(texts.map((words) => words.slice(0, 20).join(' '))).size).toBe(1);
    expect(new Set(texts.map((words) => words.slice(20).join(' '))).size).toBe(texts.length);
  });

  it('finds lengths without a tokenizer, by what an answer says', async () => {
    const server = await fake(answerAtOnce, { tokenizes: false });
    const args = [
      '--url',
      server.url,
      '--num-requests',
      '4',
      '--prompt-tokens',
      '50',
      '--output-tokens',
      '2',
    ];
    const { sizedBy, summary } = await serve(options(...args), quiet());
    expect(sizedBy).toBe('estimate');
    expect(summary.requests.done).toBe(4);
    expect(Math.abs(summary.promptTokens / 4 - 50)).toBeLessThan(3);
  });

  it('counts every failure under its code, and measures the rest', async () => {
    const server = await fake(async (asked, out, index) => {
      switch (index) {
        case 0:
          return json(out, 503, { error: { message: 'nobody is there', code: 'NO_INSTANCE' } });
        case 1:
          await writeEvent(out, { choices: [{ text: 'x' }] });
          await writeEvent(out, { error: { message: 'never came', code: 'KV_LOAD_TIMEOUT' } });
          out.end('data: [DONE]\n\n');
          return;
        case 2:
          await writeEvent(out, { choices: [{ text: 'x' }] });
          out.destroy();
          return;
        case 3:
          await writeEvent(out, { choices: [{ text: 'x' }] });
          out.end();
          return;
        case 4:
          return json(out, 200, { choices: [{ text: 'whole' }] });
        default:
          await answerAtOnce(asked, out);
      }
    });
    const args = ['--url', server.url, '--num-requests', '7', '--warm-up', '0'];
    const { summary } = await serve(
      options(...args, '--output-tokens', '2', '--prompt-tokens', '8'),
      quiet(),
    );
    expect(summary.requests).toEqual({ planned: 7, done: 2, failed: 5, interrupted: 0 });
    expect(summary.failures.map(({ code }) => code).sort()).toEqual([
      '503 NO_INSTANCE',
      'NOT_A_STREAM',
      'TRUNCATED',
      'UND_ERR_SOCKET',
      'stream KV_LOAD_TIMEOUT',
    ]);
    expect(summary.ttftMs?.count).toBe(2);
    expect(summary.outputTokens).toBe(4);
  });

  it('gives up what does not answer in time', async () => {
    const server = await fake(() => {});
    const args = ['--url', server.url, '--num-requests', '2', '--warm-up', '0', '--timeout', '100ms'];
    const { summary } = await serve(
      options(...args, '--output-tokens', '2', '--prompt-tokens', '8'),
      quiet(),
    );
    expect(summary.requests).toEqual({ planned: 2, done: 0, failed: 2, interrupted: 0 });
    expect(summary.failures.map(({ code }) => code)).toEqual(['TIMEOUT']);
  });

  it('stops when it is told to, with what it has', async () => {
    const stop = new AbortController();
    const server = await fake(async (asked, out, index) => {
      if (index < 3) return answerAtOnce(asked, out);
      await writeEvent(out, { choices: [{ text: 'x' }] });
      if (index === 4) stop.abort();
    });
    const args = ['--url', server.url, '--num-requests', '50', '--warm-up', '0', '--concurrency', '2'];
    const { summary, interrupted } = await serve(
      options(...args, '--output-tokens', '2', '--prompt-tokens', '8'),
      { signal: stop.signal, progress: NO_PROGRESS },
    );
    expect(interrupted).toBe(true);
    expect(summary.requests).toEqual({ planned: 50, done: 3, failed: 0, interrupted: 2 });
  });

  it('says at once what keeps it from starting', async () => {
    const nobody = serve(options('--url', `http://127.0.0.1:${await keptPort()}`), quiet());
    await expect(nobody).rejects.toMatchObject({ code: 'UPSTREAM_FAILED' });
    await expect(nobody).rejects.toThrow('ECONNREFUSED');

    const server = await fake((_asked, out) =>
      json(out, 400, { error: { message: 'too long', code: 'CONTEXT_EXCEEDED' } }),
    );
    const refused = serve(options('--url', server.url, '--num-requests', '5'), quiet());
    await expect(refused).rejects.toThrow('400 CONTEXT_EXCEEDED: too long');

    await expect(serve(options('--url', 'localhost:1'), quiet())).rejects.toMatchObject({
      code: 'CONFIG_INVALID',
    });
    expect(() => options('--request-rate', '1', '--concurrency', '1')).toThrow('give only one of them');
    expect(() => options('--extra-body', '[1]')).toThrow('--extra-body');
  });
});
