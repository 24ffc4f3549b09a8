/** A real Prometheus for a test: Debian's package prometheus. */
import { type ChildProcess, spawn, spawnSync } from 'node:child_process';
import { once } from 'node:events';
import { mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { stringify } from 'yaml';
import { freePorts } from '../../src/net/free-ports.ts';

export const NO_PROMETHEUS = spawnSync('prometheus', ['--version']).error !== undefined;

const HOST = '127.0.0.1';

export interface Sample {
  readonly metric: Readonly<Record<string, string>>;
  /** When, and what. */
  readonly value: readonly [number, string];
}

/** Stop it. */
export class Prometheus {
  readonly #url: string;
  readonly #process: ChildProcess;
  #said = '';

  private constructor(port: number, dir: string, config: string) {
    this.#url = `http://${HOST}:${port}`;
    this.#process = spawn(
      'prometheus',
      [
        `--config.file=${config}`,
        `--storage.tsdb.path=${join(dir, 'data')}`,
        `--web.listen-address=${HOST}:${port}`,
        '--log.level=warn',
      ],
      { stdio: ['ignore', 'ignore', 'pipe'] },
    );
    this.#process.stderr!.on('data', (chunk: Buffer) => {
      this.#said = (this.#said + chunk).slice(-4_000);
    });
  }

  /** Scrapes and evaluates every second. `rules`: of the form of a rules file. Resolves once it answers; throws what it says if it ends. */
  static async start(dir: string, scrapes: readonly object[], rules: object): Promise<Prometheus> {
    mkdirSync(dir, { recursive: true });
    writeFileSync(join(dir, 'rules.yaml'), stringify(rules));
    const config = join(dir, 'prometheus.yaml');
    const global = { scrape_interval: '1s', scrape_timeout: '1s', evaluation_interval: '1s' };
    writeFileSync(config, stringify({ global, rule_files: ['rules.yaml'], scrape_configs: scrapes }));
    const [port] = await freePorts(1, HOST);
    const server = new Prometheus(port!, dir, config);
    for (;;) {
      const answer = await fetch(`${server.#url}/-/ready`).catch(() => undefined);
      if (answer?.ok) return server;
      if (server.#ended) throw new Error(`prometheus ended: ${server.#said}`);
      await new Promise((resolve) => setTimeout(resolve, 50));
    }
  }

  get #ended(): boolean {
    return this.#process.exitCode !== null || this.#process.signalCode !== null;
  }

  async stop(): Promise<void> {
    if (this.#ended) return;
    this.#process.kill('SIGKILL');
    await once(this.#process, 'exit');
  }

  /** Of an expression, now. Throws where it is none. */
  async query(expression: string): Promise<readonly Sample[]> {
    const { result } = await this.get<{ result: readonly Sample[] }>(
      `query?query=${encodeURIComponent(expression)}`,
    );
    return result;
  }

  /** `data` of an answer of its API. Throws its error. */
  async get<T>(path: string): Promise<T> {
    const response = await fetch(`${this.#url}/api/v1/${path}`);
    const answer = (await response.json()) as { status: string; error?: string; data: T };
    if (answer.status !== 'success') throw new Error(`${path}: ${answer.error}`);
    return answer.data;
  }
}
