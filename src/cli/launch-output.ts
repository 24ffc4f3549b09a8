/** The lines of several programs in one stream, each with the name of who wrote it. */

const COLOURS = [36, 32, 33, 35, 34, 96, 92, 93, 95, 94];

export interface OutputOptions {
  /** `json` lines stay JSON, with the name as a field. */
  readonly format: 'pretty' | 'json';
  readonly colour: boolean;
  /** Widest name, for alignment. */
  readonly width: number;
  readonly write: (text: string) => void;
}

export class LaunchOutput {
  readonly #options: OutputOptions;
  readonly #colours = new Map<string, number>();

  constructor(options: OutputOptions) {
    this.#options = options;
  }

  line(name: string, line: string): void {
    const { format, width, write } = this.#options;
    if (format === 'json') write(`${jsonLine(name, line)}\n`);
    else write(`${this.#paint(name, `${name.padEnd(width)} |`)} ${line}\n`);
  }

  #paint(name: string, text: string): string {
    if (!this.#options.colour) return text;
    const colour = this.#colours.get(name) ?? COLOURS[this.#colours.size % COLOURS.length]!;
    this.#colours.set(name, colour);
    return `\u001b[${colour}m${text}\u001b[0m`;
  }
}

/** Node's own warnings and crash reports are no JSON: they become the message. */
function jsonLine(name: string, line: string): string {
  const instance = JSON.stringify(name);
  return line.startsWith('{') && line.endsWith('}')
    ? `{"instance":${instance},${line.slice(1)}`
    : JSON.stringify({ instance: name, level: 'info', msg: line });
}
