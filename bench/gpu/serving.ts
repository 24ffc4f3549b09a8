/**
 * What a request's fields cost the steps of a worker, as it serves: HTTP, reader thread, core thread, grammars, and one GPU. An 8B shape
 * under a real vocabulary of 128k, batches of 16 and 64 streams. A step is the time between two messages of the core in which every stream
 * has its token; a gap, what a client sees between two of them.
 *
 *   node dist/bench/gpu/serving.js TOKENIZER_DIR [FOLDER]    tokenizer.json and tokenizer_config.json of a Llama 3; FOLDER has room for 16 GB
 *   node dist/bench/gpu/serving.js --small                   a dry run on the host, with the demo model
 *
 * Results as JSON to the file that PD_RESULTS names.
 */
import { once } from 'node:events';
import { copyFileSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { Agent, request as httpRequest, type IncomingMessage } from 'node:http';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { isMainThread, parentPort, Worker } from 'node:worker_threads';
import { demoModelDir } from '../../src/config/demo-model.ts';
import { workerConfig } from '../../src/config/embedded.ts';
import { compileSpec } from '../../src/grammar/grammar.ts';
import { TokenGrammar } from '../../src/grammar/masks.ts';
import { Vocabulary, vocabularyOf } from '../../src/grammar/vocabulary.ts';
import { startThread, threadEntry } from '../../src/thread-entry.ts';
import { CoreClient, type CorePort } from '../../src/worker/core-client.ts';
import { RequestBodyReader } from '../../src/worker/request-body-reader.ts';
import { PdWorker } from '../../src/worker/worker.ts';
import { monotonicMs } from '../measure/machine.ts';
import { type Spread, spreadOf } from '../measure/statistics.ts';
import { writeLargeModel } from './large-model.ts';
import { range } from './model-rig.ts';
import { conclude, part, row } from './rows.ts';

interface Setting {
  readonly modelDir: string;
  readonly device: string;
  readonly vocab: number;
  readonly sizes: readonly number[];
  readonly promptTokens: number;
  readonly steps: number;
}

interface Variant {
  readonly name: string;
  /** Of stream `i`. */
  readonly fields: (i: number) => Readonly<Record<string, unknown>>;
  readonly schema?: (i: number) => object;
  /** Of the plain step's median, at most; absent: this is plain. */
  readonly most?: number;
}

/** An array that no stream comes to the end of. `name`: of a property, so that schemas differ. */
function notes(name: string): object {
  return {
    type: 'array',
    items: { $ref: '#/$defs/note' },
    minItems: 1_000,
    $defs: {
      note: {
        type: 'object',
        properties: {
          [name]: { type: 'string', maxLength: 60 },
          age: { type: 'integer', minimum: 0, maximum: 150 },
          email: { type: 'string', format: 'email' },
          score: { type: 'number' },
          tags: { type: 'array', items: { enum: ['new', 'vip', 'lost'] }, maxItems: 8 },
          replies: { type: 'array', items: { $ref: '#/$defs/note' }, maxItems: 2 },
        },
        required: [name, 'age', 'score'],
        additionalProperties: false,
      },
    },
  };
}

const same = () => notes('name');
const own = (i: number) => notes(`name${i}`);
const penalties = { repetition_penalty: 1.1, presence_penalty: 0.2, frequency_penalty: 0.2 };
const cuts = { temperature: 0.8, top_p: 0.9, top_k: 50 };
const held = (schema: (i: number) => object) => (i: number) => ({ structured_outputs: { json: schema(i) } });

/** Plain first and last. */
const VARIANTS: readonly Variant[] = [
  { name: 'plain', fields: () => ({}) },
  { name: 'top-k, top-p', fields: () => cuts, most: 1.15 },
  { name: 'penalties', fields: () => penalties, most: 1.15 },
  { name: 'logprobs 5', fields: () => ({ logprobs: 5 }), most: 1.15 },
  { name: 'a schema', fields: held(same), schema: same, most: 1.3 },
  { name: 'the schema again', fields: held(same), schema: same, most: 1.3 },
  { name: 'a schema each', fields: held(own), schema: own, most: 1.3 },
  {
    name: 'all',
    fields: (i) => ({
      ...cuts,
      ...penalties,
      ...held(same)(i),
      min_p: 0.01,
      logprobs: 5,
      logit_bias: Object.fromEntries(range(0, 20).map((token) => [token, 1])),
      bad_words: ['never', 'a b c'],
    }),
    schema: same,
    most: 1.3,
  },
  { name: 'plain again', fields: () => ({}) },
];
/** Of plain steps' 99th percentile, at most, at 16 rows. */
const MOST_P99 = 1.3;

/** Runs on a thread of its own, so that reading streams delays no clock. */
interface Load {
  readonly url: string;
  readonly bodies: readonly string[];
}

interface Stream {
  /** When each event came. */
  readonly times: readonly number[];
  readonly text: string;
}

const agent = new Agent({ keepAlive: true });

async function stream(url: string, body: string): Promise<Stream> {
  const post = httpRequest(new URL('/v1/completions', url), {
    method: 'POST',
    agent,
    headers: { 'content-type': 'application/json' },
  });
  post.end(body);
  const [answer] = (await once(post, 'response')) as [IncomingMessage];
  const chunks: string[] = [];
  const times: number[] = [];
  for await (const chunk of answer.setEncoding('utf8') as AsyncIterable<string>) {
    const now = monotonicMs();
    chunks.push(chunk);
    for (let at = chunk.indexOf('\n\n'); at >= 0; at = chunk.indexOf('\n\n', at + 2)) times.push(now);
  }
  const text = chunks.join('');
  if (answer.statusCode !== 200) throw new Error(`${answer.statusCode}: ${text.slice(0, 500)}`);
  return { times, text };
}

function textOf({ text }: Stream): string {
  const events = text.split('\n\n').filter((event) => event.startsWith('data: {'));
  return events
    .map((event) => JSON.parse(event.slice('data: '.length)))
    .map(({ choices, error }) => {
      if (error) throw new Error(JSON.stringify(error));
      return choices?.[0]?.text ?? '';
    })
    .join('');
}

/** When each message of the core came, and of how many outputs. */
type Messages = { readonly at: number; readonly outputs: number }[];

function watched(port: CorePort, messages: Messages): CorePort {
  return {
    ...port,
    onMessage: (listener) =>
      port.onMessage((message) => {
        if (message.type === 'outputs') messages.push({ at: monotonicMs(), outputs: message.outputs.length });
        listener(message);
      }),
  };
}

async function streams(client: Worker, load: Load): Promise<readonly Stream[]> {
  client.postMessage(load);
  const [answer] = (await once(client, 'message')) as [readonly Stream[] | string];
  if (typeof answer === 'string') throw new Error(answer);
  return answer;
}

interface Measured {
  readonly steps: readonly number[];
  readonly gaps: readonly number[];
  readonly texts: readonly string[];
}

async function measure(
  { promptTokens, steps, vocab }: Setting,
  size: number,
  variant: Variant,
  { url, client, messages }: { url: string; client: Worker; messages: Messages },
): Promise<Measured> {
  const bodies = (tokens: number) =>
    range(0, size).map((i) =>
      JSON.stringify({
        // the same each time, and so from the second time on in the cache
        prompt: range(0, promptTokens).map((at) => 3 + ((at * 7_919 + i * 104_729) % (vocab - 300))),
        max_tokens: tokens,
        ignore_eos: true,
        stream: true,
        temperature: 1,
        seed: i,
        ...variant.fields(i),
      }),
    );
  // Grammars are built one after another: so the streams begin together.
  if (variant.schema) await streams(client, { url, bodies: bodies(1) });
  messages.length = 0;
  const answer = await streams(client, { url, bodies: bodies(steps) });
  const full = messages.flatMap(({ at, outputs }, i) => {
    const before = messages[i - 1];
    return outputs === size && before?.outputs === size ? [at - before.at] : [];
  });
  const from = Math.max(...answer.map(({ times }) => times[0]!));
  const to = Math.min(...answer.map(({ times }) => times.at(-1)!));
  const gaps = answer.flatMap(({ times }) =>
    times.flatMap((at, i) => (i > 0 && times[i - 1]! >= from && at <= to ? [at - times[i - 1]!] : [])),
  );
  return { steps: full, gaps, texts: answer.map(textOf) };
}

const NO_VOCABULARY = new Vocabulary(vocabularyOf([]));

/** How many of the texts can be gone on with to one of their schemas. */
function begun(texts: readonly string[], schema: (i: number) => object): number {
  return texts.filter((text, i) => {
    const tables = compileSpec({ kind: 'json-schema', schema: schema(i) }, () => 0);
    const grammar = new TokenGrammar(tables, NO_VOCABULARY);
    // A character that was cut off at the end has become another.
    const bytes = Buffer.from(text.replace(/\uFFFD$/, ''));
    return text.length > 0 && grammar.acceptBytes(grammar.start, bytes) !== undefined;
  }).length;
}

const shown = (spread: Spread) => [spread.p50, spread.p99, spread.max].map((ms) => ms.toFixed(2)).join(' / ');

async function serve(setting: Setting): Promise<unknown> {
  const { modelDir, device, sizes, promptTokens, steps } = setting;
  const messages: Messages = [];
  const began = monotonicMs();
  const config = workerConfig({
    modelDir,
    device,
    servedModelNames: ['bench'],
    maxNumSeqs: Math.max(...sizes),
    maxModelLen: promptTokens + steps,
  });
  const worker = await PdWorker.start(config, {
    startCore: async (init) => {
      const entry = threadEntry(import.meta.url, '../../src/worker/core-thread.js');
      return await CoreClient.connect(
        watched(startThread(entry, { workerData: init, name: 'core' }), messages),
      );
    },
    startReader: (dir, log) => RequestBodyReader.start(dir, log, { threadAfterMs: 0 }),
  });
  row('worker ready', `${((monotonicMs() - began) / 1e3).toFixed(1)} s`);
  const client = new Worker(new URL(import.meta.url));
  const { host, port } = worker.httpAddress;
  const at = { url: `http://${host}:${port}`, client, messages };
  const results: Record<string, unknown> = {};
  try {
    for (const size of sizes) {
      await measure(setting, size, VARIANTS[0]!, at); // code that has not run, prompts that are not known
      const measured = new Map<Variant, Measured>();
      for (const variant of VARIANTS) measured.set(variant, await measure(setting, size, variant, at));
      const plain = spreadOf(
        [...measured].flatMap(([{ most }, { steps: times }]) => (most === undefined ? times : [])),
      )!;
      for (const [
        { name, most = Number.POSITIVE_INFINITY, schema },
        { steps: times, gaps, texts },
      ] of measured) {
        const [step, gap] = [spreadOf(times)!, spreadOf(gaps)!];
        const [ratio, tail] = [step.p50 / plain.p50, step.p99 / plain.p99];
        const right = schema ? begun(texts, schema) : size;
        const fine = device === 'host' || (ratio <= most && (!schema || size !== 16 || tail <= MOST_P99));
        results[`${name} x ${size}`] = { step, gap };
        row(
          `batch ${size}, ${name}: step p50 / p99 / max, gap`,
          `${shown(step)}, ${shown(gap)} ms; of plain ${ratio.toFixed(3)}, p99 ${tail.toFixed(3)}${schema ? `; ${right} texts of the form` : ''}`,
          fine && right === size,
        );
      }
    }
  } finally {
    await client.terminate();
    await worker.close();
  }
  return results;
}

async function main(): Promise<void> {
  const [tokenizer, folder = tmpdir()] = process.argv.slice(2);
  if (tokenizer === undefined)
    throw new Error('usage: serving.js TOKENIZER_DIR [FOLDER], or serving.js --small');
  if (tokenizer === '--small') {
    const small = {
      modelDir: demoModelDir(),
      device: 'host',
      vocab: 2_048,
      sizes: [4],
      promptTokens: 32,
      steps: 24,
    };
    await part('demo model', () => serve(small));
    return conclude();
  }
  const modelDir = mkdtempSync(join(folder, 'pd-serving-'));
  try {
    writeLargeModel(modelDir);
    for (const file of ['tokenizer.json', 'tokenizer_config.json']) {
      copyFileSync(join(tokenizer, file), join(modelDir, file));
    }
    const large = {
      modelDir,
      device: 'cuda:0',
      vocab: 128_000,
      sizes: [16, 64],
      promptTokens: 512,
      steps: 320,
    };
    const results = await part('8B', () => serve(large));
    if (process.env['PD_RESULTS']) writeFileSync(process.env['PD_RESULTS'], JSON.stringify(results, null, 1));
  } finally {
    rmSync(modelDir, { recursive: true, force: true });
  }
  conclude();
}

if (isMainThread) await main();
else {
  parentPort!.on('message', ({ url, bodies }: Load) => {
    void Promise.all(bodies.map((body) => stream(url, body)))
      .catch((error: unknown) => String(error))
      .then((answer) => parentPort!.postMessage(answer));
  });
}
