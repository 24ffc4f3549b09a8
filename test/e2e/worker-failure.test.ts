/** A worker whose core fails says why and exits 1, its transfer thread closed in order: a crash would hide the cause. */
import { once } from 'node:events';
import { expect, it, onTestFinished } from 'vitest';
import { Program } from '../support/process.ts';

const PRELOAD = new URL('../support/failing-core.mjs', import.meta.url).href;

it.each(['fails', 'throws'])('a core that %s', async (how) => {
  const program = new Program(
    'pd-worker',
    [
      ...['--role', 'consumer', '--device', 'host', '--host', '127.0.0.1', '--port', '0', '--kv-port', '0'],
      ...['--log-format', 'json'],
    ],
    { NODE_OPTIONS: `--import ${PRELOAD}`, PD_TEST_CORE: how },
  );
  onTestFinished(() => void program.child.kill('SIGKILL'));
  expect(await once(program.child, 'close')).toEqual([1, null]);
  expect(program.tail()).toMatch(/pd-worker: INTERNAL: the bus fell off\n/);
  expect(program.tail()).not.toContain('terminate called');
});
