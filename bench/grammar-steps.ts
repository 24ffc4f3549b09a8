/**
 * What grammars cost the core thread in decode steps: rows under schemas that the process has not seen before, one each, that differ in more than
 * names. A step is the masks of all rows and the reading of what was drawn. Tokens are drawn evenly among those allowed, as a model of random
 * weights does (bench/gpu/serving.ts), or after a text of the schema, the longest token that is allowed each time.
 *
 *   ./scripts/build.sh && node dist/bench/grammar-steps.js [--tokenizer tokenizer.json] [--rows 16] [--steps 200] [--json]
 */
import { Command, InvalidArgumentError } from 'commander';
import { compileSpec } from '../src/grammar/grammar.ts';
import type { ScheduledSequence, TokenHistory } from '../src/scheduler/types.ts';
import { CoreGrammars } from '../src/worker/core-grammars.ts';
import { GrammarCompiler } from '../src/worker/grammar-compiler.ts';
import { type Spread, spreadOf } from './measure/statistics.ts';
import { plainTable } from './measure/table.ts';
import { madeUpTokens, tokensOf } from './measure/tokens.ts';

/** Kinds of properties, with a value each. */
const KINDS: readonly (readonly [schema: object, value: unknown])[] = [
  [{ type: 'string' }, 'Called at noon, "nobody" there — try again.'],
  [{ type: 'string', maxLength: 60 }, 'Ada Lovelace, first to write a program'],
  [{ type: 'integer', minimum: 0, maximum: 150 }, 36],
  [{ type: 'number' }, -2.5e3],
  [{ type: 'string', format: 'email' }, 'ada.lovelace@example.org'],
  [{ type: 'array', items: { enum: ['new', 'vip', 'lost'] }, maxItems: 8 }, ['new', 'vip']],
  [{ type: 'array', items: { $ref: '#/$defs/note' }, maxItems: 2 }, []],
  [{ type: 'string', format: 'date-time' }, '2026-11-28T23:10:00Z'],
  [{ type: 'string', pattern: '^[A-Z]{2,4}-[0-9]+$' }, 'ABC-1815'],
  [
    {
      anyOf: [
        { type: 'null' },
        { type: 'object', properties: { at: { type: 'boolean' } }, required: ['at'] },
      ],
    },
    { at: true },
  ],
  [{ type: 'object' }, { k: [1, 'two', null] }],
];
const LONGEST_TOKEN = 64;
const ROUNDS = 5;

/** An array that nothing comes to the end of: `pick` says which kinds of properties its items have. */
function schemaOf(row: number): { readonly schema: object; readonly text: string } {
  const random = randomFrom(row);
  const kinds = KINDS.filter(() => random() < 0.6);
  const properties = Object.fromEntries(kinds.map(([schema], i) => [`field${row}_${i}`, schema]));
  const names = Object.keys(properties);
  const note = {
    type: 'object',
    properties,
    required: names.filter(() => random() < 0.6),
    additionalProperties: false,
  };
  const value = Object.fromEntries(kinds.map(([, one], i) => [names[i]!, one]));
  return {
    schema: { type: 'array', items: { $ref: '#/$defs/note' }, minItems: 200, $defs: { note } },
    text: JSON.stringify(Array(200).fill(value)),
  };
}

/** Numbers from 0 to below 1, the same for the same seed. */
function randomFrom(seed: number): () => number {
  let state = (seed >>> 0) + 1;
  return () => {
    state = (Math.imul(state, 1_664_525) + 1_013_904_223) >>> 0;
    return state / 2 ** 32;
  };
}

type Draw = (mask: Uint32Array) => number;

class Row {
  readonly history: TokenHistory;
  readonly sequence: ScheduledSequence;
  readonly draw: Draw;
  readonly #tokens: number[] = [];

  constructor(i: number, grammar: NonNullable<ReturnType<GrammarCompiler['compile']>>, draw: Draw) {
    const tokens = this.#tokens;
    this.draw = draw;
    this.history = {
      promptLength: 0,
      get length() {
        return tokens.length;
      },
      tokens: (start, end) => Int32Array.from(tokens.slice(start, end)),
    };
    const params = { grammar, stopTokenIds: [] };
    this.sequence = {
      sequenceId: `row-${i}`,
      sample: { params, history: this.history },
    } as unknown as ScheduledSequence;
  }

  take(token: number): void {
    this.#tokens.push(token);
  }
}

const isAllowed = (mask: Uint32Array, token: number) => ((mask[token >>> 5]! >>> (token & 31)) & 1) === 1;

function evenly(random: () => number): Draw {
  return (mask) => {
    const allowed: number[] = [];
    mask.forEach((word, i) => {
      for (let bit = 0; word !== 0 && bit < 32; bit++) if ((word >>> bit) & 1) allowed.push(i * 32 + bit);
    });
    return allowed[Math.floor(random() * allowed.length)]!;
  };
}

function along(text: string, ids: ReadonlyMap<string, number>): Draw {
  const bytes = Buffer.from(text).toString('latin1');
  let at = 0;
  return (mask) => {
    for (let length = Math.min(LONGEST_TOKEN, bytes.length - at); length > 0; length--) {
      const id = ids.get(bytes.slice(at, at + length));
      if (id === undefined || !isAllowed(mask, id)) continue;
      at += length;
      return id;
    }
    throw new Error(`the grammar stops before ${JSON.stringify(text.slice(at, at + 20))}`);
  };
}

