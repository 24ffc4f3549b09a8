/** Whole systems on two stand-in GPUs, whose NCCL chooses its bootstrap's address as the real one does and says so. */
import { networkInterfaces } from 'node:os';
import { afterEach, expect, test } from 'vitest';
import { isLoopback } from '../../src/net/address.ts';
import { localAddress } from '../../src/net/local.ts';
import { standInEnvironment } from '../stand-ins/build.ts';
import { Program } from '../support/process.ts';
import { complete } from '../support/requests.ts';

const SMALL = ['--num-blocks', '64', '--kv-buffer-size', '16MB'];
const own6 = localAddress(6, { env: {} });
const addresses = Object.values(networkInterfaces()).flatMap((list) =>
  (list ?? []).map(({ address }) => address),
);

const programs: Program[] = [];
afterEach(async () => {
  await Promise.all(programs.splice(0).map((program) => program.stop('SIGTERM')));
});

/** Bound and told, and where NCCL's bootstrap is to be. */
type Case = readonly [host: string, shown: string];
const CASES: readonly Case[] = [
  ...(isLoopback(own6) ? [] : [[own6, own6] as const]),
  ['127.0.0.1', '127.0.0.1'],
  // NCCL never takes ::1; made to, it opens no communicator at all.
  ['::1', '127.0.0.1'],
];
if (isLoopback(own6))
  console.warn('nccl-bootstrap: no IPv6 address here but loopback: that case is left out');
const hasIpv6 = addresses.includes('::1');

test.for(CASES)('a pair on %s bootstraps at %s, and KV moves', async ([host, shown], { skip }) => {
  skip(host.includes(':') && !hasIpv6, 'this machine has no IPv6');
  const args = ['--free-ports', '--host', host, '--device', 'cuda', '--executor', 'host'];
  const program = new Program(
    'pd-launch',
    [...args, '--kv-load-failure', 'fail', '--log-format', 'json', '--', ...SMALL],
    { ...standInEnvironment(), NCCL_DEBUG: 'INFO', PD_HOST_IP: '', PD_TRANSPORT: 'nccl' },
  );
  programs.push(program);
  const [, url] = await program.line(/ready: (http:\/\/\S+) serves/);
  const request = { prompt: 'What is the capital of France?', max_tokens: 4, temperature: 0 };
  const answer = await complete(url!, { ...request, seed: 1, stream: true });
  expect(answer.error).toBeUndefined();
  // Each worker's output takes its own way here: that of one may come after the answer.
  const bootstrap = /NCCL INFO Bootstrap: Using [^:]+:(.*)<0>$/;
  await program.line(bootstrap);
  const first = program.lines.findIndex(({ msg }) => bootstrap.test(msg));
  await program.line(bootstrap, 60_000, first + 1);
  const said = program.lines.flatMap(({ msg, instance }) => {
    const match = bootstrap.exec(msg);
    return match ? [`${String(instance)} ${match[1]}`] : [];
  });
  expect(said.sort()).toEqual([`consumer-0 ${shown}`, `producer-0 ${shown}`]);
});
