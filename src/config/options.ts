/**
 * One table of options per program, read from four places: flags win over the environment, that over the config file, that over
 * layers of the program's own (vLLM's JSON), those over defaults. What programs give in code is checked by the same rows (fields.ts).
 *
 *   kvPort: option({ kind: port(), help: 'base port of the KV listener', group: 'KV transfer', default: 14579 })
 *     --kv-port 8082      PD_KV_PORT=8082      { "kv-port": 8082 }
 *
 *   const command = addOptions(new Command('pd-worker'), table).parse();
 *   const values = resolveOptions(table, command, process.env);
 */
import { readFileSync } from 'node:fs';
import type { Command } from 'commander';
import { PdError } from '../errors.ts';
import { withoutPassword } from '../net/etcd.ts';
import { z } from '../zod.ts';
import type { Kind } from './kinds.ts';

export interface OptionSpec<T> {
  readonly kind: Kind<T>;
  readonly help: string;
  /** Heading in --help. */
  readonly group?: string;
  readonly default?: T;
  /** For --help, where the default is computed later. */
  readonly defaultText?: string;
  /** Flag, without dashes, where it is not the name in kebab case. */
  readonly flag?: string;
  /** Where the value lies in the configuration: `log.level`. Absent: under the option's name. False: the program makes something of it. */
  readonly field?: string | false;
}

export type OptionTable = Readonly<Record<string, OptionSpec<unknown>>>;

type ValueOf<S> = S extends { readonly kind: Kind<infer T> }
  ? S extends { readonly default: unknown }
    ? T
    : T | undefined
  : never;

/** What a table resolves to: options without a default may be undefined. */
export type ValuesOf<T extends OptionTable> = { readonly [K in keyof T]: ValueOf<T[K]> };

/** Values of a program's own, below the config file: by option name, with how a message should call each. */
export interface OptionLayer {
  readonly values: Readonly<Record<string, { readonly value: unknown; readonly label: string }>>;
}

/** Keeps the type of one spec, so that a table knows its value. */
export function option<T, const S extends OptionSpec<T>>(spec: S & { readonly kind: Kind<T> }): S {
  return spec;
}

/** Every row with its field, where it has named none. */
type Named<T> = {
  readonly [K in keyof T & string]: T[K] extends { readonly field: string | false }
    ? T[K]
    : T[K] & { readonly field: K };
};

/** Keeps the type of a table. A program that reads a config file has an option named `config`. */
export function defineOptions<const T extends OptionTable>(table: T): Named<T> {
  const rows = Object.entries(table).map(([name, spec]) => [name, { field: name, ...spec }]);
  return Object.fromEntries(rows) as Named<T>;
}

/** The same options under a heading of their own in --help. */
export function grouped<const T extends OptionTable>(group: string, table: T): T {
  const rows = Object.entries(table).map(([name, spec]) => [name, { ...spec, group }]);
  return Object.fromEntries(rows) as T;
}

/** `kvPort` -> `kv-port`; also takes names already in kebab or snake case. */
export function kebab(name: string): string {
  return name
    .replace(/([a-z0-9])([A-Z])/g, '$1-$2')
    .replaceAll('_', '-')
    .toLowerCase();
}

/** Columns of a flag with its argument in --help. Longer lists of choices go into the text beside it, which 80 columns leave room for. */
const MAX_TERM = 37;
/** Fewer columns than this are left unwrapped. */
const MIN_TEXT = 20;

const flagOf = (name: string, spec: OptionSpec<unknown>): string => `--${spec.flag ?? kebab(name)}`;
export const envOf = (name: string): string => `PD_${kebab(name).replaceAll('-', '_').toUpperCase()}`;

/** Adds every option of the table to a command, grouped, with defaults in the help text. Values stay text until `resolveOptions`. */
export function addOptions(command: Command, table: OptionTable): Command {
  const add = (flags: string, help: string, group: string, hidden = false): void => {
    command.addOption(command.createOption(flags, help).helpGroup(group).hideHelp(hidden));
  };
  for (const [name, spec] of Object.entries(table)) {
    const flag = flagOf(name, spec);
    const fallback =
      spec.defaultText ?? (spec.default === undefined ? undefined : spec.kind.render(spec.default));
    const help = fallback === undefined ? spec.help : `${spec.help} (default: ${fallback})`;
    const group = `${spec.group ?? 'Options'}:`;
    if (spec.kind.argument === undefined) {
      // Both forms, so that a flag can overrule environment and file either way; --help shows the one that changes something.
      const no = flag.replace('--', '--no-');
      add(flag, help, group, spec.default === true);
      add(no, help, group, spec.default !== true);
      continue;
    }
    const argument = spec.kind.list ? `<${spec.kind.argument}...>` : `<${spec.kind.argument}>`;
    const wide = argument.includes('|') && `${flag} ${argument}`.length > MAX_TERM;
    const choices = wide ? `${spec.kind.argument.replaceAll('|', ', ')}: ${help}` : help;
    add(wide ? `${flag} <name>` : `${flag} ${argument}`, choices, group);
  }
  return command.configureHelp({ minWidthToWrap: MIN_TEXT }).addHelpText('after', `\n${otherPlaces(table)}`);
}

