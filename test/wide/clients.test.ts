/** Clients of OpenAI's API as people use them (test/wide/clients), on the Node that they ask for, against a worker and a pair. */
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { expect, it } from 'vitest';
import { startProxy, startWorker, untilListed } from '../support/cluster.ts';

/** What the clients say, where they are not content. */
async function runClients(url: string): Promise<string> {
  const child = spawn('./scripts/node-version.sh', ['22', 'clients'], {
    env: { ...process.env, PD_BASE_URL: url },
    stdio: ['ignore', 'pipe', 'pipe'],
  });
  const output: Buffer[] = [];
  for (const stream of [child.stdout, child.stderr]) stream.on('data', (data: Buffer) => output.push(data));
  const [code] = await once(child, 'close');
  return code === 0 ? '' : Buffer.concat(output).toString();
}

it('serves the official clients, undivided', async () => {
  const worker = await startWorker('both', undefined);
  try {
    expect(await runClients(worker.url)).toBe('');
  } finally {
    await worker.program.stop();
  }
});

it('serves them through the proxy, prefill and decode apart', async () => {
  const proxy = await startProxy();
  const workers = await Promise.all([startWorker('producer', proxy), startWorker('consumer', proxy)]);
  try {
    await untilListed(proxy, 1, 1);
    const { paths } = (await (await fetch(`${proxy.url}/openapi.json`)).json()) as { paths: object };
    expect(Object.keys(paths)).toContain('/v1/responses');
    expect(await runClients(proxy.url)).toBe('');
  } finally {
    await Promise.all([proxy.program, ...workers.map(({ program }) => program)].map((each) => each.stop()));
  }
});
