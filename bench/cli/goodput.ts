/** pd-bench goodput: options, signals, output. */

import { Command } from 'commander';
import { duration, integer, json, listOf, real, text, toggle } from '../../src/config/kinds.ts';
import {
  addOptions,
  defineOptions,
  option,
  resolveOptions,
  type ValuesOf,
} from '../../src/config/options.ts';
import { PdError } from '../../src/errors.ts';
import { type GoodputResult, rateLine, type SystemResult, writePage } from '../goodput/page.ts';
import { Subject } from '../goodput/subject.ts';
import { sweep } from '../goodput/sweep.ts';
import { measureTurns, PUBLISHED_TURNS } from '../goodput/turns.ts';
import { readMachine } from '../measure/machine.ts';
import { conclude } from '../measure/results.ts';
import { newTextSeed } from '../serve/plan.ts';
import { commas } from './options.ts';
import { objectOf } from './serve.ts';

const SERVER = 'Servers';
const LOAD = 'Load';
const BOUNDS = 'Bounds';
const OUTPUT = 'Output';

const GOODPUT_OPTIONS = defineOptions({
  // Named differently from a worker's environment variables (PD_MODEL, say), which mean something else.
  servedUrl: option({
    flag: 'url',
    kind: listOf(text('url')),
    help: 'a server with the OpenAI API, with or without /v1; each of several gets the same load, one after another',
    group: SERVER,
    default: ['http://localhost:10002'],
  }),
  servedName: option({
    flag: 'name',
    kind: listOf(text('name')),
    help: 'what the page calls it, in the order of --url',
    group: SERVER,
    defaultText: 'its URL',
  }),
  servedModel: option({
    flag: 'model',
    kind: text('id'),
    help: 'model id',
    group: SERVER,
    defaultText: 'the first of /v1/models',
  }),
  apiKey: option({ kind: text('key'), help: 'bearer token', group: SERVER }),
  tokenizeUrl: option({
    kind: text('url'),
    help: 'server whose /tokenize counts prompts; with a proxy, one of its workers',
    group: SERVER,
    defaultText: 'that of --url; if it has none, lengths are approximate',
  }),
  rates: option({
    kind: commas(real(0.01, 100_000, 'per second')),
    help: 'requests per second that are measured first (Poisson arrivals, regardless of the answers)',
    group: LOAD,
    default: [1, 4, 16],
  }),
  runs: option({
    kind: integer(1, 1_000),
    help: 'rates in all: further ones are chosen where the most good requests were',
    group: LOAD,
    default: 8,
  }),
  window: option({
    kind: duration(100),
    help: 'time that counts, of each rate',
    group: LOAD,
    default: 15_000,
  }),
  lead: option({ kind: duration(0), help: 'time of arrivals before it', group: LOAD, default: 3_000 }),
  drain: option({
    kind: duration(0),
    help: 'time at most for the last counted requests to end, with arrivals going on',
    group: LOAD,
    default: 10_000,
  }),
  promptTokens: option({
    kind: integer(1, 10_000_000),
    help: 'tokens of a prompt',
    group: LOAD,
    default: 2_000,
  }),
  outputTokens: option({
    kind: integer(1, 10_000_000),
    help: 'tokens of an answer',
    group: LOAD,
    default: 200,
  }),
  turns: option({
    kind: toggle(),
    help: 'afterwards also conversations: 20, 10 at a time, 5 turns, 4,096 tokens and 1,024 more each turn, 128 out; needs /tokenize and return_token_ids',
    group: LOAD,
    default: false,
  }),
  loadSeed: option({
    flag: 'seed',
    kind: integer(0, Number.MAX_SAFE_INTEGER),
    help: 'seed of arrivals',
    group: LOAD,
    default: 0,
  }),
  textSeed: option({
    kind: integer(0, 2 ** 40),
    help: 'seed of the words; with the same one as in an earlier run, prefix caches would hit',
    group: LOAD,
    defaultText: 'a new one in every run',
  }),
  ignoreEos: option({
    kind: toggle(),
    help: 'let answers end early: do not send ignore_eos, which servers other than vLLM and pd-worker may refuse',
    group: LOAD,
    default: true,
    defaultText: 'it is sent',
  }),
  temperature: option({ kind: real(0, 2), help: 'sampling temperature', group: LOAD, default: 0 }),
  extraBody: option({ kind: json(), help: 'additional fields of every request', group: LOAD }),
  sloTtft: option({
    kind: duration(1),
    help: 'limit on the time to first token',
    group: BOUNDS,
    default: 400,
  }),
  sloItl: option({
    kind: commas(duration(1)),
    help: "limits on a request's mean time per output token after the first, each evaluated from the same runs",
    group: BOUNDS,
    default: [12, 10],
  }),
  seconds: option({ kind: duration(1_000), help: 'for all of it', group: OUTPUT, default: 3_600_000 }),
  out: option({ kind: text('dir'), help: 'where page, plot and JSON go', group: OUTPUT, default: '.' }),
});

