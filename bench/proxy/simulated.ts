/**
 * Workers in time alone, for measuring placement on a machine whose cores real ones would fight for: they compute nothing, but take as long
 * as computing would. Their prefix cache, what they say of it (KV events) and of their load, and their pings are those of workers.
 *
 *   producer   one prompt after another, in chunks, so much for each token that is not cached
 *   consumer   so much for each token that it has to fetch, then a step for all in its batch, again and again
 *
 *   argv: a `Simulation` as JSON. Prints the URLs of all as a line of JSON, producers first, and ends when its stdin closes.
 */
import { once } from 'node:events';
import { createServer, type IncomingMessage, type ServerResponse } from 'node:http';
import type { AddressInfo } from 'node:net';
import { setTimeout as sleep } from 'node:timers/promises';
import { Dealer } from 'zeromq';
import { type BlockHash, extendHashes } from '../../src/kv/block-hash.ts';
import { BlockManager } from '../../src/kv/block-manager.ts';
import { Tokenizer } from '../../src/model/tokenizer.ts';
import { createLogger } from '../../src/observability/log.ts';
import { PromptReader } from '../../src/proxy/prompt-reader.ts';
import type { CacheChange } from '../../src/scheduler/types.ts';
import { encodePing } from '../../src/wire/codec.ts';
import type { WorkerLoad } from '../../src/wire/messages.ts';
import { PROMPT_IDS_FEATURE, PROMPT_IDS_HEADER, splitPromptIds } from '../../src/wire/prompt-ids.ts';
import { KvEventPublisher } from '../../src/worker/kv-events.ts';
import { LoadReport } from '../../src/worker/load-report.ts';

export interface Simulation {
  readonly producers: number;
  readonly consumers: number;
  /** `host:port` of every proxy's. */
  readonly discovery: readonly string[];
  /** Directory of its checkpoint. */
  readonly tokenizer: string;
  /** Of 16 tokens, of each worker. */
  readonly blocks: number;
  /** Of a prompt token at a producer. */
  readonly prefillMs: number;
  /** Of a prompt token that comes from a producer. */
  readonly fetchMs: number;
  /** Of a consumer's step, and of each sequence in it. */
  readonly stepMs: number;
  readonly sequenceMs: number;
  /** Prompt tokens of a producer's step. */
  readonly chunk: number;
  /** Most sequences of a consumer's batch. */
  readonly sequences: number;
}

const HOST = '127.0.0.1';
const BLOCK = 16;
const PING_MS = 1_000;
const POLL_MS = 2;
const LOG = createLogger({ level: 'error', format: 'json' }, 'simulated');

interface Prompt {
  readonly id: string;
  readonly tokens: Int32Array;
  readonly hashes: readonly BlockHash[];
  readonly gone: AbortSignal;
}

/** A prefix cache that says what becomes of it. */
class Cache {
  readonly blocks: BlockManager;
  readonly #publisher: KvEventPublisher;
  #changes: CacheChange[] = [];
  asked = 0;
  found = 0;

  constructor(count: number, publisher: KvEventPublisher) {
    this.#publisher = publisher;
    this.blocks = new BlockManager(count, BLOCK, (hash) => this.#changes.push({ type: 'removed', hash }));
  }

  /** Waits until there is room. Returns how many tokens were cached; undefined where the client went away. */
  async take({ id, tokens, hashes, gone }: Prompt, output: number): Promise<number | undefined> {
    const length = tokens.length + output;
    for (;;) {
      if (gone.aborted) return undefined;
      const cached = this.blocks.lookup(hashes, tokens.length - 1);
      if (this.blocks.canAllocate(length, cached)) {
        this.blocks.allocate(id, length, cached);
        this.#tell();
        this.asked += tokens.length;
        this.found += cached.length * BLOCK;
        return cached.length * BLOCK;
      }
      await sleep(POLL_MS);
    }
  }

  /** The first `count` tokens are there. */
  computed({ id, tokens, hashes }: Prompt, count: number): void {
    for (const { first, end } of this.blocks.commit(id, hashes, count)) {
      const parent = hashes[first - 1];
      this.#changes.push({
        type: 'stored',
        hashes: hashes.slice(first, end),
        ...(parent !== undefined && { parent }),
        tokens: tokens.subarray(first * BLOCK, end * BLOCK),
      });
    }
    this.#tell();
  }

  free({ id }: Prompt): void {
    this.blocks.free(id);
  }

  #tell(): void {
    if (this.#changes.length === 0) return;
    this.#publisher.publish(this.#changes);
    this.#changes = [];
  }
}

