/** A real etcd for a test: Debian's package etcd-server. */
import { type ChildProcess, spawn, spawnSync } from 'node:child_process';
import { once } from 'node:events';
import { freePorts } from '../../src/net/free-ports.ts';

export const NO_ETCD = spawnSync('etcd', ['--version']).error !== undefined;

const HOST = '127.0.0.1';

export class EtcdServer {
  readonly #dir: string;
  readonly #port: number;
  readonly #peerPort: number;
  readonly #more: readonly string[];
  #process: ChildProcess | undefined;
  /** Of its user root, once it asks for one. */
  #token: string | undefined;

  private constructor(dir: string, port: number, peerPort: number, more: readonly string[]) {
    this.#dir = dir;
    this.#port = port;
    this.#peerPort = peerPort;
    this.#more = more;
  }

  /** `more`: flags of its own. */
  static async start(dir: string, more: readonly string[] = []): Promise<EtcdServer> {
    const [port, peerPort] = await freePorts(2, HOST);
    const server = new EtcdServer(dir, port!, peerPort!, more);
    await server.start();
    return server;
  }

  get address(): { readonly host: string; readonly port: number } {
    return { host: HOST, port: this.#port };
  }

  /** With what it had written before, where it was killed. Resolves once it answers. */
  async start(): Promise<void> {
    const client = `http://${HOST}:${this.#port}`;
    const peer = `http://${HOST}:${this.#peerPort}`;
    this.#process = spawn(
      'etcd',
      [
        ...['--data-dir', this.#dir, '--listen-client-urls', client, '--advertise-client-urls', client],
        ...[
          '--listen-peer-urls',
          peer,
          '--initial-advertise-peer-urls',
          peer,
          '--initial-cluster',
          `default=${peer}`,
        ],
        ...this.#more,
      ],
      { stdio: 'ignore' },
    );
    while (!(await this.#healthy())) await new Promise((resolve) => setTimeout(resolve, 50));
  }

  /** As a crash would. */
  async kill(): Promise<void> {
    const child = this.#process;
    if (!child || child.exitCode !== null || child.signalCode !== null) return;
    child.kill('SIGKILL');
    await once(child, 'exit');
  }

  /** Forgets every revision before the present one, as etcd does by itself after a while. */
  async compact(): Promise<void> {
    const { header } = (await this.call('kv/range', { key: 'AA==' })) as { header: { revision: string } };
    await this.call('kv/compaction', { revision: header.revision, physical: true });
  }

  /** From now on it asks who calls: root, who may do all, and `name`, who may read and write under `prefix`. All with `password`. */
  async askForUsers(name: string, password: string, prefix: string): Promise<void> {
    const key = Buffer.from(prefix).toString('base64');
    const range_end = Buffer.from(prefix.replace(/\/$/, '0')).toString('base64'); // 0 comes after /
    for (const user of ['root', name]) {
      await this.call('auth/role/add', { name: user });
      await this.call('auth/user/add', { name: user, password });
      await this.call('auth/user/grant', { user, role: user });
    }
    await this.call('auth/role/grant', { name, perm: { permType: 'READWRITE', key, range_end } });
    await this.call('auth/enable', {});
    const { token } = (await this.call('auth/authenticate', { name: 'root', password })) as { token: string };
    this.#token = token;
  }

  async call(path: string, body: object): Promise<unknown> {
    const response = await fetch(`http://${HOST}:${this.#port}/v3/${path}`, {
      method: 'POST',
      body: JSON.stringify(body),
      ...(this.#token !== undefined && { headers: { authorization: this.#token } }),
    });
    return await response.json();
  }

  async #healthy(): Promise<boolean> {
    const answer = await fetch(`http://${HOST}:${this.#port}/health`).catch(() => undefined);
    return answer?.ok ?? false;
  }
}
