import { afterEach, expect, test } from 'vitest';
import { startProxy } from '../../support/cluster.ts';
import { Program } from '../../support/process.ts';
import { rows, withTheOthers } from '../../support/rows.ts';

const programs: Program[] = [];
afterEach(async () => {
  await Promise.all(programs.splice(0).map((program) => program.stop('SIGKILL')));
});

test.skipIf(withTheOthers)(
  'pd-proxy says where it listens and what it refuses, and ends with status 0 on SIGTERM',
  async () => {
    const proxy = await startProxy();
    programs.push(proxy.program);
    const health = (await (await fetch(`${proxy.url}/health`)).json()) as object;
    expect(health).toMatchObject({ status: 'ok', instances: [] });
    await fetch(`${proxy.url}/v1/completions?who`);
    await proxy.program.line(/^refused GET \/v1\/completions: \/v1\/completions takes POST, not GET$/);
    await fetch(`${proxy.url}/health`, { headers: { 'content-encoding': 'gzip' } });
    await proxy.program.line(/^refused GET \/health: bodies in gzip/);
    expect(proxy.program.lines.slice(-2)).toMatchObject([
      { level: 'info', code: 'METHOD_NOT_ALLOWED' },
      { level: 'info', code: 'BODY_ENCODED' },
    ]);
    expect(await proxy.program.stop()).toBe(0);
  },
);

test.each(rows(['--port'], ['--discovery-port']))(
  'pd-proxy names a taken %s, and who holds it',
  async (flag) => {
    const first = await startProxy();
    programs.push(first.program);
    const taken = flag === '--port' ? new URL(first.url).port : first.discovery.split(':')[1]!;
    const second = new Program('pd-proxy', [
      ...['--host', '127.0.0.1', '--port', '0', '--discovery-port', '0', '--log-format', 'json'],
      ...[flag, taken],
    ]);
    programs.push(second);
    const code = await new Promise((resolve) => second.child.once('close', resolve));
    expect(code).toBe(1);
    expect(second.tail()).toContain('PORT_IN_USE');
    expect(second.tail()).toContain(`port ${taken} on 127.0.0.1 is held by`);
    expect(second.tail()).toContain(`pid ${first.program.child.pid}`);
  },
);
