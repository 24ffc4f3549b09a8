/**
 * Preloaded (`node --import`) into every child of pd-launch: a child never outlives its launcher, not even one killed by SIGKILL. The
 * launcher holds the other end of stdin, so EOF there means that it is gone. SIGTERM first, then SIGKILL.
 */
import type { Socket } from 'node:net';
import { isMainThread } from 'node:worker_threads';

const INSIST_MS = 1_000;
const KILL_MS = 3_000;

let orphaned = false;

function launcherGone(): void {
  if (orphaned) return;
  orphaned = true;
  // Nobody is waiting for the answers any more, so a second SIGTERM cuts draining short.
  process.kill(process.pid, 'SIGTERM');
  setTimeout(() => process.kill(process.pid, 'SIGTERM'), INSIST_MS).unref();
  setTimeout(() => process.kill(process.pid, 'SIGKILL'), KILL_MS).unref();
}

// A preload runs in worker threads too, whose stdin is something else.
if (isMainThread) {
  process.stdin.on('end', launcherGone).on('close', launcherGone).on('error', launcherGone).resume();
  (process.stdin as unknown as Socket).unref?.();
}
