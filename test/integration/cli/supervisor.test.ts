import { spawn } from 'node:child_process';
import { EventEmitter, once } from 'node:events';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';
import { afterEach, describe, expect, test } from 'vitest';
import type { RestartPolicy } from '../../../src/cli/launch-child.ts';
import { Supervisor } from '../../../src/cli/launch-supervisor.ts';

const QUICK: RestartPolicy = { firstPauseMs: 1, maxPauseMs: 4, deaths: 5, windowMs: 60_000 };

/** Does as told, then says its pid: whoever has read that knows that the script's handlers are in place. */
const child = (name: string, script: string) => ({
  name,
  args: ['-e', `${script}; console.log('pid ' + process.pid);`],
});
const SERVE = `process.on('SIGTERM', () => process.exit(0)); setInterval(() => {}, 1e6);`;
const STUBBORN = `process.on('SIGTERM', () => console.log('no')); setInterval(() => {}, 1e6);`;

const supervisors: Supervisor[] = [];
afterEach(async () => {
  for (const supervisor of supervisors.splice(0)) {
    supervisor.kill();
    await supervisor.stop();
  }
});

function setUp(groups: ReturnType<typeof child>[][], restart = QUICK, killAfterMs = 60_000) {
  const events = new EventEmitter();
  const said: string[] = [];
  const pids: number[] = [];
  const supervisor = new Supervisor({
    groups,
    restart,
    killAfterMs,
    onLine: (name, line) => {
      if (line.startsWith('pid ')) pids.push(Number(line.slice(4)));
      events.emit('line', name, line);
    },
    say: (text) => {
      said.push(text);
      events.emit('said');
    },
  });
  supervisors.push(supervisor);
  /** Resolves once so many children have said their pid since the beginning. */
  const started = async (count: number) => {
    while (pids.length < count) await once(events, 'line');
  };
  const saying = async (words: string) => {
    while (!said.some((text) => text.includes(words))) await once(events, 'said');
  };
  return { supervisor, events, said, saying, pids, started };
}

const alive = (pid: number) => {
  try {
    process.kill(pid, 0);
    return true;
  } catch {
    return false;
  }
};

describe('a supervised program', () => {
  test('that is killed is started again, and says so', async () => {
    const { supervisor, said, pids, started } = setUp([[child('worker', SERVE)]]);
    supervisor.start();
    await started(1);
    process.kill(pids[0]!, 'SIGKILL');
    await started(2);
    process.kill(pids[1]!, 'SIGKILL');
    await started(3);
    expect(
      said.filter((line) => line.includes('restarting')).map((line) => line.replace(/ in .*/, '')),
    ).toEqual(['worker exited: SIGKILL; restarting it', 'worker exited: SIGKILL; restarting it']);
    expect(said.join('\n')).toMatch(/it in 1 ms[\s\S]*it in 2 ms/); // growing
  });

  test('that keeps dying is given up at the fifth death; the whole fails, with its last lines said', async () => {
    const { supervisor, said, pids } = setUp([
      [child('worker', `console.log('boom'); setImmediate(() => process.exit(3));`)],
    ]);
    supervisor.start();
    await supervisor.untilReady(async () => true, 60_000); // its start went well; this is later
    const failure = await supervisor.failed;
    expect(failure.message).toContain('worker');
    expect(failure.message).toContain('exit status 3');
    expect(pids).toHaveLength(5);
    expect(said.at(-1)).toContain('worker | boom');
  });

  test('that is given up fails the whole only where none is left to take its place', async () => {
    const good = child('worker-1', SERVE);
    const bad = child('worker-0', 'setImmediate(() => process.exit(3));');
    const { supervisor, saying } = setUp([[bad, good]]);
    let failed = false;
    void supervisor.failed.then(() => {
      failed = true;
    });
    supervisor.start();
    await supervisor.untilReady(async () => true, 60_000);
    await saying('giving up on it');
    expect(failed).toBe(false);
    expect(supervisor.children[1]!.givenUp).toBe(false);
  });

  test('that ends with an error before all is ready fails the start at once, with its words', async () => {
    const { supervisor, pids } = setUp([
      [child('worker', `console.error('CONFIG_INVALID: --port'); process.exitCode = 1;`)],
    ]);
    supervisor.start();
    await expect(supervisor.untilReady(async () => false, 60_000)).rejects.toThrow(
      /worker did not start: exit status 1\n[\s\S]*CONFIG_INVALID: --port/,
    );
    // Never started again. (Its pid may come after its end: the two take different pipes.)
    expect(pids.length).toBeLessThanOrEqual(1);
  });

  test('that never gets ready fails the start at the deadline', async () => {
    const { supervisor } = setUp([[child('worker', SERVE)]]);
    supervisor.start();
    await expect(supervisor.untilReady(async () => false, 50)).rejects.toThrow(/--start-timeout/);
  });
});