/** Where else values may stand, by examples from the table. */
function otherPlaces(table: OptionTable): string {
  const rows = Object.entries(table);
  const example =
    rows.findLast(([name, spec]) => name.endsWith('Port') && spec.default !== undefined) ?? rows[0];
  if (!example) return '';
  const [name, spec] = example;
  const off = rows.find(([, { kind, default: on }]) => kind.argument === undefined && on === true);
  const named = [
    `${flagOf(...example)} as ${envOf(name)}`,
    ...(off ? [`${flagOf(...off).replace('--', '--no-')} as ${envOf(off[0])}=false`] : []),
    ...(rows.some(([, { kind }]) => kind.list) ? ['several values with commas between them'] : []),
  ].join(',\n');
  const everywhere = `Every flag can be set in the environment (${named})`;
  if (!('config' in table)) return `${everywhere};\nflags win over the environment.`;
  const file = `{"${kebab(name)}": ${JSON.stringify(spec.default ?? '...')}}`;
  return `${everywhere}\nand in the JSON file of --config (${file});\nflags win over the environment, the environment over the file.`;
}

/**
 * The validated values. Throws CONFIG_INVALID naming the flag, variable or file key of a value that is not allowed, and what is.
 * `layers` is asked, once flags, environment and file are known, for values that rank between the file and the defaults.
 */
export function resolveOptions<T extends OptionTable>(
  table: T,
  command: Command,
  env: Readonly<Record<string, string | undefined>>,
  layers: (given: Partial<ValuesOf<T>>) => readonly OptionLayer[] = () => [],
): ValuesOf<T> {
  const values: Record<string, unknown> = {};
  const take = (name: string, raw: unknown, label: string): void => {
    if (!(name in values)) values[name] = parseValue(table[name]!.kind, raw, label);
  };

  for (const [name, spec] of Object.entries(table)) {
    const flag = flagOf(name, spec);
    // Commander names values after the flag, which need not be the option's name here.
    const attribute = command.createOption(flag).attributeName();
    if (command.getOptionValueSource(attribute) === 'cli') {
      const raw: unknown = command.getOptionValue(attribute);
      take(name, raw, raw === false ? flag.replace('--', '--no-') : flag);
    }
  }
  for (const [name, spec] of Object.entries(table)) {
    const raw = env[envOf(name)];
    if (raw === undefined || raw === '') continue;
    take(name, spec.kind.list ? raw.split(',') : raw, `${envOf(name)} (environment)`);
  }
  if (typeof values['config'] === 'string') {
    const path = values['config'];
    for (const [key, raw] of Object.entries(readConfigFile(path))) {
      const name = Object.keys(table).find(
        (n) => kebab(n) === kebab(key) || flagOf(n, table[n]!) === `--${key}`,
      );
      if (name === undefined || name === 'config') {
        const known = Object.keys(table).map(kebab).join(', ');
        throw new PdError(
          'CONFIG_INVALID',
          `${JSON.stringify(key)} in ${path} is not an option; known are ${known}`,
        );
      }
      take(name, raw, `${JSON.stringify(key)} in ${path}`);
    }
  }
  for (const layer of layers(values as Partial<ValuesOf<T>>)) {
    for (const [name, { value, label }] of Object.entries(layer.values)) take(name, value, label);
  }
  return { ...defaultsOf(table), ...(values as Partial<ValuesOf<T>>) };
}

/** The values of a table without a flag, an environment or a file. */
export function defaultsOf<T extends OptionTable>(table: T): ValuesOf<T> {
  const entries = Object.entries(table).map(([name, spec]) => [name, spec.default]);
  return Object.fromEntries(entries) as ValuesOf<T>;
}

/** Throws CONFIG_INVALID that names `label` and what is allowed. */
export function parseValue<T>(kind: Kind<T>, raw: unknown, label: string): T {
  const result = kind.schema.safeParse(raw);
  if (result.success) return result.data;
  const given = (Array.isArray(raw) ? raw : [raw]).map((one) => JSON.stringify(one)).join(' ');
  throw new PdError(
    'CONFIG_INVALID',
    `${label}: ${withoutPassword(given)} is not allowed; expected ${kind.allowed}`,
  );
}

function readConfigFile(path: string): Record<string, unknown> {
  let text: string;
  try {
    text = readFileSync(path, 'utf8');
  } catch (error) {
    throw new PdError('CONFIG_INVALID', `cannot read the config file ${path}: ${(error as Error).message}`, {
      path,
    });
  }
  let parsed: unknown;
  try {
    parsed = JSON.parse(text);
  } catch (error) {
    throw new PdError('CONFIG_INVALID', `the config file ${path} is not JSON: ${(error as Error).message}`);
  }
  const object = z.record(z.string(), z.unknown()).safeParse(parsed);
  if (object.success) return object.data;
  throw new PdError(
    'CONFIG_INVALID',
    `the config file ${path} must hold one JSON object: {"kv-port": 8082, ...}`,
  );
}
