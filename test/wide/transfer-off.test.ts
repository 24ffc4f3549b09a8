import { afterEach, expect, test } from 'vitest';
import { metricsOf, startProxy, startWorker } from '../support/cluster.ts';
import { kvMovedProblems } from '../support/kv-moved.ts';
import type { Program } from '../support/process.ts';

const programs: Program[] = [];
afterEach(async () => {
  await Promise.all(programs.splice(0).map((program) => program.stop('SIGKILL')));
});

test('with the transfer off the text is still right, and the check that KV moved fails', async () => {
  const proxy = await startProxy();
  programs.push(proxy.program);
  const producer = await startWorker('producer', proxy);
  programs.push(producer.program);
  const consumer = await startWorker('consumer', proxy, ['--kv-load-timeout', '500ms']);
  programs.push(consumer.program);

  const ask = async (url: string, id: string) => {
    const response = await fetch(`${url}/v1/completions`, {
      method: 'POST',
      headers: { 'content-type': 'application/json', 'x-request-id': id },
      body: JSON.stringify({
        model: 'demo',
        prompt: 'What is the capital of France?',
        max_tokens: 8,
        temperature: 0,
      }),
    });
    return (await response.json()) as { choices: { text: string }[]; usage: { prompt_tokens: number } };
  };
  // The id names a producer that never sees the prompt: no KV is ever sent.
  const id = `___prefill_addr_${producer.kvAddress}___decode_addr_${consumer.kvAddress}_${'0'.repeat(32)}`;
  const before = await metricsOf(consumer);
  const answer = await ask(consumer.url, id);
  const after = await metricsOf(consumer);
  const reference = await ask(consumer.url, 'alone');

  expect(answer.choices[0]!.text).toBe(reference.choices[0]!.text);
  const problems = kvMovedProblems([before], [after], [answer.usage.prompt_tokens]);
  expect(problems.join('\n')).toContain('pd_kv_loads_total{result="recomputed"} rose by 1, not 0');
  expect(problems.join('\n')).toContain('pd_kv_received_bytes_total rose by 0');
});
