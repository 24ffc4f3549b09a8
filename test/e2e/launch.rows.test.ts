import { type ChildProcess, spawn } from 'node:child_process';
import { EventEmitter, once } from 'node:events';
import { createInterface } from 'node:readline';
import { setTimeout as sleep } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import { afterEach, expect, test } from 'vitest';
import { PATIENT } from '../support/cluster.ts';
import { complete } from '../support/requests.ts';
import { withTheOthers } from '../support/rows.ts';

/** Tests for every change, and those for where all is tested. */
const always = test.skipIf(withTheOthers);
const seldom = test.skipIf(!withTheOthers);

interface Started {
  readonly child: ChildProcess;
  readonly addresses: {
    readonly proxy: { readonly url: string };
    readonly producers: readonly { readonly name: string; readonly url: string; readonly kv: string }[];
    readonly consumers: readonly { readonly name: string; readonly url: string; readonly kv: string }[];
  };
  /** Of all it has ever started, by name, the latest last. */
  readonly pids: Map<string, number[]>;
  /** Resolves once `name` has been started so many times. */
  untilStarted(name: string, times: number): Promise<number>;
}

const launched: ChildProcess[] = [];
afterEach(async () => {
  for (const child of launched.splice(0)) {
    if (child.exitCode === null && child.signalCode === null) {
      child.kill('SIGKILL');
      await once(child, 'exit');
    }
  }
});

async function launch(...args: string[]): Promise<Started> {
  const bin = fileURLToPath(new URL('../../bin/pd-launch', import.meta.url));
  const child = spawn(process.execPath, [bin, '--json', '--free-ports', '--device', 'host', ...args], {
    stdio: ['ignore', 'pipe', 'pipe'],
    env: { ...process.env, ...PATIENT },
  });
  launched.push(child);
  const pids = new Map<string, number[]>();
  const events = new EventEmitter();
  const log: string[] = [];
  createInterface({ input: child.stderr }).on('line', (line) => {
    log.push(line);
    const match = /launch +\| (\S+) started, pid (\d+)/.exec(line);
    if (!match) return;
    pids.set(match[1]!, [...(pids.get(match[1]!) ?? []), Number(match[2])]);
    events.emit('started');
  });
  const output = createInterface({ input: child.stdout });
  // `close`: by then its last words have been read.
  const first = await Promise.race([once(output, 'line'), once(child, 'close').then(() => undefined)]);
  if (!first) throw new Error(`pd-launch ended\n${log.join('\n')}`);
  return {
    child,
    addresses: JSON.parse(first[0] as string) as Started['addresses'],
    pids,
    async untilStarted(name, times) {
      while ((pids.get(name)?.length ?? 0) < times) await once(events, 'started');
      return pids.get(name)!.at(-1)!;
    },
  };
}

function alive(pid: number): boolean {
  try {
    process.kill(pid, 0);
    return true;
  } catch {
    return false;
  }
}

const REQUEST = {
  prompt: 'What is the capital of France?',
  max_tokens: 8,
  stream: true,
  seed: 1,
  temperature: 0,
};

always('pd-launch serves, starts again what is killed, and leaves nothing behind', async () => {
  const { child, addresses, pids, untilStarted } = await launch();
  const { proxy, producers, consumers } = addresses;
  const victim = await untilStarted('consumer-0', 1);
  const first = await complete(proxy.url, REQUEST);
  expect(first.error).toBeUndefined();
  expect(first.text).toContain('Paris');
  for (const { kv } of [producers[0]!, consumers[0]!]) expect(first.id).toContain(kv);

  process.kill(victim, 'SIGKILL');
  await untilStarted('consumer-0', 2);
  for (const deadline = performance.now() + 60_000; ; await sleep(100)) {
    const again = await complete(proxy.url, REQUEST);
    if (again.status === 200 && !again.error) {
      expect(again.text).toBe(first.text);
      expect(again.id).toContain(consumers[0]!.kv); // the same ports
      break;
    }
    expect(performance.now(), again.error?.message).toBeLessThan(deadline);
  }

  child.kill('SIGTERM');
  expect(await once(child, 'exit')).toEqual([0, null]);
  expect([...pids.values()].flat().filter(alive)).toEqual([]);
});

seldom('no program outlives a pd-launch that is killed outright', async () => {
  const { child, pids, untilStarted } = await launch();
  // Told on stderr, that all are ready on stdout: the one may be read before the other.
  for (const name of ['proxy', 'producer-0', 'consumer-0']) await untilStarted(name, 1);
  const all = [...pids.values()].flat();
  expect(all).toHaveLength(3);
  child.kill('SIGKILL');
  await once(child, 'exit');
  for (const deadline = performance.now() + 60_000; all.some(alive); await sleep(50)) {
    expect(performance.now()).toBeLessThan(deadline);
  }
});

always('a worker that cannot start ends pd-launch with its words', async () => {
  await expect(launch('--', '--block-size', 'many')).rejects.toThrow(
    /CONFIG_INVALID: --block-size[\s\S]*did not start/,
  );
});
