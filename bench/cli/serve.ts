/** pd-bench serve: options, signals, output. */
import { writeFileSync } from 'node:fs';
import { Command } from 'commander';
import { print } from '../../src/cli/run.ts';
import { duration, integer, json, oneOf, real, text, toggle } from '../../src/config/kinds.ts';
import {
  addOptions,
  defineOptions,
  option,
  resolveOptions,
  type ValuesOf,
} from '../../src/config/options.ts';
import { PdError } from '../../src/errors.ts';
import { z } from '../../src/zod.ts';
import { readMachine } from '../measure/machine.ts';
import { NO_PROGRESS, terminalProgress } from '../measure/progress.ts';
import { formatLength, lengthKind } from '../serve/lengths.ts';
import type { Arrival } from '../serve/load.ts';
import { newTextSeed } from '../serve/plan.ts';
import { renderServe } from '../serve/render.ts';
import { type ServeOptions, serve } from '../serve/serve.ts';

const SERVER = 'Server';
const LOAD = 'Load';
const TEXT = 'Prompts and answers';
const OUTPUT = 'Output';

export const SERVE_OPTIONS = defineOptions({
  // Named differently from a worker's environment variables (PD_MODEL, say), which mean something else.
  servedUrl: option({
    flag: 'url',
    kind: text('url'),
    help: 'any server with the OpenAI API, with or without /v1',
    group: SERVER,
    default: 'http://localhost:10002',
  }),
  servedModel: option({
    flag: 'model',
    kind: text('id'),
    help: 'model id',
    group: SERVER,
    defaultText: 'the first of /v1/models',
  }),
  apiKey: option({ kind: text('key'), help: 'bearer token', group: SERVER }),
  endpoint: option({
    kind: oneOf(['completions', 'chat']),
    help: '/v1/completions or /v1/chat/completions',
    group: SERVER,
    default: 'completions',
  }),
  tokenizeUrl: option({
    kind: text('url'),
    help: 'server whose /tokenize counts prompts; with a proxy, one of its workers',
    group: SERVER,
    defaultText: 'that of --url; if it has none, lengths are approximate',
  }),
  requestRate: option({
    kind: real(0.001, 100_000, 'per second'),
    help: 'requests per second on average (Poisson arrivals), regardless of the answers',
    group: LOAD,
  }),
  concurrency: option({
    kind: integer(1, 100_000),
    help: 'requests in flight at all times, instead of --request-rate',
    group: LOAD,
    defaultText: '1',
  }),
  numRequests: option({ kind: integer(1, 10_000_000), help: 'requests', group: LOAD, default: 100 }),
  warmUp: option({
    kind: integer(0, 100_000),
    help: 'requests sent first, which are not counted',
    group: LOAD,
    defaultText: 'that of --concurrency, or 4',
  }),
  timeout: option({ kind: duration(1), help: 'deadline of a whole answer', group: LOAD, default: 600_000 }),
  loadSeed: option({
    flag: 'seed',
    kind: integer(0, Number.MAX_SAFE_INTEGER),
    help: 'seed of arrivals and lengths, which are the same in every run',
    group: LOAD,
    default: 0,
  }),
  promptTokens: option({
    kind: lengthKind(),
    help: 'tokens of a prompt: 512, 128-1024, or lognormal:MEDIAN,SIGMA[,MAX]',
    group: TEXT,
    default: { kind: 'fixed', tokens: 512 },
  }),
  outputTokens: option({
    kind: lengthKind(),
    help: 'tokens of an answer, likewise',
    group: TEXT,
    default: { kind: 'fixed', tokens: 128 },
  }),
  sharedPrefix: option({
    kind: integer(0, 10_000_000),
    help: 'tokens of a prefix common to all prompts; without it they differ from the first word, so that no prefix cache helps',
    group: TEXT,
    default: 0,
  }),
  textSeed: option({
    kind: integer(0, Number.MAX_SAFE_INTEGER),
    help: 'seed of the words; with the same one as in an earlier run, prefix caches would hit',
    group: TEXT,
    defaultText: 'a new one in every run',
  }),
  promptFile: option({
    kind: text('file'),
    help: 'read prompts from this file: one per line, or .jsonl with "prompt" and "output_tokens"; starts over at the end',
    group: TEXT,
  }),
  ignoreEos: option({
    kind: toggle(),
    help: 'let answers end early: do not send ignore_eos, which servers other than vLLM and pd-worker may refuse',
    group: TEXT,
    default: true,
    defaultText: 'it is sent',
  }),
  temperature: option({ kind: real(0, 2), help: 'sampling temperature', group: TEXT, default: 0 }),
  extraBody: option({ kind: json(), help: 'additional fields of every request', group: TEXT }),
  sloTtft: option({
    kind: duration(0),
    help: 'for goodput: limit on the time to first token',
    group: OUTPUT,
  }),
  sloItl: option({
    kind: duration(0),
    help: "for goodput: limit on a request's mean time per output token after the first",
    group: OUTPUT,
  }),
  json: option({ kind: toggle(), help: 'print the result as JSON', group: OUTPUT, default: false }),
  details: option({
    kind: toggle(),
    help: 'include every request in the JSON',
    group: OUTPUT,
    default: false,
  }),
  output: option({ kind: text('file'), help: 'write the JSON to a file as well', group: OUTPUT }),
});

