/** A proxy, producers and consumers as real processes on free ports, and what a check asks of them. */
import { freePorts } from '../../src/net/free-ports.ts';
import { metricsOf as metricsAt } from '../../support/serving.ts';
import { Program } from './process.ts';

export interface WorkerHandle {
  readonly role: 'producer' | 'consumer' | 'both';
  readonly program: Program;
  /** `http://127.0.0.1:port`. */
  readonly url: string;
  /** `ip:port` of the ROUTER; empty for role `both`. */
  readonly kvAddress: string;
}

export interface ProxyHandle {
  readonly program: Program;
  readonly url: string;
  /** `ip:port` that pings go to. */
  readonly discovery: string;
}

const QUIET = ['--log-format', 'json', '--log-level', 'info'];
/** For the environment of our programs: a busy machine is slow, not broken. Tests give a flag where a deadline is to pass. */
export const PATIENT = {
  PD_CONNECT_TIMEOUT: '60s',
  PD_ANSWER_TIMEOUT: '60s',
  PD_PAIR_INIT_TIMEOUT: '60s',
  PD_KV_TRANSFER_TIMEOUT: '60s',
  PD_INSTANCE_TIMEOUT: '60s',
};

/** Ports to give to a program that is started again on them: the system gives them to nobody else meanwhile. */
export function keptPorts(count: number): Promise<number[]> {
  return freePorts(count, '127.0.0.1');
}

/** `prefix`: before the command line, such as that of a network namespace. */
export async function startProxy(
  args: readonly string[] = [],
  prefix: readonly string[] = [],
): Promise<ProxyHandle> {
  const ports = args.includes('--port') ? [] : ['--port', '0', '--discovery-port', '0'];
  const all = ['--host', '127.0.0.1', ...ports, ...QUIET, ...args];
  const program = new Program('pd-proxy', all, PATIENT, prefix);
  const [, url] = await program.line(/Running on (http:\/\/\S+)/);
  const [, discovery] = await program.line(/[Dd]iscovery on (\S+)/);
  return { program, url: url!, discovery: discovery!.replace(/^tcp:\/\//, '') };
}

export async function startWorker(
  role: WorkerHandle['role'],
  proxy: ProxyHandle | undefined,
  args: readonly string[] = [],
  prefix: readonly string[] = [],
): Promise<WorkerHandle> {
  const has = (flag: string) => args.includes(flag);
  const kv = ['--kv-host', '127.0.0.1', ...(has('--kv-port') ? [] : ['--kv-port', '0'])];
  const all = [
    ...['--role', role, '--host', '127.0.0.1'],
    ...(has('--device') ? [] : ['--device', 'host']),
    ...(has('--port') ? [] : ['--port', '0']),
    ...(role === 'both' ? [] : kv),
    ...(proxy && role !== 'both' ? ['--proxy', proxy.discovery] : []),
    ...QUIET,
    ...args,
  ];
  const program = new Program('pd-worker', all, PATIENT, prefix);
  const [, url] = await program.line(/Running on (http:\/\/\S+)/);
  const kvAddress = role === 'both' ? '' : (await program.line(/zmq_address:([^,]+),/))[1]!;
  return { role, program, url: url!, kvAddress };
}

/** Resolves once the proxy lists so many of each role. */
export async function untilListed(
  proxy: ProxyHandle,
  producers: number,
  consumers: number,
  timeoutMs = 60_000,
): Promise<void> {
  const deadline = performance.now() + timeoutMs;
  for (;;) {
    const health = (await (await fetch(`${proxy.url}/health`)).json()) as {
      instances: { role: string }[];
    };
    const count = (role: string) => health.instances.filter((instance) => instance.role === role).length;
    if (count('producer') === producers && count('consumer') === consumers) return;
    if (performance.now() > deadline) {
      throw new Error(`the proxy lists ${JSON.stringify(health)}, not ${producers} + ${consumers}`);
    }
    await new Promise((resolve) => setTimeout(resolve, 100)); // discovery has no event to await from outside
  }
}

export function metricsOf({ url }: WorkerHandle): Promise<ReadonlyMap<string, number>> {
  return metricsAt(url);
}
