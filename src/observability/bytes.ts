/** Numbers as people read them: bytes to about three digits (`10.7 GiB`, `340 MiB`), counts of things, progress. Pure. */

const BINARY = ['KiB', 'MiB', 'GiB', 'TiB'] as const;
const DECIMAL = ['kB', 'MB', 'GB', 'TB'] as const;

/** Of memory and files. */
export function binarySize(bytes: number): string {
  return scaled(bytes, 1_024, BINARY) ?? `${Math.round(bytes)} bytes`;
}

/** Of transfers, in decimal units as links are. */
export function byteRate(bytesPerSecond: number): string {
  return `${scaled(bytesPerSecond, 1_000, DECIMAL) ?? `${Math.round(bytesPerSecond)} B`}/s`;
}

/** Undefined below the first unit. */
function scaled(amount: number, step: number, units: readonly string[]): string | undefined {
  let value = amount;
  let unit: string | undefined;
  // What would round up to a whole step is one of the next unit.
  for (let i = 0; i < units.length && value >= (i === 0 ? step : step - 0.5); i++) {
    value /= step;
    unit = units[i];
  }
  if (unit === undefined) return undefined;
  const decimals = value >= 99.95 ? 0 : value >= 9.995 ? 1 : 2;
  return `${value.toFixed(decimals)} ${unit}`;
}

/** `1 warning`, `2 warnings`. */
export function plural(count: number, noun: string): string {
  return `${count} ${noun}${count === 1 ? '' : 's'}`;
}

const BAR_WIDTH = 24;

/** `part` from 0 to 1, `width` in characters: full only when all is done. */
export function bar(part: number, width = BAR_WIDTH): string {
  const full = Math.floor(Math.min(1, Math.max(0, part)) * width);
  return '█'.repeat(full) + '░'.repeat(width - full);
}

/** `weights of llama: ████████░░░░ 67 % (10.7 GiB of 16.1 GiB, 4.10 GB/s)` */
export function progressLine(what: string, done: number, total: number, seconds: number): string {
  const part = total > 0 ? done / total : 1;
  const rate = seconds > 0 ? `, ${byteRate(done / seconds)}` : '';
  return `${what}: ${bar(part)} ${Math.floor(100 * part)} % (${binarySize(done)} of ${binarySize(total)}${rate})`;
}
