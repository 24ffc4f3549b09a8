/** What a worker would bind and announce: ports free or in use, addresses that peers must be able to reach. */
import { isIP } from 'node:net';
import { networkInterfaces } from 'node:os';
import type { WorkerConfig } from '../config/worker-config.ts';
import { PdError } from '../errors.ts';
import {
  formatHostPort,
  type HostPort,
  isLoopback as isLoopbackAddress,
  isUnspecified,
} from '../net/address.ts';
import { localAddress } from '../net/local.ts';
import { assertBindable } from '../net/port-holder.ts';
import { isLocalhost } from '../net/resolve.ts';
import { type Finding, fail, info, ok, type Section, warn } from './finding.ts';

/** The runbook's, checked when no worker in particular was asked about. */
const RUNBOOK: readonly { readonly port: number; readonly what: string; readonly flag: string }[] = [
  { port: 10_002, what: 'HTTP of the proxy', flag: '--port' },
  { port: 30_002, what: 'discovery of the proxy', flag: '--discovery-port' },
  { port: 8_081, what: 'HTTP of the producer', flag: '--port' },
  { port: 8_082, what: 'KV of the producer', flag: '--kv-port' },
  { port: 8_083, what: 'HTTP of the consumer', flag: '--port' },
  { port: 8_084, what: 'KV of the consumer', flag: '--kv-port' },
];

/** Those of the worker that was asked about. A port in use would stop it. */
export async function workerPorts(config: WorkerConfig): Promise<Section> {
  const { http, transfer, role } = config;
  const findings = [await portFinding(http, 'HTTP', '--port')];
  if (role !== 'both') {
    const { bind, rank } = transfer;
    const kv = { host: bind.host, port: bind.port + (bind.port === 0 ? 0 : rank) };
    findings.push(await portFinding(kv, 'KV', '--kv-port'), DATA_PORTS);
  }
  return { title: 'Ports', findings };
}

/** No worker was said to need them, so one in use is worth a warning only; `running`: the system itself uses them. */
export async function runbookPorts(running: boolean): Promise<Section> {
  const findings = await Promise.all(
    RUNBOOK.map(async ({ port, what, flag }): Promise<Finding> => {
      const finding = await portFinding({ host: '0.0.0.0', port }, what, flag);
      if (finding.level !== 'fail') return finding;
      return running ? info(finding.what) : warn(finding.what, finding.fix);
    }),
  );
  const free = findings.filter(({ level }) => level === 'ok').length;
  const shown = findings.filter(({ level }) => level !== 'ok');
  const ports = RUNBOOK.map(({ port }) => port).join(' ');
  return {
    title: 'Ports',
    findings: [
      ...(free > 0 ? [ok(`${free} of the runbook's ${RUNBOOK.length} ports are free (${ports})`)] : []),
      ...shown,
      DATA_PORTS,
    ],
  };
}

const DATA_PORTS = info(
  'KV itself uses ports that the system chooses: a firewall between two workers must let all TCP pass',
);

async function portFinding(address: HostPort, what: string, flag: string): Promise<Finding> {
  if (address.port === 0) return ok(`${what}: any free port`);
  try {
    await assertBindable(address, what);
    return ok(`${what}: ${formatHostPort(address)} is free`);
  } catch (cause) {
    const error = PdError.from(cause);
    const fix =
      error.code === 'PORT_IN_USE'
        ? `stop the process that holds it, or choose another port with ${flag}`
        : `give an address of this machine with ${flag.replace('port', 'host')}`;
    return fail(error.message, fix);
  }
}

export function addressSection(config: WorkerConfig): Section {
  const own = Object.values(networkInterfaces()).flatMap((list) => list ?? []);
  const others = own.filter(({ internal }) => !internal).map(({ address }) => address);
  const { announceHost, bind } = config.transfer;
  const kv = formatHostPort({ host: announceHost, port: bind.port });
  const http = formatHostPort({ host: config.httpAnnounceHost, port: config.http.port });
  const announced: readonly (readonly [string, string, string])[] = [
    ...(config.role === 'both' && config.proxy.length === 0
      ? []
      : ([['KV', announceHost, '--kv-announce-host']] as const)),
    ['HTTP', config.httpAnnounceHost, '--http-announce-host'],
  ];
  const findings = announced.map(([what, host, flag]): Finding => {
    const text = `${what} address announced to others: ${what === 'KV' ? kv : http}`;
    if (isUnspecified(host))
      return fail(`${text}, which nobody else can reach`, `give this machine's address with ${flag}`);
    if (isLoopback(host)) {
      const fix =
        others.length > 0
          ? `for peers on other machines: --${what === 'KV' ? 'kv-' : ''}host ${others[0]}`
          : 'peers on other machines need this one to be on a network';
      return warn(`${text}: only this machine can reach it`, fix);
    }
    if (isIP(host) === 0 || own.some(({ address }) => address === host)) return ok(text);
    return warn(
      `${text}, which is not an address of this machine`,
      'correct behind NAT; otherwise fix PD_HOST_IP',
    );
  });
  const here = info(`addresses of this machine: ${others.join(', ') || 'loopback only'}`);
  return { title: 'Addresses', findings: [here, ...findings] };
}

/** When no worker in particular was asked about: what one would announce by default. */
export function defaultAddresses(): Section {
  const title = 'Addresses';
  try {
    const host = localAddress(4);
    const text = `workers here announce ${host}, unless --kv-host or PD_HOST_IP says otherwise`;
    const finding = isLoopback(host) ? warn(`${text}: only this machine can reach it`) : ok(text);
    return { title, findings: [finding] };
  } catch (cause) {
    return { title, findings: [fail(PdError.from(cause).message, 'fix or unset PD_HOST_IP')] };
  }
}

/** By name or by address. */
export function isLoopback(host: string): boolean {
  return isLocalhost(host) || isLoopbackAddress(host);
}
