/** How far something has come, as one line of text. Pure. */
import { binarySize, byteRate } from './bytes.ts';

const WIDTH = 24;

/** `part` of 1, of so many characters: full only when all is done. */
export function bar(part: number, width = WIDTH): string {
  const full = Math.floor(Math.min(1, Math.max(0, part)) * width);
  return '█'.repeat(full) + '░'.repeat(width - full);
}

/** `weights of llama: ████████░░░░ 67 % (10.7 GiB of 16.1 GiB, 4.10 GB/s)` */
export function progressLine(what: string, done: number, total: number, seconds: number): string {
  const part = total > 0 ? done / total : 1;
  const rate = seconds > 0 ? `, ${byteRate(done / seconds)}` : '';
  return `${what}: ${bar(part)} ${Math.floor(100 * part)} % (${binarySize(done)} of ${binarySize(total)}${rate})`;
}
