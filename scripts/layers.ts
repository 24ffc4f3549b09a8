/**
 * Who may import whom. Reads every import of the tree with oxc-parser and prints what the table forbids; part of `npm run lint`.
 * `tsx scripts/layers.ts --table` prints the table as docs/architecture.md shows it.
 */
import { existsSync, readdirSync, readFileSync } from 'node:fs';
import { dirname, extname, join, relative, resolve } from 'node:path';
import { argv } from 'node:process';
import { fileURLToPath } from 'node:url';
import { parseSync, Visitor } from 'oxc-parser';

interface Layer {
  /** A folder, or one file. The longest name that fits decides what layer a file is of. */
  readonly name: string;
  /** What it may import beside itself: layers above it in the table, or `*` for all of them. */
  readonly may: readonly string[];
  /** `true`: no file of it reaches I/O, however far down; a list: all but these. */
  readonly pure?: true | readonly string[];
}

const BASE = [
  'src/errors.ts',
  'src/deferred.ts',
  'src/memories.ts',
  'src/thread-entry.ts',
  'src/version.ts',
  'src/zod.ts',
];
const COMMON = [...BASE, 'src/observability', 'src/net'];

/** From the lowest to the highest: a layer may only name layers above it here, so there are no cycles among them. */
export const LAYERS: readonly Layer[] = [
  { name: 'ffi', may: [] },
  { name: 'src/errors.ts', may: ['ffi'] },
  { name: 'src/deferred.ts', may: [] },
  { name: 'src/memories.ts', may: [] },
  { name: 'src/thread-entry.ts', may: [] },
  { name: 'src/version.ts', may: [] },
  { name: 'src/zod.ts', may: [] },
  { name: 'src/observability', may: BASE },
  { name: 'src/net', may: [...BASE, 'src/observability'] },
  { name: 'src/parsing', may: [], pure: true },
  { name: 'src/openai-error.ts', may: BASE },
  { name: 'src/reading-thread.ts', may: [...BASE, 'src/observability'] },
  { name: 'src/grammar', may: ['src/errors.ts'], pure: true },
  { name: 'src/wire', may: ['src/errors.ts', 'src/net'], pure: true },
  { name: 'src/kv', may: ['src/errors.ts', 'src/wire'], pure: true },
  { name: 'src/config', may: [...COMMON, 'src/parsing', 'src/wire', 'src/kv'] },
  { name: 'src/access', may: [...COMMON, 'src/openai-error.ts', 'src/config'] },
  { name: 'src/device', may: [...COMMON, 'src/wire', 'src/kv', 'ffi'] },
  { name: 'src/transport', may: [...COMMON, 'src/wire', 'src/kv', 'src/device', 'ffi'] },
  {
    name: 'src/transfer',
    may: [...COMMON, 'src/wire', 'src/kv', 'src/config', 'src/device', 'src/transport'],
  },
  {
    name: 'src/connector',
    may: [...COMMON, 'src/wire', 'src/kv', 'src/device', 'src/transfer'],
    pure: ['src/connector/worker-connector.ts'],
  },
  {
    name: 'src/scheduler',
    may: ['src/errors.ts', 'src/grammar', 'src/wire', 'src/kv', 'src/config', 'src/connector'],
    pure: true,
  },
  {
    name: 'src/model',
    may: [...COMMON, 'src/wire', 'src/kv', 'src/config', 'src/device', 'src/scheduler', 'ffi'],
  },
  {
    name: 'src/worker',
    may: [
      ...COMMON,
      'src/openai-error.ts',
      'src/reading-thread.ts',
      ...[
        'grammar',
        'parsing',
        'wire',
        'kv',
        'config',
        'access',
        'device',
        'transfer',
        'connector',
        'scheduler',
        'model',
      ].map((folder) => `src/${folder}`),
    ],
  },
  {
    name: 'src/proxy',
    may: [
      ...COMMON,
      ...['src/openai-error.ts', 'src/reading-thread.ts', 'src/wire', 'src/kv', 'src/config', 'src/access'],
      // It reads prompts as workers do.
      ...['src/parsing', 'src/model', 'src/worker'],
    ],
  },
  {
    name: 'src/doctor',
    may: [...COMMON, 'src/wire', 'src/config', 'src/device', 'src/transfer', 'src/worker', 'ffi'],
  },
  {
    name: 'src/cli',
    may: [
      ...COMMON,
      ...[
        'src/wire',
        'src/config',
        'src/device',
        'src/transfer',
        'src/worker',
        'src/proxy',
        'src/doctor',
        'ffi',
      ],
    ],
  },
  {
    name: 'src/index.ts',
    may: [
      ...COMMON,
      ...['parsing', 'wire', 'kv', 'config', 'device', 'transfer', 'connector', 'worker', 'proxy'].map(
        (folder) => `src/${folder}`,
      ),
    ],
  },
  // The page; of the proxy the types of what it is told.
  { name: 'ui', may: ['src/proxy'] },
  { name: 'examples', may: ['src/index.ts'] },
  { name: 'support', may: ['src'] },
  { name: 'bench', may: ['src', 'ffi', 'support'] },
  { name: 'bin', may: ['src/cli', 'bench'] },
  { name: 'scripts', may: ['src', 'ffi', 'support', 'bench'] },
  { name: 'test', may: ['src', 'ffi', 'support', 'bench', 'scripts'] },
];

/**
 * What pure layers may import from outside: computes, and reads or writes nothing. `isIP` of node:net and `deserialize` of node:v8 look at
 * what they are given alone.
 */
