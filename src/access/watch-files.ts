import { statSync } from 'node:fs';

/** Between two looks. Notifications are not used: they are lost where a mounted secret is replaced by a symbolic link. */
const LOOK_MS = 1_000;

/**
 * Calls `changed` once one of `paths` is another file than when this was called, or holds something else; returns what ends that.
 * To be called before the files are read: `fs.watchFile` learns only later what it compares with, and misses what is replaced meanwhile.
 */
export function watchFiles(paths: readonly string[], changed: () => void): () => void {
  const look = () => paths.map(stateOf).join();
  let seen = look();
  const timer = setInterval(() => {
    const now = look();
    if (now === seen) return;
    seen = now;
    changed();
  }, LOOK_MS).unref();
  return () => clearInterval(timer);
}

function stateOf(path: string): string {
  try {
    const { dev, ino, size, mtimeNs, ctimeNs } = statSync(path, { bigint: true });
    return `${dev} ${ino} ${size} ${mtimeNs} ${ctimeNs}`;
  } catch (error) {
    return String((error as NodeJS.ErrnoException).code);
  }
}