interface Body {
  readonly model?: string;
  readonly max_tokens?: number;
}

class SimulatedWorker {
  readonly #role: 'producer' | 'consumer';
  readonly #simulation: Simulation;
  readonly #reader: PromptReader;
  readonly #cache: Cache;
  readonly #server = createServer((request, out) => void this.#answer(request, out));
  readonly #report: LoadReport;
  #count = 0;
  /** Of the producer's prompts, and of prompts that a consumer computes alone: one after the other. */
  #computing: Promise<unknown> = Promise.resolve();
  #waiting = 0;
  #queuedTokens = 0;
  /** What each sequence of the batch does with a token; false: it is over. */
  readonly #batch = new Set<() => boolean>();
  #stepping = false;

  constructor(
    role: 'producer' | 'consumer',
    simulation: Simulation,
    reader: PromptReader,
    publisher: KvEventPublisher,
    tell: (load: WorkerLoad) => void,
  ) {
    this.#role = role;
    this.#simulation = simulation;
    this.#reader = reader;
    this.#cache = new Cache(simulation.blocks, publisher);
    this.#report = new LoadReport(() => this.load, tell);
  }

  async listen(): Promise<string> {
    this.#server.listen(0, HOST);
    await once(this.#server, 'listening');
    return `${HOST}:${(this.#server.address() as AddressInfo).port}`;
  }

  get load(): WorkerLoad {
    const { numUsed: kvUsed, numBlocks: kvBlocks } = this.#cache.blocks;
    const running = this.#batch.size;
    return { running, waiting: this.#waiting, kvUsed, kvBlocks, queuedTokens: this.#queuedTokens };
  }

  async #answer(request: IncomingMessage, out: ServerResponse): Promise<void> {
    if (request.method === 'GET') return this.#page(request.url ?? '', out);
    const gone = new AbortController();
    out.once('close', () => gone.abort());
    const chunks: Buffer[] = [];
    for await (const chunk of request) chunks.push(chunk as Buffer);
    const path = request.url ?? '';
    const bytes = new Uint8Array(Buffer.concat(chunks));
    const { body, ids } = splitPromptIds(bytes, request.headers[PROMPT_IDS_HEADER]);
    const { model, max_tokens: output = 16 } = JSON.parse(Buffer.from(body).toString()) as Body;
    const known = ids ?? this.#reader.idsOf(path, body, model);
    if (!known) return void out.writeHead(path.startsWith('/v1/') ? 400 : 200).end('{}');
    const tokens = Int32Array.from(known);
    const hashes: BlockHash[] = [];
    extendHashes(hashes, tokens, BLOCK);
    const prompt = { id: String(this.#count++), tokens, hashes, gone: gone.signal };
    this.#waiting++;
    this.#report.changed();
    try {
      if (this.#role === 'producer') {
        await this.#compute(prompt, 1);
        this.#waiting--;
        out.writeHead(200, { 'content-type': 'application/json' }).end('{"choices":[]}');
      } else {
        const alone = !String(request.headers['x-request-id']).includes('___prefill_addr_');
        if (alone) await this.#compute(prompt, output);
        else await this.#fetch(prompt, output);
        this.#waiting--;
        await this.#generate(prompt, output, out);
      }
    } finally {
      this.#cache.free(prompt);
      this.#report.changed();
    }
  }

  #compute(prompt: Prompt, output: number): Promise<unknown> {
    const { chunk, prefillMs } = this.#simulation;
    const { length } = prompt.tokens;
    this.#queuedTokens += length;
    const compute = async () => {
      const cached = (await this.#cache.take(prompt, output)) ?? length;
      this.#queuedTokens -= cached;
      for (let at = cached; at < length; at += chunk) {
        const count = Math.min(chunk, length - at);
        if (!prompt.gone.aborted) await sleep(count * prefillMs);
        this.#queuedTokens -= count;
        if (!prompt.gone.aborted) this.#cache.computed(prompt, at + count);
      }
    };
    this.#computing = this.#computing.then(compute);
    return this.#computing;
  }

  async #fetch(prompt: Prompt, output: number): Promise<void> {
    while (this.#batch.size >= this.#simulation.sequences) await sleep(POLL_MS);
    const cached = await this.#cache.take(prompt, output);
    if (cached === undefined) return;
    await sleep((prompt.tokens.length - cached) * this.#simulation.fetchMs);
    this.#cache.computed(prompt, prompt.tokens.length);
  }

  #generate({ gone, tokens }: Prompt, output: number, out: ServerResponse): Promise<void> {
    out.writeHead(200, { 'content-type': 'text/event-stream' });
    let left = output;
    return new Promise((resolve) => {
      this.#batch.add(() => {
        left--;
        const choices = [{ index: 0, text: ' the', finish_reason: left > 0 ? null : 'length' }];
        if (!gone.aborted) out.write(`data: ${JSON.stringify({ choices })}\n\n`);
        if (left > 0 && !gone.aborted) return true;
        const usage = { prompt_tokens: tokens.length, completion_tokens: output };
        if (!gone.aborted) out.end(`data: ${JSON.stringify({ choices: [], usage })}\n\ndata: [DONE]\n\n`);
        resolve();
        return false;
      });
      this.#report.changed();
      if (!this.#stepping) void this.#step();
    });
  }

  async #step(): Promise<void> {
    const { stepMs, sequenceMs } = this.#simulation;
    this.#stepping = true;
    while (this.#batch.size > 0) {
      await sleep(stepMs + sequenceMs * this.#batch.size);
      for (const take of [...this.#batch]) if (!take()) this.#batch.delete(take);
    }
    this.#stepping = false;
  }

  #page(path: string, out: ServerResponse): void {
    if (path === '/metrics') {
      const { asked, found } = this.#cache;
      out.end(`vllm:prefix_cache_queries_total ${asked}\nvllm:prefix_cache_hits_total ${found}\n`);
    } else if (path === '/v1/models') {
      out.end(JSON.stringify({ object: 'list', data: [{ id: 'demo', object: 'model' }] }));
    } else {
      out.end('{}');
    }
  }
}

async function startOne(
  role: 'producer' | 'consumer',
  simulation: Simulation,
  reader: PromptReader,
  digest: string,
): Promise<string> {
  const told = { model: 'demo', blockSize: BLOCK, form: 'map', medium: 'GPU', log: LOG } as const;
  const publisher = await KvEventPublisher.open({ bind: { host: HOST, port: 0 }, ...told });
  const worker = new SimulatedWorker(role, simulation, reader, publisher, (load) => ping(load));
  const address = await worker.listen();
  publisher.announce(address);
  const dealers = simulation.discovery.map((discovery) => {
    const dealer = new Dealer({ routingId: address, linger: 0, sendHighWaterMark: 8, sendTimeout: 0 });
    dealer.connect(`tcp://${discovery}`);
    return dealer;
  });
  const ping = (load: WorkerLoad) => {
    const body = encodePing({
      type: role === 'producer' ? 'P' : 'D',
      http_address: address,
      zmq_address: address, // only its host is used: nothing listens for KV
      native: {
        version: 1,
        digest: 'simulated',
        model: 'demo',
        features: [PROMPT_IDS_FEATURE],
        events: publisher.ports,
        tokenizer: digest,
        load,
      },
    });
    for (const dealer of dealers) dealer.send(body).catch(() => {}); // that proxy is away
  };
  setInterval(() => ping(worker.load), PING_MS);
  ping(worker.load);
  return `http://${address}`;
}

const simulation = JSON.parse(process.argv[2]!) as Simulation;
const [reader, digest] = await Promise.all([
  PromptReader.load(simulation.tokenizer),
  Tokenizer.digestOf(simulation.tokenizer),
]);
const roles = [
  ...Array.from({ length: simulation.producers }, () => 'producer' as const),
  ...Array.from({ length: simulation.consumers }, () => 'consumer' as const),
];
const urls = await Promise.all(roles.map((role) => startOne(role, simulation, reader, digest)));
process.stdout.write(`${JSON.stringify(urls)}\n`);
process.stdin.resume().once('end', () => process.exit(0));
