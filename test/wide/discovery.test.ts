/** Fleets that know themselves without etcd (test/wide/etcd.test.ts has that): by names of instances, pings to a name with two addresses, or who pings for them. */
import { afterEach, describe, expect, it } from 'vitest';
import { formatHostPort } from '../../src/net/address.ts';
import { freePorts } from '../../src/net/free-ports.ts';
import { startProxy, startWorker, untilListed } from '../support/cluster.ts';
import { askThrough, countsOf, type FleetPrograms, load, RIGHT, startWorkers } from '../support/fleet.ts';
import { Program } from '../support/process.ts';

/** After which a killed worker is forgotten; live ones answer and ping every second. */
const TIMEOUT = ['--instance-timeout', '30s'];
const PING = ['--ping-interval', '1s'];

const closing: (() => Promise<unknown>)[] = [];
afterEach(async () => {
  for (const close of closing.splice(0).reverse()) await close();
});

/** The proxies are told of the workers. */
async function byName(): Promise<FleetPrograms> {
  const workers = await startWorkers((role) => startWorker(role, undefined));
  const names = workers.map(({ url }) => url.replace('http://', ''));
  const args = ['--instances', ...names, ...TIMEOUT];
  return { proxies: await Promise.all([startProxy(args), startProxy(args)]), workers };
}

/** The workers are told of a name, at each of whose addresses there is a proxy. */
async function byTwoAddresses(): Promise<FleetPrograms> {
  const [port] = await freePorts(1, '127.0.0.1');
  const start = (host: string) =>
    startProxy(['--port', '0', '--discovery-host', host, '--discovery-port', `${port}`, ...TIMEOUT]);
  const proxies = await Promise.all(['127.0.0.1', '::1'].map(start));
  const name = formatHostPort({ host: 'localhost', port: port! });
  return {
    proxies,
    workers: await startWorkers((role) => startWorker(role, undefined, ['--proxy', name, ...PING])),
  };
}

describe.each([
  ['by names of instances', byName],
  ['by pings to a name with two addresses', byTwoAddresses],
])('a fleet that knows itself %s', (_, start) => {
  it('serves while a worker and a proxy are killed', async () => {
    const { proxies, workers } = await start();
    for (const { program } of [...proxies, ...workers]) closing.push(() => program.stop('SIGKILL'));
    for (const proxy of proxies) await untilListed(proxy, 2, 2);
    const clients = load(proxies);
    await clients.more(4);
    await workers[0]!.program.stop('SIGKILL');
    await clients.more(4);
    const gone = /Remove .*\(producer\): (it answers no more|its pings have stopped)/;
    for (const { program } of proxies) await program.line(gone, 120_000);
    for (const proxy of proxies) expect(await countsOf(proxy)).toEqual({ producer: 1, consumer: 2 });
    await proxies[0]!.program.stop('SIGKILL');
    await clients.more(4);
    await clients.end();
    expect(await askThrough([proxies[1]!])).toMatch(RIGHT);
    expect(await countsOf(proxies[1]!)).toEqual({ producer: 1, consumer: 2 });
  });
});

it('workers that others ping for are served by, and go as they are killed', async () => {
  const proxy = await startProxy(TIMEOUT);
  const workers = await Promise.all(
    (['producer', 'consumer'] as const).map((role) => startWorker(role, undefined)),
  );
  const others = workers.map(({ role, url, kvAddress }) => {
    const what = ['--role', role, '--http', url.replace('http://', ''), '--kv', kvAddress];
    const to = ['--proxy', proxy.discovery, '--ping-interval', '1s', '--log-format', 'json'];
    return new Program('pd-proxy', ['register', ...what, ...to]);
  });
  for (const { program } of [proxy, ...workers]) closing.push(() => program.stop('SIGKILL'));
  for (const other of others) closing.push(() => other.stop('SIGKILL'));
  await untilListed(proxy, 1, 1);
  expect(await askThrough([proxy])).toMatch(RIGHT);
  await workers[0]!.program.stop('SIGKILL');
  await others[0]!.line(/is not well: .*ECONNREFUSED.*It is announced no more/);
  await proxy.program.line(/Remove .*\(producer\): its pings have stopped/, 120_000);
  for (const other of others) expect(await other.stop()).toBe(0);
});