const PURE_PACKAGES = ['node:crypto', 'node:net', 'node:v8', '@msgpack/msgpack'];

interface Import {
  readonly name: string;
  /** Gone once compiled. */
  readonly typesOnly: boolean;
}

/** What is wrong in the tree at `root`, a line each. */
export function violations(root: string, layers = LAYERS): string[] {
  const found: string[] = [];
  const imports = new Map<string, readonly Import[]>();
  for (const top of new Set(layers.map(({ name }) => name.split('/')[0]!))) {
    for (const file of filesUnder(root, top)) imports.set(file, importsOf(join(root, file)));
  }
  for (const [file, list] of imports) {
    const from = layerOf(file, layers);
    if (!from) {
      found.push(`${file}: is of no layer: give it a row in scripts/layers.ts`);
      continue;
    }
    for (const { name } of list) {
      if (name === 'koffi' && from.name !== 'ffi') found.push(`${file}: koffi is for ffi/ alone`);
      if (!name.startsWith('.')) continue;
      const target = targetOf(file, name);
      const to = layerOf(target, layers);
      if (to && to !== from && !allows(from, to.name)) {
        found.push(`${file}: ${from.name} may not import ${to.name} (${target})`);
      }
    }
    if (from.pure === true || from.pure?.includes(file) === false) {
      const path = pathToIo(file, imports);
      if (path) found.push(`${file}: is pure, yet reaches I/O: ${path.join(' -> ')}`);
    }
  }
  return found;
}

/** The table as docs/architecture.md shows it. */
export function layersTable(): string {
  const rows = LAYERS.map(({ name, may, pure }) => {
    const mark = pure === undefined ? '' : pure === true ? ' (pure)' : ' (pure but for the worker side)';
    return `| \`${name}\`${mark} | ${may.map((one) => `\`${one.replace('src/', '')}\``).join(' ') || 'nothing'} |`;
  });
  return ['| layer | may import |', '|---|---|', ...rows].join('\n');
}

function allows(from: Layer, to: string): boolean {
  return from.may.some((name) => to === name || to.startsWith(`${name}/`));
}

function layerOf(file: string, layers: readonly Layer[]): Layer | undefined {
  const fitting = layers.filter(({ name }) => file === name || file.startsWith(`${name}/`));
  return fitting.sort((a, b) => b.name.length - a.name.length)[0];
}

/** From `file` over what it imports at run time to the first import of what does I/O; undefined where there is none. */
function pathToIo(file: string, imports: ReadonlyMap<string, readonly Import[]>): string[] | undefined {
  const seen = new Set([file]);
  const paths = [[file]];
  for (const path of paths) {
    const last = path[path.length - 1]!;
    for (const { name, typesOnly } of imports.get(last) ?? []) {
      if (typesOnly) continue;
      if (!name.startsWith('.')) {
        if (!PURE_PACKAGES.includes(name)) return [...path, name];
        continue;
      }
      const target = targetOf(last, name);
      if (seen.has(target)) continue;
      seen.add(target);
      paths.push([...path, target]);
    }
  }
  return undefined;
}

/** The source file that `name` in `file` means: bins import what has been built of it. */
function targetOf(file: string, name: string): string {
  return join(dirname(file), name)
    .replace(/^dist\//, '')
    .replace(/\.js$/, '.ts');
}

function importsOf(path: string): Import[] {
  const source = readFileSync(path, 'utf8');
  const lang = ['.ts', '.mts'].includes(extname(path)) ? 'ts' : 'js';
  const { module, errors, program } = parseSync(path, source, { lang, sourceType: 'module' });
  if (errors.length > 0) throw new Error(`${path}: ${errors[0]!.message}`);
  const found: Import[] = [];
  for (const { moduleRequest, entries } of module.staticImports) {
    const typesOnly = entries.length > 0 && entries.every(({ isType }) => isType);
    found.push({ name: moduleRequest.value, typesOnly });
  }
  for (const { entries } of module.staticExports) {
    for (const { moduleRequest, isType } of entries) {
      if (moduleRequest) found.push({ name: moduleRequest.value, typesOnly: isType });
    }
  }
  for (const { moduleRequest } of module.dynamicImports) {
    const text = source.slice(moduleRequest.start, moduleRequest.end);
    const literal = /^(['"`])([^'"`$]+)\1$/.exec(text)?.[2];
    if (literal !== undefined) found.push({ name: literal, typesOnly: false });
  }
  // `import('./x.ts').Type` is in none of these lists.
  if (source.split('import(').length - 1 > module.dynamicImports.length) {
    new Visitor({
      TSImportType: ({ source: { value } }) => void found.push({ name: value, typesOnly: true }),
    }).visit(program);
  }
  return found;
}

function filesUnder(root: string, top: string): string[] {
  if (!existsSync(join(root, top))) return [];
  return readdirSync(join(root, top), { withFileTypes: true, recursive: true })
    .filter((entry) => entry.isFile())
    .map((entry) => relative(root, join(entry.parentPath, entry.name)))
    .filter((file) => top === 'bin' || ['.ts', '.mts', '.js', '.mjs'].includes(extname(file)))
    .filter((file) => !file.includes('node_modules/'));
}

if (argv[1] !== undefined && resolve(argv[1]) === fileURLToPath(import.meta.url)) {
  if (argv.includes('--table')) {
    console.log(layersTable());
  } else {
    const found = violations(fileURLToPath(new URL('../', import.meta.url)));
    for (const line of found) console.error(line);
    process.exitCode = found.length > 0 ? 1 : 0;
  }
}
