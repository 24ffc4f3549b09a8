/** A producer that is behind, and a consumer that computes prompts by itself meanwhile (--bypass-wait): real programs, on the host. */
import { expect, test } from 'vitest';
import { metricsOf as metricsAt } from '../../support/serving.ts';
import { metricsOf, startProxy, startWorker, untilListed } from '../support/cluster.ts';
import { CAPITAL, complete, eventually } from '../support/requests.ts';

const PROMPTS = 8;
const prompt = (words: number, first: string) =>
  `${first} ${'the river runs down to the sea '.repeat(words / 7)}`;

test('prompts that would wait are computed by the consumer, none is lost, and all answers are the undivided worker’s', async () => {
  const proxy = await startProxy(['--bypass-wait', '1ms']);
  const [producer, consumer, undivided] = await Promise.all([
    startWorker('producer', proxy),
    startWorker('consumer', proxy),
    startWorker('both', undefined),
  ]);
  const all = [producer, consumer, undivided].map(({ program }) => program);
  try {
    await untilListed(proxy, 1, 1);
    // By its answer the proxy learns how fast the producer is.
    const first = await complete(proxy.url, { ...CAPITAL, prompt: prompt(1_400, 'First'), max_tokens: 1 });
    expect(first.promptTokens).toBeGreaterThan(1_024);
    const requests = Array.from({ length: PROMPTS }, (_, i) => ({
      ...CAPITAL,
      prompt: prompt(140 + 14 * i, `Story ${i}`),
    }));
    const answers = await Promise.all(requests.map((request) => complete(proxy.url, request)));
    const expected = await Promise.all(requests.map((request) => complete(undivided.url, request)));
    expect(answers.map(({ error, text }) => error ?? text)).toEqual(expected.map(({ text }) => text));

    const alone = answers.filter(({ id }) => !id.includes('___prefill_addr_')).length;
    expect(alone).toBeGreaterThan(0);
    expect(alone).toBeLessThan(PROMPTS);
    const page = await metricsAt(proxy.url);
    expect(page.get('pd_proxy_bypassed_total{reason="wait"}')).toBe(alone);
    await eventually('both have let go of all KV', 60_000, async () => {
      const pages = await Promise.all([producer, consumer].map(metricsOf));
      return pages.every(
        (one) => one.get('pd_kv_blocks_used') === 0 && one.get('pd_kv_buffer_used_bytes') === 0,
      );
    });
    for (const program of [...all, proxy.program]) expect(await program.stop()).toBe(0);
  } finally {
    for (const program of [...all, proxy.program]) await program.stop('SIGKILL');
  }
});
