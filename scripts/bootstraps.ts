/** The addresses that NCCL's bootstraps use, from NCCL's own log among the lines of pd-launch or of single workers. */
import { isLoopback } from '../src/net/address.ts';

export class Bootstraps {
  /** Makes NCCL log them; a level set by the user is kept. */
  readonly environment: Readonly<Record<string, string>> = {
    NCCL_DEBUG: process.env['NCCL_DEBUG'] ?? 'INFO',
    NCCL_DEBUG_SUBSYS: process.env['NCCL_DEBUG_SUBSYS'] ?? 'INIT,NET,ENV,BOOTSTRAP',
  };
  /** The line of each worker, in order: `Bootstrap: Using eth0:2001:db8::7<0>`. */
  readonly #seen = new Map<string, string>();

  /** Takes a line of a log; `who` wrote it, unless it has a label of pd-launch. */
  hear(line: string, who?: string): void {
    const match = /^(?:([\w-]+) +\| )?.*NCCL (?:INFO|WARN) (Bootstrap.*)$/.exec(line);
    const name = who ?? match?.[1];
    if (match?.[2] !== undefined && name !== undefined && !this.#seen.has(name))
      this.#seen.set(name, match[2]);
  }

  /** For a table cell: each different line once, and whether it shows `host`. */
  summary(host: string): string {
    if (this.#seen.size === 0) return 'nothing was logged';
    const lines = [...new Set(this.#seen.values())].map((text) => {
      const who = [...this.#seen].flatMap(([name, said]) => (said === text ? [name] : []));
      return `\`${text}\` (${who.join(', ')})`;
    });
    const shown = [...this.#seen.values()].every((text) => text.includes(`:${host.replace(/%.*/, '')}`));
    if (shown) return lines.join(', ');
    // NCCL ignores ::1 when it looks for an address: 127.0.0.1 is on the same interface.
    return `${lines.join(', ')}; ${host.includes(':') && isLoopback(host) ? 'NCCL never uses ::1: the same interface over IPv4' : `not ${host}`}`;
  }
}
