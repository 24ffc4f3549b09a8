import { existsSync } from 'node:fs';
import { type Transferable, Worker, type WorkerOptions } from 'node:worker_threads';

/**
 * URL of a thread's entry, always the built JavaScript: a Worker cannot start from TypeScript under tsx or vitest. `from` is the
 * caller's `import.meta.url`, `entry` a path beside it, such as `./thread.js`.
 */
export function threadEntry(from: string, entry: string): URL {
  const url = new URL(entry, from);
  if (existsSync(url)) return url;
  const built = new URL(url.href.replace(/\/src\/(?!.*\/src\/)/, '/dist/src/'));
  if (existsSync(built)) return built;
  throw new Error(`${built.href} is missing: run \`npm run build\``);
}

/** A thread as its owner sees it; tests substitute a scripted one. */
export interface ThreadPort<To, From> {
  /** The memory of `transfer` moves to the thread. */
  post(message: To, transfer?: readonly Transferable[]): void;
  onMessage(listener: (message: From) => void): void;
  /** The thread has ended, whether asked to or not; with the error that ended it, if any. */
  onExit(listener: (error: Error | undefined) => void): void;
  /** Ends the thread by force. */
  terminate(): Promise<void>;
}

export function startThread<To, From>(entry: URL, options: WorkerOptions): ThreadPort<To, From> {
  // Descriptors that come over a Unix socket (transport/direct) are closed here and were opened nowhere: Node would warn of each.
  const worker = new Worker(entry, { ...options, trackUnmanagedFds: false });
  let thrown: Error | undefined;
  worker.on('error', (error) => {
    thrown = error instanceof Error ? error : new Error(String(error));
  });
  return {
    post: (message, transfer) => worker.postMessage(message, transfer),
    onMessage: (listener) => worker.on('message', listener),
    onExit: (listener) => worker.on('exit', () => listener(thrown)),
    terminate: async () => {
      await worker.terminate();
    },
  };
}
