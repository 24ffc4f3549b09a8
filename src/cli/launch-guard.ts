/**
 * Preloaded (`node --import`) into every child of pd-launch: a child never outlives its launcher, not even one killed by SIGKILL. The
 * launcher holds the other end of stdin; its end is the sign. Asks politely, then insists.
 */
import type { Socket } from 'node:net';
import { isMainThread } from 'node:worker_threads';

const INSIST_MS = 1_000;
const KILL_MS = 3_000;

let alone = false;

function launcherGone(): void {
  if (alone) return;
  alone = true;
  // Nobody waits for the answers any more, so draining may be cut short; a second SIGTERM means that.
  process.kill(process.pid, 'SIGTERM');
  setTimeout(() => process.kill(process.pid, 'SIGTERM'), INSIST_MS).unref();
  setTimeout(() => process.kill(process.pid, 'SIGKILL'), KILL_MS).unref();
}

// A preload runs in worker threads too, whose stdin is another thing.
if (isMainThread) {
  process.stdin.on('end', launcherGone).on('close', launcherGone).on('error', launcherGone).resume();
  (process.stdin as unknown as Socket).unref?.();
}
