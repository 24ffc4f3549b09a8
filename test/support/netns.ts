/**
 * A network of a test's own: a namespace with loopback and one interface, of one address family or both, with no way out and so without a
 * name server, and an /etc/hosts of its own where the test gives one. Nothing to clean up: it ends
 * with the process that holds it. Made by `unshare` in a user namespace, so not only by root; where that is not allowed, `available`
 * says why.
 */
import { type ChildProcess, execFile, execFileSync, spawn } from 'node:child_process';
import { once } from 'node:events';
import { createInterface } from 'node:readline';
import { promisify } from 'node:util';

/** `loopback4`: IPv6, and of IPv4 nothing but 127.0.0.1, as machines of networks without IPv4 have it. */
export type Families = 'ipv4' | 'ipv6' | 'dual' | 'loopback4';

export const NETNS_IPV4 = '10.99.0.1';
/** What is sent there is lost without a word, as by a firewall. */
export const NETNS_SILENT_IPV4 = '10.99.0.2';
export const NETNS_IPV6 = 'fd99::1';
/** Means something only with its zone: `fe80::99%pd0`. */
export const NETNS_LINK = 'fe80::99';

/** A cable with both ends here: kernels without dummy interfaces have these. */
const BOTH = [
  'ip link set lo up',
  'ip link add pd0 type veth peer name pd1',
  'ip link set pd0 up',
  'ip link set pd1 up',
];
const ADD4 = `ip addr add ${NETNS_IPV4}/24 dev pd0; ip neigh add ${NETNS_SILENT_IPV4} lladdr 02:00:00:00:00:02 dev pd0 nud permanent`;
/** nodad: at once, not after the second that looking for the same address elsewhere takes. */
const ADD6 = `ip addr add ${NETNS_IPV6}/64 dev pd0 nodad; ip addr add ${NETNS_LINK}/64 dev pd0 nodad`;
const SETUP: Readonly<Record<Families, readonly string[]>> = {
  ipv4: ['echo 1 >/proc/sys/net/ipv6/conf/all/disable_ipv6', ...BOTH, ADD4],
  ipv6: [...BOTH, 'ip -4 addr flush dev lo', ADD6],
  dual: [...BOTH, ADD4, ADD6],
  loopback4: [...BOTH, ADD6],
};

/** Why namespaces cannot be made here, or undefined where they can. */
export function netnsUnavailable(): string | undefined {
  try {
    execFileSync('unshare', ['-rn', 'sh', '-ec', SETUP.ipv6.join('\n')], { stdio: 'pipe' });
    execFileSync('nsenter', ['--version'], { stdio: 'ignore' });
    return undefined;
  } catch (error) {
    const { stderr, message } = error as Error & { stderr?: Buffer };
    return `no network namespaces here: ${String(stderr ?? '').trim() || message}`;
  }
}

export class NetworkNamespace {
  readonly #holder: ChildProcess;
  /** Before a command line: runs it in the namespace, as the same process. */
  readonly prefix: readonly string[];

  private constructor(holder: ChildProcess, kinds: readonly string[]) {
    this.#holder = holder;
    this.prefix = ['nsenter', '--target', String(holder.pid), '--user', '--preserve-credentials', ...kinds];
  }

  /** `hostsFile`: in place of /etc/hosts, for what runs inside. */
  static async create(families: Families, hostsFile?: string): Promise<NetworkNamespace> {
    const hosts = hostsFile === undefined ? [] : [`mount --bind ${hostsFile} /etc/hosts`];
    const script = [...SETUP[families], ...hosts, 'echo ready', 'exec cat'].join('\n');
    const kinds = ['--net', ...(hostsFile === undefined ? [] : ['--mount'])];
    const holder = spawn('unshare', ['--map-root-user', ...kinds, 'sh', '-ec', script], {
      stdio: ['pipe', 'pipe', 'inherit'],
    });
    const [line] = (await once(createInterface({ input: holder.stdout! }), 'line')) as [string];
    if (line !== 'ready') throw new Error(`namespace: ${line}`);
    return new NetworkNamespace(holder, kinds);
  }

  /** stdout of a command that runs inside. */
  async run(command: string, ...args: string[]): Promise<string> {
    const [nsenter, ...rest] = this.prefix;
    const { stdout } = await promisify(execFile)(nsenter!, [...rest, command, ...args]);
    return stdout;
  }

  /** HTTP from inside: the status, and the body as JSON. Not `fetch`, whose URLs have no place for a zone id. */
  async fetchJson(url: string, body?: object): Promise<{ readonly status: number; readonly body: unknown }> {
    const program = `
      import { request } from 'node:http';
      const [url, body] = process.argv.slice(1);
      const [, hostname, port, path] = /^http:\\/\\/\\[?([^/\\]]+?)\\]?:(\\d+)(\\/.*|)$/.exec(url);
      const headers = { 'content-type': 'application/json', host: 'test' };
      request({ hostname, port, path, method: body ? 'POST' : 'GET', headers }, async (answer) => {
        const text = (await answer.toArray()).join('');
        console.log(JSON.stringify({ status: answer.statusCode, text }));
      }).end(body);`;
    const args = ['--input-type=module', '-e', program, url, ...(body ? [JSON.stringify(body)] : [])];
    const { status, text } = JSON.parse(await this.run(process.execPath, ...args)) as {
      status: number;
      text: string;
    };
    let parsed: unknown = text;
    try {
      parsed = JSON.parse(text);
    } catch {
      // plain text, such as /metrics
    }
    return { status, body: parsed };
  }

  /** Idempotent. Processes that were started inside are their starters'. */
  async close(): Promise<void> {
    if (this.#holder.exitCode !== null || this.#holder.signalCode !== null) return;
    const ended = once(this.#holder, 'exit');
    this.#holder.stdin!.end();
    await ended;
  }
}
