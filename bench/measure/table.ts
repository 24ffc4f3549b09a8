/** Results as text: aligned columns for a terminal, pipes for Markdown. */

export interface Table {
  readonly head: readonly string[];
  readonly rows: readonly (readonly string[])[];
  /** Sentences rather than numbers: Markdown keeps them left-aligned. */
  readonly prose?: true;
}

/** All columns but the first right-aligned. */
export function plainTable({ head, rows }: Table): string {
  const widths = head.map((title, i) => Math.max(title.length, ...rows.map((row) => (row[i] ?? '').length)));
  const line = (cells: readonly string[]) =>
    cells
      .map((cell, i) => (i === 0 ? cell.padEnd(widths[i]!) : cell.padStart(widths[i]!)))
      .join('  ')
      .trimEnd();
  return [line(head), ...rows.map(line)].join('\n');
}

export function markdownTable({ head, rows, prose }: Table): string {
  const line = (cells: readonly string[]) => `| ${cells.join(' | ')} |`;
  const escaped = rows.map((row) => row.map((cell) => cell.replaceAll('|', '\\|').replaceAll('\n', ' ')));
  return [
    line(head),
    line(head.map((_, i) => (i === 0 || prose ? '---' : '--:'))),
    ...escaped.map((row) => line(row)),
  ].join('\n');
}
