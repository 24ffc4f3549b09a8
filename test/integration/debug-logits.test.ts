/** `--debug-logits` on both halves of a pair, into one directory: a producer's row, then the consumer's. */
import { readdirSync } from 'node:fs';
import { expect, it } from 'vitest';
import { parseHostPort } from '../../src/net/address.ts';
import { engineRequestId, proxyRequestId } from '../../src/wire/ids.ts';
import { CoreHarness, greedy, textOf } from '../support/core-harness.ts';
import { argmax, readLogits } from '../support/logits-files.ts';
import { tempDir } from '../support/temp-dir.ts';

it('both halves write what they sample, under one request', async () => {
  const debugLogits = await tempDir();
  // the warning at start is for people
  const options = { debugLogits, log: { level: 'silent', format: 'json' } } as const;
  const halves = await Promise.all([
    CoreHarness.start({ role: 'producer', ...options }),
    CoreHarness.start({ role: 'consumer', ...options }),
  ]);
  const [{ core: producer }, { core: consumer }] = halves;
  try {
    const [prefill, decode] = halves.map(({ info }) => parseHostPort(info.kvAddress!));
    const id = `cmpl-${proxyRequestId(prefill!, decode!, 'f'.repeat(32))}-0`;
    const prompt = Array.from({ length: 70 }, (_, i) => 10 + ((i * 17) % 700));
    const first = await producer.generate(greedy(engineRequestId(id, '0000000a'), prompt, { maxTokens: 1 }));
    const answer = textOf(await consumer.generate(greedy(engineRequestId(id, '0000000b'), prompt)));

    const { vocabSize } = halves[0].info;
    const of = (role: string) => {
      const file = readdirSync(debugLogits).find((name) => name.endsWith(`.${role}.f32`))!;
      return readLogits(debugLogits, file.slice(0, -'.f32'.length), vocabSize);
    };
    const [computed, generated] = [of('producer'), of('consumer')];
    expect(computed.rows.map(argmax)).toEqual(textOf(first));
    expect(generated.rows.map(argmax)).toEqual(answer);
    expect(generated.rows[0]).toEqual(computed.rows[0]);
    expect(generated.lines.map(({ position }) => position)).toEqual(answer.map((_, i) => 69 + i));
    // the prompt's last token is all that a consumer computes of it
    expect(generated.lines[0]?.tokens).toEqual(prompt.slice(-1));
    const all = [...computed.lines, ...generated.lines];
    expect(new Set(all.map(({ request }) => request))).toEqual(new Set([id]));
  } finally {
    await Promise.all([producer.shutdown(), consumer.shutdown()]);
  }
});
