import { execFile } from 'node:child_process';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import { expect, test } from 'vitest';

const dist = (path: string) => new URL(`../../dist/src/${path}`, import.meta.url).href;

test('after dispose nothing is left open: the process ends by itself', async () => {
  // Pairs open, opening, parked, with operations queued, and a stranger: all at once.
  const script = `
    import { connect } from 'node:net';
    import { hostMemory } from '${dist('device/memory.js')}';
    import { HostTransport } from '${dist('transport/host/transport.js')}';
    import { decodeUniqueId } from '${dist('transport/host/unique-id.js')}';
    const make = () => HostTransport.create({ bindHost: '127.0.0.1', announceHost: 'localhost' });
    const [a, b] = [await make(), await make()];
    const ids = [a.createUniqueId(), a.createUniqueId(), a.createUniqueId()];
    const open = (end, id, rank) => end.open({ uniqueId: id, rank, peer: 'x', timeoutMs: 60_000 });
    const [zero, one] = await Promise.all([open(a, ids[0], 0), open(b, ids[0], 1)]);
    const rest = [
      open(a, ids[1], 0),
      open(b, ids[2], 1),
      zero.send([hostMemory(1e8)], { tensorId: 't', timeoutMs: 60_000 }),
      zero.receive([hostMemory(8)], { tensorId: 't', timeoutMs: 60_000 }),
      one.send([hostMemory(1e8)], { tensorId: 't', timeoutMs: 60_000 }),
    ];
    const settled = Promise.allSettled(rest);
    const stranger = connect(decodeUniqueId(ids[0], 'x').address).on('error', () => {}).resume();
    await new Promise((resolve) => stranger.once('connect', resolve));
    await Promise.all([a.dispose(), b.dispose()]);
    console.log((await settled).map(({ status }) => status).join());
  `;
  const child = promisify(execFile)(process.execPath, ['--input-type=module', '-e', script], {
    cwd: fileURLToPath(new URL('../..', import.meta.url)),
    timeout: 60_000,
  });
  expect((await child).stdout.trim()).toBe(Array(5).fill('rejected').join());
});