describe('stopping', () => {
  test('asks group after group, and leaves nothing', async () => {
    const order: string[] = [];
    const bye = (name: string) =>
      child(
        name,
        `process.on('SIGTERM', () => { console.log('bye'); process.exit(0); }); setInterval(() => {}, 1e6);`,
      );
    const { supervisor, events, pids, started } = setUp([[bye('proxy')], [bye('worker')]]);
    events.on('line', (name, line) => line === 'bye' && order.push(name));
    supervisor.start();
    await started(2);
    await supervisor.stop();
    expect(order).toEqual(['proxy', 'worker']);
    expect(pids.filter(alive)).toEqual([]);
    expect(supervisor.children.some((c) => c.givenUp)).toBe(false);
  });

  test('kills what does not listen', async () => {
    const { supervisor, pids, started } = setUp(
      [[child('worker', SERVE)], [child('deaf', STUBBORN), child('also deaf', STUBBORN)]],
      QUICK,
      50,
    );
    supervisor.start();
    await started(3);
    await supervisor.stop();
    expect(pids.filter(alive)).toEqual([]);
    expect(supervisor.children.some((c) => c.givenUp)).toBe(false);
  });

  test('takes along what a program has started itself', async () => {
    const script = `
      const { spawn } = require('node:child_process');
      const inner = spawn(process.execPath, ['-e', 'setInterval(() => {}, 1e6)'], { stdio: 'inherit' });
      console.log('pid ' + inner.pid);
      ${STUBBORN}`;
    const { supervisor, pids, started } = setUp([[child('worker', script)]], QUICK, 50);
    supervisor.start();
    await started(2);
    await supervisor.stop();
    expect(pids).toHaveLength(2);
    for (const pid of pids) while (alive(pid)) await new Promise((resolve) => setImmediate(resolve)); // until init has reaped it
  });

  test('works while a program waits for its restart', async () => {
    const slow = { ...QUICK, firstPauseMs: 60_000, maxPauseMs: 60_000 };
    const { supervisor, pids, started, saying } = setUp([[child('worker', SERVE)]], slow);
    supervisor.start();
    await started(1);
    process.kill(pids[0]!, 'SIGKILL');
    await saying('restarting');
    await supervisor.stop();
    expect(pids).toHaveLength(1);
  });
});

test('children of a launcher killed by SIGKILL end by themselves', async () => {
  const supervisor = fileURLToPath(new URL('../../../dist/src/cli/launch-supervisor.js', import.meta.url));
  const launcher = spawn(
    process.execPath,
    [
      '--input-type=module',
      '-e',
      `import { Supervisor } from ${JSON.stringify(supervisor)};
       const child = (name, body) => ({ name, args: ['-e', "console.log('pid ' + process.pid); setInterval(() => {}, 1e6);" + body] });
       const supervisor = new Supervisor({
         groups: [[child('polite', ''), child('deaf', "process.on('SIGTERM', () => {});")]],
         killAfterMs: 1000, say() {}, onLine: (_, line) => console.log(line),
       });
       supervisor.start();`,
    ],
    { stdio: ['ignore', 'pipe', 'inherit'] },
  );
  const pids: number[] = [];
  for await (const line of createInterface({ input: launcher.stdout })) {
    pids.push(Number(line.slice(4)));
    if (pids.length === 2) break;
  }
  expect(pids.every(alive)).toBe(true);
  launcher.kill('SIGKILL');
  while (pids.some(alive)) await new Promise((resolve) => setTimeout(resolve, 20)); // no event crosses here
});
