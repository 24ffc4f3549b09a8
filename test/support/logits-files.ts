/** What `--debug-logits` has written, as its reader sees it. */
import { readFileSync } from 'node:fs';
import { join } from 'node:path';

export interface LogitsLine {
  readonly request: string;
  readonly sequence: string;
  readonly index: number;
  readonly position: number;
  readonly tokens: readonly number[];
  readonly sampled: number | null;
}

export interface LogitsOfSequence {
  readonly lines: readonly LogitsLine[];
  readonly rows: readonly Float32Array[];
}

/** `name`: the files' without ending. */
export function readLogits(dir: string, name: string, vocab: number): LogitsOfSequence {
  const lines = readFileSync(join(dir, `${name}.jsonl`), 'utf8')
    .trimEnd()
    .split('\n')
    .map((line) => JSON.parse(line) as LogitsLine);
  const bytes = readFileSync(join(dir, `${name}.f32`));
  const values = new Float32Array(bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength));
  const rows = Array.from({ length: values.length / vocab }, (_, i) =>
    values.subarray(i * vocab, (i + 1) * vocab),
  );
  return { lines, rows };
}

export function argmax(row: Float32Array): number {
  return row.indexOf(Math.max(...row));
}