const EXAMPLES = `
Examples:
  pd-bench serve --url http://localhost:10002 --concurrency 8 --prompt-tokens 512 --output-tokens 64
  pd-bench serve --url http://localhost:10002 --tokenize-url http://localhost:8083 --request-rate 4 \\
    --prompt-tokens lognormal:1000,0.8,8000 --output-tokens 16-256 --slo-ttft 500ms --slo-itl 50ms --json
  pd-bench serve --url https://example.org/v1 --model NAME --endpoint chat --no-ignore-eos

docs/benchmarks.md defines every number. Exit status 1 if a request failed, 130 after Ctrl-C.`;

type ServeValues = ValuesOf<typeof SERVE_OPTIONS>;

export function serveCommand(): Command {
  const command = addOptions(new Command('serve'), SERVE_OPTIONS)
    .description('measures what the clients of a server see under load: latencies, throughput, failures')
    .addHelpText('after', EXAMPLES)
    .allowExcessArguments(false);
  return command.action(() => run(resolveOptions(SERVE_OPTIONS, command, process.env)));
}

async function run(values: ServeValues): Promise<void> {
  const options = serveOptions(values);
  const startedAt = new Date().toISOString();
  const progress = values.json ? NO_PROGRESS : terminalProgress();
  const stop = new AbortController();
  const interrupted = () => {
    if (stop.signal.aborted) process.exit(130);
    stop.abort(new PdError('REQUEST_ABORTED', 'interrupted before the first request was sent'));
  };
  process.on('SIGINT', interrupted).on('SIGTERM', interrupted);
  try {
    const result = await serve(options, { signal: stop.signal, progress });
    const { records, ...short } = result;
    const { apiKey: _, ...plain } = options;
    const document = {
      benchmark: 'serve',
      startedAt,
      machine: await readMachine(),
      options: plain,
      ...short,
      ...(values.details && { records }),
    };
    const jsonText = `${JSON.stringify(document, undefined, 1)}\n`;
    if (values.output !== undefined) writeFileSync(values.output, jsonText);
    await print(values.json ? jsonText : `${headline(options, result.model)}\n${renderServe(result)}`);
    process.exitCode = result.interrupted ? 130 : result.summary.requests.failed > 0 ? 1 : 0;
  } finally {
    progress.end();
    process.off('SIGINT', interrupted).off('SIGTERM', interrupted);
  }
}

/** Throws CONFIG_INVALID for options that are mutually exclusive. */
export function serveOptions(values: ServeValues): ServeOptions {
  const { requestRate, concurrency, sloTtft, sloItl, extraBody, warmUp } = values;
  if (requestRate !== undefined && concurrency !== undefined) {
    throw new PdError('CONFIG_INVALID', '--request-rate and --concurrency: give only one of them');
  }
  const arrival: Arrival =
    requestRate === undefined
      ? { kind: 'concurrency', width: concurrency ?? 1 }
      : { kind: 'rate', perSecond: requestRate };
  return {
    url: values.servedUrl,
    model: values.servedModel,
    apiKey: values.apiKey,
    endpoint: values.endpoint,
    tokenizeUrl: values.tokenizeUrl,
    temperature: values.temperature,
    ignoreEos: values.ignoreEos,
    extraBody: extraBody === undefined ? undefined : objectOf(extraBody),
    arrival,
    numRequests: values.numRequests,
    warmUp: warmUp ?? (arrival.kind === 'concurrency' ? arrival.width : 4),
    promptTokens: values.promptTokens,
    outputTokens: values.outputTokens,
    sharedPrefix: values.sharedPrefix,
    promptFile: values.promptFile,
    seed: values.loadSeed,
    textSeed: values.textSeed ?? newTextSeed(),
    timeoutMs: values.timeout,
    objectives: {
      ...(sloTtft !== undefined && { ttftMs: sloTtft }),
      ...(sloItl !== undefined && { itlMs: sloItl }),
    },
  };
}

/** Throws CONFIG_INVALID that names --extra-body. */
export function objectOf(source: string): Record<string, unknown> {
  try {
    const parsed = z.record(z.string(), z.unknown()).safeParse(JSON.parse(source));
    if (parsed.success) return parsed.data;
  } catch {
    // reported below
  }
  throw new PdError('CONFIG_INVALID', `--extra-body: ${source} is not a JSON object`);
}

function headline(options: ServeOptions, model: string): string {
  const { arrival, promptTokens, outputTokens, promptFile, sharedPrefix } = options;
  const load = arrival.kind === 'rate' ? `${arrival.perSecond} requests/s` : `${arrival.width} at once`;
  const prompts = promptFile === undefined ? `prompts of ${formatLength(promptTokens)} tokens` : promptFile;
  const shared = sharedPrefix > 0 ? `, the first ${sharedPrefix} the same` : '';
  const texts = `${prompts}${shared}, answers of ${formatLength(outputTokens)}`;
  return `${options.url}, ${model}, ${options.endpoint}; ${load}; ${texts}; text seed ${options.textSeed}`;
}
