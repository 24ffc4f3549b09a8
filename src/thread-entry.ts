import { existsSync } from 'node:fs';

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
