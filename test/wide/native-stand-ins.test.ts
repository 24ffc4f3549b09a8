/** Native pairs on stand-in GPUs: by direct on one host, on one GPU even, and by NCCL; each as the undivided worker, to the token. */
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { inParallel } from '../../bench/measure/parallel.ts';
import { standInEnvironment } from '../stand-ins/build.ts';
import { metricsOf, startProxy, startWorker, untilListed, type WorkerHandle } from '../support/cluster.ts';
import { complete, eventually, mixedRequests } from '../support/requests.ts';
import { ON_GPU } from '../support/stand-in-pair.ts';

const COMPUTING = [
  ...['--executor', 'cuda', '--batch-invariant', '--kv-load-failure', 'fail', '--kv-buffer-size', '64e6'],
  ...['--max-num-seqs', '3', '--max-num-batched-tokens', '48', '--num-blocks', '256'],
];

describe.each([
  ['direct', 'cuda:0', 'cuda:1', ON_GPU, []],
  ['direct', 'cuda:0', 'cuda:0', ON_GPU, []],
  ['direct', 'cuda:0', 'cuda:1', COMPUTING, [...COMPUTING, '--device', 'cuda:0']],
  ['nccl', 'cuda:0', 'cuda:1', ON_GPU, []],
  ['nccl', 'cuda:0', 'cuda:1', COMPUTING, [...COMPUTING, '--device', 'cuda:0']],
] as const)(
  'by %s, producer on %s, consumer on %s (%j)',
  (transport, ofProducer, ofConsumer, args, alone) => {
    let undivided: WorkerHandle;
    beforeAll(async () => {
      Object.assign(process.env, standInEnvironment());
      undivided = await startWorker('both', undefined, alone);
    });
    afterAll(() => undivided.program.stop());

    test('text equals the undivided worker, nothing is computed twice, nothing is left', async () => {
      const proxy = await startProxy();
      const all = [...args, '--transport', transport, '--debug-state'];
      const producer = await startWorker('producer', proxy, [...all, '--device', ofProducer]);
      const consumer = await startWorker('consumer', proxy, [...all, '--device', ofConsumer]);
      try {
        await untilListed(proxy, 1, 1);
        const requests = mixedRequests(6, 11);
        const expected = await inParallel(requests, 4, (request) => complete(undivided.url, request));
        const answers = await inParallel(requests, 4, (request) => complete(proxy.url, request));
        expect(answers.map(({ error, text }) => error ?? text)).toEqual(expected.map(({ text }) => text));
        const metrics = await metricsOf(consumer);
        expect(metrics.get('pd_kv_loads_total{result="ok"}')).toBe(requests.length);
        expect(metrics.get('pd_prompt_tokens_total{source="computed"}')).toBe(0);
        const state = await (await fetch(`${consumer.url}/debug/state`)).json();
        expect(state).toMatchObject({ core: { handOver: { producers: [{ transport }] } } });
        for (const worker of [producer, consumer]) {
          await eventually('no block is used', 60_000, async () => {
            return (await metricsOf(worker)).get('pd_kv_blocks_used') === 0;
          });
        }
        for (const { program } of [consumer, producer]) expect(await program.stop()).toBe(0);
      } finally {
        await Promise.all([producer, consumer, proxy].map(({ program }) => program.stop('SIGKILL')));
      }
    });
  },
);