const EXAMPLES = `
Examples:
  pd-bench goodput --url http://localhost:10002 --tokenize-url http://localhost:8083 --rates 8,14 --runs 6
  pd-bench goodput --url http://one:8000 --name one --url http://two:8000 --name two --slo-ttft 1s --slo-itl 50ms
  scripts/goodput-results.sh       a pair and two undivided workers on the same two GPUs, into bench/results/

docs/benchmarks.md defines every number. Exit status 1 if a server could not be measured.`;

type GoodputValues = ValuesOf<typeof GOODPUT_OPTIONS>;

export function goodputCommand(): Command {
  const command = addOptions(new Command('goodput'), GOODPUT_OPTIONS)
    .description(
      'finds how many requests per second a server answers within bounds, and which bound the others break',
    )
    .addHelpText('after', EXAMPLES)
    .allowExcessArguments(false);
  return command.action(() => run(resolveOptions(GOODPUT_OPTIONS, command, process.env)));
}

async function run(values: GoodputValues): Promise<void> {
  const { servedUrl: urls, servedName: names = [], out } = values;
  if (names.length > 0 && names.length !== urls.length)
    throw new PdError('CONFIG_INVALID', '--name: give one for each --url');
  const [startedAt, began] = [new Date().toISOString(), performance.now()];
  const stop = new AbortController();
  const interrupted = () => {
    if (stop.signal.aborted) process.exit(130);
    stop.abort(new PdError('REQUEST_ABORTED', 'interrupted'));
  };
  process.on('SIGINT', interrupted).on('SIGTERM', interrupted);
  const problems: string[] = [];
  const leftOut: string[] = [];
  const systems: SystemResult[] = [];
  let model = values.servedModel ?? '';
  const load = loadOf(values);
  for (const [i, url] of urls.entries()) {
    const name = names[i] ?? url;
    try {
      const measured = await measure(values, load, { url, name, until: began + values.seconds }, stop.signal);
      model ||= measured.model;
      systems.push(measured.system);
      if (measured.system.rates.length < Math.min(values.runs, values.rates.length) || stop.signal.aborted)
        leftOut.push(`rates of ${name}`);
    } catch (error) {
      const problem = `${name}: ${PdError.from(error).message}`;
      problems.push(problem);
      console.error(`pd-bench: ${problem}`);
    }
  }
  process.off('SIGINT', interrupted).off('SIGTERM', interrupted);
  const result: GoodputResult = {
    startedAt,
    seconds: (performance.now() - began) / 1_000,
    model,
    device: 'server',
    machine: await readMachine(),
    environment: { libraries: [], gpus: [] },
    load,
    systems,
    problems,
    leftOut,
  };
  const line = `pd-bench ${process.argv.slice(2).join(' ')}`.replace(/ --(out|api-key)[ =]\S+/g, '');
  conclude(`${writePage(result, out, line)}.md`, problems.length === 0);
}

function loadOf({ window, lead, drain, promptTokens, outputTokens, loadSeed, ...values }: GoodputValues) {
  return {
    bounds: { ttftMs: values.sloTtft, itlMs: values.sloItl },
    phases: { leadMs: lead, windowMs: window, drainMs: drain },
    promptTokens,
    outputTokens,
    seed: loadSeed,
    textSeed: values.textSeed ?? newTextSeed(),
  };
}

async function measure(
  values: GoodputValues,
  load: ReturnType<typeof loadOf>,
  { url, name, until }: { readonly url: string; readonly name: string; readonly until: number },
  signal: AbortSignal,
): Promise<{ readonly model: string; readonly system: SystemResult }> {
  const { rates, runs, extraBody, turns, tokenizeUrl, apiKey, servedModel, temperature, ignoreEos } = values;
  const body = { ...(turns && { return_token_ids: true }), ...(extraBody && objectOf(extraBody)) };
  const subject = await Subject.open(
    {
      ...{ url, tokenizeUrl, apiKey, temperature, ignoreEos },
      model: servedModel,
      endpoint: 'completions',
      extraBody: body,
    },
    signal,
  );
  try {
    await subject.warmUp(load.promptTokens, signal);
    const onRate = (result: Parameters<typeof rateLine>[1]) => console.error(rateLine(name, result));
    const measured = await sweep(subject, { ...load, rates, runs, until, onRate }, signal);
    const system: SystemResult = { name, kind: 'server', about: subject.target.url, rates: measured };
    if (!turns) return { model: subject.target.model, system };
    const conversations = await measureTurns(subject, PUBLISHED_TURNS, load.textSeed, signal);
    return { model: subject.target.model, system: { ...system, turns: conversations } };
  } finally {
    await subject.close();
  }
}