/** Milliseconds of all cores, as if each grammar had one for itself. */
function usedMs(): number {
  const { user, system } = process.cpuUsage();
  return (user + system) / 1_000;
}

/** Milliseconds since then that this thread has computed for, at most: by the clock or of the process, whichever is less. */
function watch(): () => number {
  const [at, used] = [performance.now(), process.cpuUsage()];
  return () => {
    const { user, system } = process.cpuUsage(used);
    return Math.min(performance.now() - at, (user + system) / 1_000);
  };
}

/** Milliseconds of each step. */
async function measure(core: CoreGrammars, rows: readonly Row[], steps: number): Promise<number[]> {
  const times: number[] = [];
  for (let step = 0; step < steps; step++) {
    const masking = watch();
    const masks: Uint32Array[] = [];
    for (const { sequence } of rows) masks.push((await core.mask(sequence))!);
    const masked = masking();
    const tokens = rows.map(({ draw }, i) => draw(masks[i]!));
    const reading = watch();
    rows.forEach(({ sequence, history }, i) => {
      core.isLastToken(sequence.sample!.params.grammar!, history, tokens[i]!);
    });
    times.push(masked + reading());
    rows.forEach((row, i) => {
      row.take(tokens[i]!);
    });
  }
  return times;
}

function whole(value: string): number {
  const number = Number(value);
  if (!Number.isInteger(number) || number < 1) throw new InvalidArgumentError('a positive integer');
  return number;
}

const command = new Command('grammar-steps')
  .option('--tokenizer <file>', 'tokenizer.json of a byte-level BPE; else the vocabulary is made up')
  .option('--rows <n>', 'schemas at once', whole, 16)
  .option('--steps <n>', 'tokens of each', whole, 200)
  .option('--json', 'print JSON')
  .parse();
const {
  tokenizer,
  rows: numRows,
  steps,
  json,
} = command.opts<{ tokenizer?: string; rows: number; steps: number; json?: boolean }>();
const tokens = tokenizer === undefined ? madeUpTokens() : tokensOf(tokenizer);
const vocab = tokens.length;
const ids = new Map(
  tokens.flatMap((bytes, id) => (bytes ? [[Buffer.from(bytes).toString('latin1'), id]] : [])),
);
const compiler = new GrammarCompiler(
  {
    isSpecial: () => false,
    tokenBytes: (id) => tokens[id],
    tokenString: String,
  },
  usedMs,
);
const compiles: number[] = [];
const asked = Array.from({ length: numRows }, (_, row) => {
  const { schema, text } = schemaOf(row);
  const spec = { kind: 'json-schema', schema } as const;
  compileSpec(spec, () => 0); // code that has not run
  const start = usedMs();
  const use = compiler.compile({ spec, param: 'bench' }, vocab);
  compiles.push(usedMs() - start);
  return { use, text };
});
const DRAWS = {
  evenly: (row: number) => evenly(randomFrom(row)),
  'after a text': (row: number) => along(asked[row]!.text, ids),
};
const results: Record<string, Spread> = {};
const arrivals: number[] = [];
for (const [name, draw] of Object.entries(DRAWS)) {
  const [fresh, again]: [number[][], number[][]] = [[], []];
  for (let round = 0; round <= ROUNDS; round++) {
    // As the thread gets it, which has seen none of them.
    const arriving = watch();
    const uses = asked.map(({ use }) => structuredClone(use));
    arrivals.push(arriving() / numRows);
    const core = new CoreGrammars(vocab);
    const rows = () => uses.map((use, row) => new Row(row, use, draw(row)));
    const times = [await measure(core, rows(), steps), await measure(core, rows(), steps)] as const;
    if (round === 0) continue; // code that has not run
    fresh.push(times[0]);
    again.push(times[1]);
  }
  results[`${name}, new`] = bestOf(fresh);
  results[`${name}, again`] = bestOf(again);
}
const compile = spreadOf(compiles)!;
const arrival = spreadOf(arrivals)!;
if (json)
  console.log(JSON.stringify({ vocab, rows: numRows, steps, compile, arrival, results }, undefined, 2));
else {
  console.log(`${vocab} tokens, ${numRows} rows, ${steps} steps; milliseconds`);
  const shown = ({ p50, p99, max }: Spread) => [p50, p99, max].map((value) => value.toFixed(2));
  console.log(
    plainTable({
      head: ['', 'p50', 'p99', 'max'],
      rows: [
        ['compiling one', ...shown(compile)],
        ['receiving one', ...shown(arrival)],
        ...Object.entries(results).map(([name, step]) => [`a step, tokens ${name}`, ...shown(step)]),
      ],
    }),
  );
}

/** Of each step its fastest round: the work is the same, and what else the machine does is not meant. */
function bestOf(rounds: readonly (readonly number[])[]): Spread {
  return spreadOf(rounds[0]!.map((_, step) => Math.min(...rounds.map((times) => times[step]!))))!;
}
