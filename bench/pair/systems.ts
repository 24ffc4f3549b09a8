/**
 * The systems that are compared, in their own processes: one undivided worker; a proxy, a producer and a consumer; a proxy and two workers
 * of which each computes whatever it gets.
 */
import { createServer } from 'node:http';
import type { AddressInfo } from 'node:net';
import { Dealer } from 'zeromq';
import { type Group, Supervisor } from '../../src/cli/launch-supervisor.ts';
import { freePorts } from '../../src/net/free-ports.ts';
import { encodePing } from '../../src/wire/codec.ts';
import { programFile } from '../../support/root.ts';
import type { Addresses } from '../../support/serving.ts';
import { Client } from './client.ts';

export interface SystemOptions {
  readonly device: 'host' | 'cuda';
  readonly model: string;
  /** Options of every worker. */
  readonly flags: readonly string[];
  /** Of a pair's proxy and of its consumer, in one text each. */
  readonly proxyFlags?: string;
  readonly consumerFlags?: string;
  /** Of every program. */
  readonly env?: Readonly<Record<string, string>>;
  readonly onLine?: (line: string) => void;
  /** Until it serves, ms; long enough for a large checkpoint where nothing is said. */
  readonly startMs?: number;
}

export interface Undivided {
  readonly client: Client;
  readonly url: string;
  stop(): Promise<void>;
}

export interface Pair {
  readonly client: Client;
  readonly producerUrl: string;
  readonly consumerUrl: string;
  stop(): Promise<void>;
}

/** A large checkpoint takes time to read. */
const START_MS = 300_000;
/** From SIGTERM to SIGKILL. */
const STOP_MS = 15_000;
/** For requests in flight when pd-launch is told to stop, so that it ends by itself, and its workers with it. */
const DRAIN = ['--drain-timeout', '5s'];

export async function startUndivided(options: SystemOptions): Promise<Undivided> {
  const { model } = options;
  const device = options.device === 'cuda' ? 'cuda:0' : 'host';
  const args = ['--role', 'both', '--host', '127.0.0.1', '--port', '0', '--device', device];
  const { found, stop } = await start(
    [[{ name: 'undivided', args: [programFile('pd-worker'), ...args, '--model', model, ...options.flags] }]],
    (_, line) => runningOn(line),
    options,
  );
  return { client: await Client.connect(found), url: found, stop };
}

/** KV goes by the native hand-over instead of the frozen wire with one of its send types. */
export const NATIVE = 'native';

/**
 * `way`: `NATIVE` or a send type; absent: as workers choose by themselves. A request whose KV does not arrive fails, so that every answer
 * proves that KV moved.
 */
export async function startPair(options: SystemOptions, way?: string): Promise<Pair> {
  const args = ['--json', '--free-ports', ...DRAIN, '--device', options.device];
  const wire = way === undefined ? [] : ['--wire', way === NATIVE ? 'native' : 'frozen'];
  if (way !== undefined && way !== NATIVE) args.push('--send-type', way);
  if (options.proxyFlags) args.push('--proxy-flags', options.proxyFlags);
  if (options.consumerFlags) args.push('--decode-flags', options.consumerFlags);
  const { found, stop } = await start(
    [
      [
        {
          name: 'pair',
          args: [
            ...[programFile('pd-launch'), ...args, '--model', options.model, '--kv-load-failure', 'fail'],
            ...['--', ...options.flags, ...wire],
          ],
        },
      ],
    ],
    (_, line) => (line.startsWith('{"proxy"') ? (JSON.parse(line) as Addresses) : undefined),
    options,
  );
  return {
    client: await Client.connect(found.proxy.url),
    producerUrl: found.producers[0]!.url,
    consumerUrl: found.consumers[0]!.url,
    stop,
  };
}

/** Behind a proxy, which sends each prompt to one of them alone: to the one that will be done first, with regard to what it has cached. */
export interface TwoUndivided {
  readonly url: string;
  /** Of one of them: a proxy does not tokenize. */
  readonly workerUrl: string;
  stop(): Promise<void>;
}

const HOST = '127.0.0.1';
/** A proxy's bypass takes any prompt: the producer that it must know of is never asked. */
const ALONE = ['--policy', 'kv-aware', '--bypass-tokens', String(2 ** 20)];
const PING_MS = 1_000;

