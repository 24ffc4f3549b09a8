/** A pd-proxy and two instances without a model (backend.ts), for measuring the proxy alone. */
import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';
import { monotonicMs } from '../measure/machine.ts';

const START_MS = 20_000;
const STOP_MS = 5_000;

export interface ProxyPair {
  /** The proxy's. */
  readonly url: string;
  /** Of the consumer. */
  readonly instanceUrl: string;
  /** Exits this process if a program does not exit in time. */
  stop(): Promise<void>;
}

/** `program`: pd-proxy's file. `backendArgs`: the arguments of backend.ts from the third on. Resolves once the proxy knows both instances. */
export async function startProxyPair(program: string, backendArgs: readonly string[]): Promise<ProxyPair> {
  const children: ChildProcess[] = [];
  process.on('exit', () => {
    for (const child of children) child.kill('SIGKILL');
  });
  const proxyArgs = ['--host', '127.0.0.1', '--port', '0', '--discovery-port', '0', '--log-format', 'json'];
  const patterns = [/Discovery on tcp:\/\/([^"\s]+)/, /Running on ([^"\s]+)/];
  const [discovery, url] = await start(children, [program, ...proxyArgs], patterns);
  const file = fileURLToPath(new URL('./backend.js', import.meta.url));
  const backend = (role: string) => start(children, [file, role, discovery!, ...backendArgs], [/^(\d+)$/]);
  const [, [port]] = await Promise.all([backend('producer'), backend('consumer')]);
  await untilPaired(url!);
  return { url: url!, instanceUrl: `http://127.0.0.1:${port}`, stop: () => stop(children) };
}

/** What the patterns match on the program's stdout, one after another. The program runs until its stdin closes or it gets SIGTERM. */
async function start(
  children: ChildProcess[],
  args: readonly string[],
  patterns: readonly RegExp[],
): Promise<string[]> {
  const child = spawn(process.execPath, args, { stdio: ['pipe', 'pipe', 'inherit'] });
  children.push(child);
  const timer = setTimeout(() => child.kill('SIGKILL'), START_MS);
  try {
    const found: string[] = [];
    for await (const line of createInterface({ input: child.stdout })) {
      const match = patterns[found.length]!.exec(line);
      if (match) found.push(match[1]!);
      if (found.length === patterns.length) {
        child.stdout.resume();
        return found;
      }
    }
    throw new Error(`${args[0]} ended before it was ready`);
  } finally {
    clearTimeout(timer);
  }
}

async function untilPaired(url: string): Promise<void> {
  const deadline = monotonicMs() + START_MS;
  for (;;) {
    const { counts } = (await (await fetch(`${url}/health`)).json()) as { counts: Record<string, number> };
    if (counts['producer'] === 1 && counts['consumer'] === 1) return;
    if (monotonicMs() > deadline) throw new Error('the proxy does not list the instances');
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
}

async function stop(children: readonly ChildProcess[]): Promise<void> {
  const ended = children.filter((child) => child.exitCode === null).map((child) => once(child, 'exit'));
  for (const child of children) {
    child.stdin!.end();
    child.kill('SIGTERM');
  }
  const timer = setTimeout(() => process.exit(1), STOP_MS);
  await Promise.all(ended);
  clearTimeout(timer);
}
