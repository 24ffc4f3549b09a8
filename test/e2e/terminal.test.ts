/** On a terminal every thread writes for people. */
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { existsSync } from 'node:fs';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';
import { expect, it, onTestFinished } from 'vitest';

const worker = fileURLToPath(new URL('../../bin/pd-worker', import.meta.url));
/** Of util-linux: runs a command on a terminal of its own. */
const SCRIPT = '/usr/bin/script';

it.skipIf(!existsSync(SCRIPT))('a worker logs pretty lines alone where it runs on a terminal', async () => {
  const command = `'${process.execPath}' '${worker}' --role consumer --device host --host 127.0.0.1 --port 0 --kv-port 0`;
  const child = spawn(SCRIPT, ['-qec', command, '/dev/null'], { stdio: ['pipe', 'pipe', 'inherit'] });
  onTestFinished(async () => {
    const ended = once(child, 'close');
    child.stdin.write('\x03'); // Ctrl-C. A signal to `script` would have it wait for two seconds
    await ended;
  });
  const lines: string[] = [];
  for await (const line of createInterface({ input: child.stdout })) {
    lines.push(line);
    if (/Running on/.test(line)) break;
  }
  expect(lines.filter((line) => /\[(main|core|transfer)\]/.test(line)).length).toBeGreaterThanOrEqual(2);
  expect(lines.join('\n')).toContain('P2pNcclEngine init');
  expect(lines.filter((line) => line.startsWith('{'))).toEqual([]);
});
