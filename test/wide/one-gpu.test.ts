/** pd-launch with producer and consumer on one GPU (a stand-in): by direct, its memory divided. */
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';
import { expect, test } from 'vitest';
import { metricsOf } from '../../support/serving.ts';
import { standInEnvironment } from '../stand-ins/build.ts';
import { complete } from '../support/requests.ts';

test('pd-launch --device cuda:0 serves with both on that GPU', async () => {
  const bin = fileURLToPath(new URL('../../bin/pd-launch', import.meta.url));
  const own = [
    '--json',
    '--free-ports',
    '--device',
    'cuda:0',
    '--kv-load-failure',
    'fail',
    '--executor',
    'host',
  ];
  const child = spawn(process.execPath, [bin, ...own, '--', '--num-blocks', '256'], {
    stdio: ['ignore', 'pipe', 'ignore'],
    // whose memory both take from
    env: { ...process.env, ...standInEnvironment(), PD_STANDIN_GPUS: `one-gpu-${process.pid}` },
  });
  try {
    const [line] = (await once(createInterface({ input: child.stdout }), 'line')) as [string];
    const { proxy, consumers } = JSON.parse(line) as {
      proxy: { url: string };
      consumers: { url: string; device: string }[];
    };
    expect(consumers[0]!.device).toBe('cuda:0');
    const request = {
      prompt: 'What is the capital of France?',
      max_tokens: 8,
      stream: true,
      seed: 1,
      temperature: 0,
    };
    const answer = await complete(proxy.url, request);
    expect(answer.error).toBeUndefined();
    expect(answer.text).toContain('Paris');
    const metrics = await metricsOf(consumers[0]!.url);
    expect(metrics.get('pd_native_connections{transport="direct"}')).toBe(1);
    expect(metrics.get('pd_kv_loads_total{result="ok"}')).toBe(1);
  } finally {
    const ended = once(child, 'exit');
    child.kill('SIGTERM');
    await ended;
  }
});
