/**
 * A proxy, a producer and a consumer in one process: started, asked for a completion, closed. The process ends by itself, because nothing
 * is left open.
 *
 *   npx tsx examples/in-process.ts
 */
import assert from 'node:assert/strict';
import { formatHostPort, PdProxy, PdWorker, proxyConfig, readMetric, workerConfig } from 'pd-worker';

{
  // Loopback and free ports unless told otherwise. They are closed in the reverse order: consumer, producer, proxy.
  await using proxy = await PdProxy.start(proxyConfig());
  const common = { device: 'host', proxy: proxy.discoveryAddress, loadFailure: 'fail' } as const;
  await using producer = await PdWorker.start(workerConfig({ ...common, role: 'producer' }));
  await using consumer = await PdWorker.start(workerConfig({ ...common, role: 'consumer' }));
  // Workers announce themselves; a request before that is answered 503.
  await proxy.untilPaired();

  const response = await fetch(`http://${formatHostPort(proxy.httpAddress)}/v1/completions`, {
    method: 'POST',
    headers: { 'content-type': 'application/json' },
    body: JSON.stringify({
      model: 'demo',
      prompt: 'What is the capital of France?',
      max_tokens: 8,
      temperature: 0,
    }),
  });
  const answer = (await response.json()) as { choices: { text: string }[] };
  assert.equal(response.status, 200, JSON.stringify(answer));
  console.log(`completion: ${JSON.stringify(answer.choices[0]?.text)}`);

  // The consumer took the prompt's KV and its first token from the producer instead of computing them.
  assert.equal(readMetric(consumer.metrics, 'pd_kv_loads_total', 'ok'), 1);
  assert.equal(readMetric(consumer.metrics, 'pd_prompt_tokens_total', 'computed'), 0);
  const sent = readMetric(producer.metrics, 'pd_kv_sent_bytes_total');
  const received = readMetric(consumer.metrics, 'pd_kv_received_bytes_total');
  assert.equal(received, sent);
  console.log(`KV moved: ${received} bytes`);
}
console.log('closed');
