import { expect, test } from 'vitest';
import { wayFinding } from '../../../src/doctor/native-way.ts';
import type { Ways } from '../../../src/transfer/native/hello.ts';

const here: Ways = { transports: ['direct', 'nccl'], direct: { bootId: 'b', path: '' } };
const there: Ways = { transports: ['direct', 'nccl'], direct: { bootId: 'b', path: '/run/x' } };
const answers = () => Promise.resolve(undefined);
const refuses = () => Promise.resolve('ECONNREFUSED');

test.each([
  ['both on this host', here, there, answers, 'ok', /by direct/],
  [
    'a socket that does not answer',
    here,
    there,
    refuses,
    'info',
    /by nccl, not direct: its socket \/run\/x: ECONNREFUSED/,
  ],
  [
    'another host',
    here,
    { ...there, direct: { bootId: 'c', path: '/run/x' } },
    answers,
    'info',
    /by nccl.*another host/,
  ],
  ['its setting', here, { transports: ['nccl'] }, answers, 'info', /by nccl.*the peer does not offer direct/],
  [
    'our setting',
    { transports: ['nccl'] },
    there,
    answers,
    'info',
    /by nccl.*this worker does not offer direct/,
  ],
  ['a host and a GPU', { transports: ['host'] }, there, answers, 'fail', /no way for KV is open/],
  ['a frozen peer', here, { transports: [] }, answers, 'warn', /frozen wire alone/],
  ['a frozen worker here', undefined, there, answers, 'info', /a worker here would speak the frozen wire/],
] as const)('which way KV would travel, and why: %s', async (_, mine, theirs, knock, level, what) => {
  expect(await wayFinding(mine, theirs as Ways, knock)).toMatchObject({
    level,
    what: expect.stringMatching(what),
  });
});
