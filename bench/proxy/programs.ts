/** Programs that a benchmark starts, and ends in any case. */
import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { createInterface } from 'node:readline';

const children: ChildProcess[] = [];
process.on('exit', () => {
  for (const child of children) child.kill('SIGKILL');
});
for (const signal of ['SIGINT', 'SIGTERM'] as const) process.once(signal, () => process.exit(1));

/** `file`: JavaScript. Its stdout goes to whoever reads it; stderr is ours. */
export function startProgram(file: string, args: readonly string[]): ChildProcess {
  const child = spawn(process.execPath, [file, ...args], { stdio: ['pipe', 'pipe', 'inherit'] });
  children.push(child);
  return child;
}

/** The first group of what each pattern matches on its stdout, one after another; what comes after is dropped. */
export async function linesOf(
  { stdout, spawnargs }: ChildProcess,
  patterns: readonly RegExp[],
): Promise<string[]> {
  const found: string[] = [];
  for await (const line of createInterface({ input: stdout! })) {
    const match = patterns[found.length]!.exec(line);
    if (match) found.push(match[1]!);
    if (found.length < patterns.length) continue;
    stdout!.resume();
    return found;
  }
  throw new Error(`${spawnargs[1]} ended before it was ready`);
}

export async function stopProgram(child: ChildProcess): Promise<void> {
  if (child.exitCode !== null || child.signalCode !== null) return;
  const ended = once(child, 'exit');
  child.kill('SIGTERM');
  await ended;
}