export async function startTwoUndivided(options: SystemOptions): Promise<TwoUndivided> {
  const { device, model, flags } = options;
  const [http, discovery] = await freePorts(2, HOST);
  const proxy = ['--host', HOST, '--port', String(http), '--discovery-port', String(discovery), ...ALONE];
  const worker = (i: number) => {
    const where = ['--host', HOST, '--port', '0', '--kv-host', HOST, '--kv-port', '0'];
    const on = ['--device', device === 'cuda' ? `cuda:${i}` : 'host', '--proxy', `${HOST}:${discovery}`];
    const args = ['--role', 'consumer', ...where, ...on, '--model', model, ...flags];
    return { name: `undivided-${i}`, args: [programFile('pd-worker'), ...args] };
  };
  const url = `http://${HOST}:${http}`;
  const urls = new Map<string, string>();
  const nobody = await Nobody.start(`${HOST}:${discovery}`);
  try {
    const { found, stop } = await start(
      [[{ name: 'proxy', args: [programFile('pd-proxy'), ...proxy] }], [worker(0), worker(1)]],
      (name, line) => {
        const own = runningOn(line);
        if (own !== undefined && name !== 'proxy') urls.set(name, own);
        return urls.size === 2 ? [...urls.values()] : undefined;
      },
      options,
      () => lists(url, 2),
    );
    return { url, workerUrl: found[0]!, stop: () => stop().finally(() => nobody.stop()) };
  } catch (error) {
    await nobody.stop();
    throw error;
  }
}

/** A producer that is only announced: a proxy passes nothing on before it knows one. */
class Nobody {
  readonly #stop: () => Promise<void>;

  private constructor(stop: () => Promise<void>) {
    this.#stop = stop;
  }

  static async start(discovery: string): Promise<Nobody> {
    const server = createServer((request, out) => {
      out.writeHead(request.url === '/health' ? 200 : 404);
      out.end();
    });
    await new Promise<void>((resolve) => server.listen(0, HOST, resolve));
    const address = `${HOST}:${(server.address() as AddressInfo).port}`;
    const dealer = new Dealer({ routingId: address, linger: 0, sendTimeout: PING_MS });
    dealer.connect(`tcp://${discovery}`);
    const body = encodePing({ type: 'P', http_address: address, zmq_address: address });
    let sending: Promise<void> = Promise.resolve();
    const ping = () => {
      sending = sending.then(() => dealer.send(body)).catch(() => {}); // a proxy that is not there yet
    };
    ping();
    const timer = setInterval(ping, PING_MS);
    return new Nobody(async () => {
      clearInterval(timer);
      await sending;
      dealer.close();
      server.close();
      server.closeAllConnections();
    });
  }

  stop(): Promise<void> {
    return this.#stop();
  }
}

async function lists(url: string, consumers: number): Promise<boolean> {
  try {
    const response = await fetch(`${url}/health`, { signal: AbortSignal.timeout(PING_MS) });
    const { counts } = (await response.json()) as { counts?: { producer?: number; consumer?: number } };
    return counts?.producer === 1 && counts.consumer === consumers;
  } catch {
    return false; // not there yet
  }
}

function runningOn(line: string): string | undefined {
  return /Running on (http:\/\/[^\s"]+)/.exec(line)?.[1];
}

/** Resolves once `find` has found what it looks for in a program's lines, and `ready` is true. */
async function start<T>(
  groups: readonly Group[],
  find: (name: string, line: string) => T | undefined,
  { onLine, env, startMs = START_MS }: SystemOptions,
  ready: () => Promise<boolean> = async () => true,
): Promise<{ readonly found: T; stop(): Promise<void> }> {
  let found: T | undefined;
  const supervisor = new Supervisor({
    groups: groups.map((group) => group.map((spec) => ({ ...spec, ...(env && { env }) }))),
    restart: { firstPauseMs: 0, maxPauseMs: 0, deaths: 1, windowMs: 1 }, // whatever ends is a failure
    killAfterMs: STOP_MS,
    onLine: (name, line) => {
      found ??= find(name, line);
      onLine?.(`${name} | ${line}`);
    },
    say: () => {},
  });
  supervisor.start();
  try {
    await supervisor.untilReady(async () => found !== undefined && (await ready()), startMs);
  } catch (error) {
    await supervisor.stop();
    throw error;
  }
  return { found: found!, stop: () => supervisor.stop() };
}
