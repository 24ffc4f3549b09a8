/** The two systems that are compared, in their own processes: one undivided worker; a proxy, a producer and a consumer. */
import { Supervisor } from '../../src/cli/launch-supervisor.ts';
import { programFile } from '../../support/root.ts';
import type { Addresses } from '../../support/serving.ts';
import { Client } from './client.ts';

export interface SystemOptions {
  readonly device: 'host' | 'cuda';
  readonly model: string;
  /** Options of every worker. */
  readonly flags: readonly string[];
  /** Of every program: pd-launch passes no flags to its proxy. */
  readonly env?: Readonly<Record<string, string>>;
  readonly onLine?: (line: string) => void;
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
export async function startUndivided(options: SystemOptions): Promise<Undivided> {
  const device = options.device === 'cuda' ? 'cuda:0' : 'host';
  const args = ['--role', 'both', '--host', '127.0.0.1', '--port', '0', '--device', device];
  const { found, stop } = await start(
    'undivided',
    [programFile('pd-worker'), ...args, '--model', options.model, ...options.flags],
    (line) => /Running on (http:\/\/[^\s"]+)/.exec(line)?.[1],
    options.onLine,
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
  const args = ['--json', '--free-ports', '--device', options.device];
  const wire = way === undefined ? [] : ['--wire', way === NATIVE ? 'native' : 'frozen'];
  if (way !== undefined && way !== NATIVE) args.push('--send-type', way);
  const { found, stop } = await start(
    'pair',
    [
      ...[programFile('pd-launch'), ...args, '--model', options.model, '--kv-load-failure', 'fail'],
      ...['--', ...options.flags, ...wire],
    ],
    (line) => (line.startsWith('{"proxy"') ? (JSON.parse(line) as Addresses) : undefined),
    options.onLine,
    options.env,
  );
  return {
    client: await Client.connect(found.proxy.url),
    producerUrl: found.producers[0]!.url,
    consumerUrl: found.consumers[0]!.url,
    stop,
  };
}

async function start<T>(
  name: string,
  args: readonly string[],
  find: (line: string) => T | undefined,
  onLine?: (line: string) => void,
  env?: Readonly<Record<string, string>>,
): Promise<{ readonly found: T; stop(): Promise<void> }> {
  let found: T | undefined;
  const supervisor = new Supervisor({
    groups: [[{ name, args, ...(env && { env }) }]],
    restart: { firstPauseMs: 0, maxPauseMs: 0, deaths: 1, windowMs: 1 }, // whatever ends is a failure
    killAfterMs: STOP_MS,
    onLine: (_, line) => {
      found ??= find(line);
      onLine?.(`${name} | ${line}`);
    },
    say: () => {},
  });
  supervisor.start();
  try {
    await supervisor.untilReady(async () => found !== undefined, START_MS);
  } catch (error) {
    await supervisor.stop();
    throw error;
  }
  return { found: found!, stop: () => supervisor.stop() };
}
