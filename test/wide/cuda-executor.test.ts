/** The whole system computing on two stand-in GPUs: layers are sent while later ones are still being computed there. */
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { inParallel } from '../../bench/measure/parallel.ts';
import { standInEnvironment } from '../stand-ins/build.ts';
import { metricsOf, startProxy, startWorker, untilListed, type WorkerHandle } from '../support/cluster.ts';
import { kvMovedProblems } from '../support/kv-moved.ts';
import { complete, mixedRequests } from '../support/requests.ts';

const BFLOAT16 = 2;
const COMPUTING = [
  ...['--executor', 'cuda', '--batch-invariant', '--kv-load-failure', 'fail', '--kv-buffer-size', '64e6'],
  ...['--max-num-seqs', '3', '--max-num-batched-tokens', '96', '--num-blocks', '256'],
];

describe('batch-invariant producer on cuda:0, consumer on cuda:1', () => {
  let undivided: WorkerHandle;
  beforeAll(async () => {
    Object.assign(process.env, standInEnvironment());
    undivided = await startWorker('both', undefined, [...COMPUTING, '--device', 'cuda:0']);
  });
  afterAll(() => undivided.program.stop());

  test.each(['PUT_ASYNC', 'GET'])(
    '%s: the tokens of the undivided worker, and KV moved',
    async (sendType) => {
      const proxy = await startProxy();
      const args = [...COMPUTING, '--wire', 'frozen', '--send-type', sendType];
      const [producer, consumer] = await Promise.all([
        startWorker('producer', proxy, [...args, '--device', 'cuda:0']),
        startWorker('consumer', proxy, [...args, '--device', 'cuda:1']),
      ]);
      try {
        await untilListed(proxy, 1, 1);
        const requests = mixedRequests(4, 5);
        const expected = await inParallel(requests, 4, (request) => complete(undivided.url, request));
        const before = [await metricsOf(consumer)];
        const answers = await inParallel(requests, 4, (request) => complete(proxy.url, request));
        const after = [await metricsOf(consumer)];
        expect(answers.map(({ error, text }) => error ?? text)).toEqual(expected.map(({ text }) => text));
        const promptTokens = answers.map((answer) => answer.promptTokens);
        expect(kvMovedProblems(before, after, promptTokens, { elementBytes: BFLOAT16 })).toEqual([]);
      } finally {
        await Promise.all([producer, consumer, proxy].map(({ program }) => program.stop()));
      }
    },
  );
});
