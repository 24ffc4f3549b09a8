/** Good requests per second over the rate asked for, as SVG: a panel for each bound, a line for each system. Pure. */

export interface Line {
  readonly name: string;
  /** Drawn thicker. */
  readonly main?: boolean;
  /** Ascending in `asked`; `good` has one value for each panel. */
  readonly points: readonly { readonly asked: number; readonly good: readonly number[] }[];
}

const PANEL = { width: 360, height: 260, gap: 64 };
const MARGIN = { left: 52, top: 40, bottom: 46 };
const LEGEND = { row: 18, columns: 3 };
/** Readable on white and on black. */
const INK = '#808890';
const GRID = '#80889055';
const COLOURS = ['#2f81f7', '#e5793a', '#3fa45b', '#b65fd0', '#c9a227', '#1fa3a3', '#d6486f', '#8a7a5c'];
const TICKS = 6;

/** `panels`: the title of each. */
export function plotSvg(title: string, panels: readonly string[], lines: readonly Line[]): string {
  const points = lines.flatMap((line) => line.points);
  const most = Math.max(1, ...points.flatMap(({ asked, good }) => [asked, ...good]));
  const step = tickStep(most);
  const end = Math.ceil(most / step) * step;
  const width = MARGIN.left + panels.length * (PANEL.width + PANEL.gap) - PANEL.gap + 20;
  const legendTop = MARGIN.top + PANEL.height + MARGIN.bottom;
  const height = legendTop + LEGEND.row * Math.ceil((lines.length + 1) / LEGEND.columns) + 10;
  return `${[
    `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${width} ${height}" width="${width}" height="${height}" role="img" font-family="system-ui, sans-serif" font-size="12">`,
    `<title>${escaped(title)}</title>`,
    ...panels.flatMap((name, i) => panel(name, i, { end, step }, lines)),
    ...legend(lines, legendTop, width),
    '</svg>',
  ].join('\n')}\n`;
}

function panel(
  name: string,
  index: number,
  { end, step }: { readonly end: number; readonly step: number },
  lines: readonly Line[],
): string[] {
  const left = MARGIN.left + index * (PANEL.width + PANEL.gap);
  const bottom = MARGIN.top + PANEL.height;
  const x = (asked: number) => short(left + (asked / end) * PANEL.width);
  const y = (good: number) => short(bottom - (good / end) * PANEL.height);
  const out = [text(left, MARGIN.top - 16, name, 'start', 13)];
  for (let i = 0; i * step <= end; i++) {
    const at = i * step;
    const word = String(Number(at.toPrecision(3)));
    out.push(stroke(x(0), y(at), x(end), y(at), GRID), stroke(x(at), y(0), x(at), y(end), GRID));
    out.push(
      text(left - 8, Number(y(at)) + 4, word, 'end'),
      text(Number(x(at)), bottom + 18, word, 'middle'),
    );
  }
  out.push(text(left + PANEL.width / 2, bottom + 36, 'requests/s asked', 'middle'));
  if (index === 0) {
    const middle = MARGIN.top + PANEL.height / 2;
    out.push(
      `<text x="14" y="${middle}" fill="${INK}" text-anchor="middle" transform="rotate(-90 14 ${middle})">good requests/s</text>`,
    );
  }
  out.push(stroke(x(0), y(0), x(end), y(end), INK, 'stroke-dasharray="4 4"'));
  // the main one lies on top
  for (const [i, line] of [...lines.entries()].reverse()) {
    const colour = COLOURS[i % COLOURS.length]!;
    const at = line.points.map(({ asked, good }) => [x(asked), y(good[index]!)] as const);
    const path = at.map(([px, py]) => `${px},${py}`).join(' ');
    out.push(
      `<polyline points="${path}" fill="none" stroke="${colour}" stroke-width="${line.main ? 3 : 1.6}" stroke-linejoin="round"/>`,
      ...at.map(([px, py]) => `<circle cx="${px}" cy="${py}" r="${line.main ? 4 : 3}" fill="${colour}"/>`),
    );
  }
  return out;
}

function legend(lines: readonly Line[], top: number, width: number): string[] {
  const column = (width - MARGIN.left) / LEGEND.columns;
  const entry = (i: number, name: string, colour: string, more = '') => {
    const x = MARGIN.left + (i % LEGEND.columns) * column;
    const y = top + Math.floor(i / LEGEND.columns) * LEGEND.row;
    return [
      stroke(short(x), short(y + 8), short(x + 22), short(y + 8), colour, more),
      text(x + 28, y + 12, name, 'start'),
    ];
  };
  return [
    ...lines.flatMap(({ name, main }, i) =>
      entry(i, name, COLOURS[i % COLOURS.length]!, `stroke-width="${main ? 3 : 1.6}"`),
    ),
    ...entry(lines.length, 'all requests good', INK, 'stroke-dasharray="4 4"'),
  ];
}

function stroke(x1: string, y1: string, x2: string, y2: string, colour: string, more = ''): string {
  return `<line x1="${x1}" y1="${y1}" x2="${x2}" y2="${y2}" stroke="${colour}"${more === '' ? '' : ` ${more}`}/>`;
}

function text(
  x: number,
  y: number,
  words: string,
  anchor: 'start' | 'middle' | 'end',
  size?: number,
): string {
  const weight = size === undefined ? '' : ` font-size="${size}" font-weight="600"`;
  return `<text x="${short(x)}" y="${short(y)}" fill="${INK}" text-anchor="${anchor}"${weight}>${escaped(words)}</text>`;
}

function tickStep(most: number): number {
  const raw = most / TICKS;
  const power = 10 ** Math.floor(Math.log10(raw));
  return [1, 2, 5, 10].map((factor) => factor * power).find((step) => step >= raw)!;
}

function short(value: number): string {
  return String(Math.round(value * 10) / 10);
}

function escaped(words: string): string {
  return words
    .replaceAll('&', '&amp;')
    .replaceAll('<', '&lt;')
    .replaceAll('>', '&gt;')
    .replaceAll('"', '&quot;');
}
