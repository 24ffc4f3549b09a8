/** Fleets that know themselves without etcd (test/wide/etcd.test.ts has that): by names of instances, and by pings to a name with two addresses. */
import { afterEach, describe, expect, it } from 'vitest';
import { formatHostPort } from '../../src/net/address.ts';
import { freePorts } from '../../src/net/free-ports.ts';
import { startProxy, startWorker, untilListed } from '../support/cluster.ts';
import { askThrough, countsOf, type FleetPrograms, load, RIGHT, startWorkers } from '../support/fleet.ts';

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
