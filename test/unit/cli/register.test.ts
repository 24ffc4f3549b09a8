import { expect, it } from 'vitest';
import { registerOptions } from '../../../src/cli/register.ts';

const WHAT = ['--role', 'producer', '--http', '10.0.0.3:8000', '--kv', '10.0.0.3:21001'];

it('tells several proxies, or etcd', () => {
  const told = registerOptions([...WHAT, '--proxy', 'a:1', 'b:2'], { PD_REGISTRY: 'etcd://c:3/x' });
  expect(told).toMatchObject({
    role: 'producer',
    http: { host: '10.0.0.3', port: 8000 },
    kv: { host: '10.0.0.3', port: 21001 },
    proxy: [{ host: 'a' }, { host: 'b' }],
    registry: { prefix: 'x/' },
    intervalMs: 3_000,
  });
});

it.each([[WHAT], [[...WHAT.slice(2), '--proxy', 'a:1']], [[...WHAT.slice(0, 4), '--proxy', 'a:1']]])(
  '%j is not enough',
  (argv) => {
    expect(() => registerOptions(argv, {})).toThrow(/needs --role, --http and --kv, and whom to tell/);
  },
);
