/**
 * Transfer engines on two GPUs: a thousand tensors each way at once, crossing order, memory over many requests, kill -9, and the time of
 * one request's KV. `node dist/bench/gpu/engines.js`
 */
import { type ChildProcess, fork } from 'node:child_process';
import { fileURLToPath } from 'node:url';
import type { HostPort } from '../../src/net/address.ts';
import { SEND_TYPES, type SendType } from '../../src/wire/messages.ts';
import type { EngineAnswer, EngineCommand } from './engine-peer.ts';

const MIB = 2 ** 20;
const scale = Number(process.env['PD_CHECK_SCALE'] ?? 1);
let failures = 0;

function row(name: string, value: string, ok = true): void {
  if (!ok) failures++;
  console.log(`${ok ? '  ' : 'X '}${name.padEnd(58)} ${value}`);
}
const ms = (value: number) => `${value.toFixed(value < 10 ? 2 : 1)} ms`;

class Engine {
  readonly child: ChildProcess;
  readonly ready: Promise<HostPort>;
  address: HostPort = { host: '', port: 0 };
  #next = 0;
  readonly #waiting = new Map<number, (answer: EngineAnswer) => void>();

  constructor(gpu: number, sendType: SendType) {
    const source = import.meta.url.endsWith('.ts');
    const entry = fileURLToPath(new URL(source ? './engine-peer.ts' : './engine-peer.js', import.meta.url));
    this.child = fork(entry, [String(gpu), sendType], {
      serialization: 'advanced',
      execArgv: source ? ['--import', 'tsx'] : [],
    });
    this.ready = new Promise((resolve) => {
      this.child.once('message', ({ address }: { address: HostPort }) => {
        this.address = address;
        resolve(address);
      });
    });
    this.child.on('message', (answer: EngineAnswer) => this.#waiting.get(answer.id)?.(answer));
  }

  ask(command: EngineCommand): Promise<EngineAnswer> {
    const id = ++this.#next;
    return new Promise((resolve) => {
      this.#waiting.set(id, resolve);
      this.child.send({ id, command });
    });
  }
}

async function start(sendType: SendType, ...gpus: number[]): Promise<Engine[]> {
  const engines = gpus.map((gpu) => new Engine(gpu, sendType));
  await Promise.all(engines.map(({ ready }) => ready));
  return engines;
}
const quit = (engines: readonly Engine[]) => Promise.all(engines.map((engine) => engine.ask({ do: 'quit' })));

interface Moved {
  readonly ok: boolean;
  readonly milliseconds: number;
  readonly error: string;
}

async function move(
  from: Engine,
  to: Engine,
  id: string,
  count: number,
  bytes: number,
  order?: 'reverse',
): Promise<Moved> {
  const common = { id, count, bytes };
  const received = to.ask({ do: 'receive', ...common, peer: from.address, ...(order && { order }) });
  const sent = await from.ask({ do: 'send', ...common, peer: to.address, ...(order && { order }) });
  const got = await received;
  const error = sent.error ?? got.error ?? '';
  return { ok: error === '' && sent.hash === got.hash, milliseconds: got.to - sent.from, error };
}

async function bothWays(): Promise<void> {
  const [a, b] = (await start('PUT_ASYNC', 0, 1)) as [Engine, Engine];
  const count = Math.round(1_000 * scale);
  const began = performance.now();
  const results = await Promise.all([move(a, b, 'there', count, 65_536), move(b, a, 'back', count, 65_536)]);
  const errors = results.map(({ error }) => error).join(' ');
  row(
    `${count} tensors of 64 KiB each way at once`,
    `${ms(performance.now() - began)} ${errors}`,
    results.every(({ ok }) => ok),
  );
  await quit([a, b]);
}

async function crossing(): Promise<void> {
  const [a, b, c, d] = (await start('PUT_ASYNC', 0, 0, 1, 1)) as [Engine, Engine, Engine, Engine];
  const bytes = Math.round(256 * scale) * MIB;
  for (let round = 0; round < 2; round++) {
    const began = performance.now();
    const results = await Promise.all([
      move(a, c, `ac${round}`, 3, bytes),
      move(b, d, `bd${round}`, 3, bytes, 'reverse'),
      move(b, c, `bc${round}`, 3, bytes),
      move(a, d, `ad${round}`, 3, bytes, 'reverse'),
    ]);
    const errors = results.map(({ error }) => error).join(' ');
    row(
      `2 x 2 engines, 12 tensors of ${bytes / MIB} MiB, round ${round + 1}`,
      `${ms(performance.now() - began)} ${errors}`,
      results.every(({ ok }) => ok),
    );
  }
  await quit([a, b, c, d]);
}

async function memory(): Promise<void> {
  const [a, b] = (await start('PUT_ASYNC', 0, 1)) as [Engine, Engine];
  const total = Math.round(1_000 * scale);
  const taken: EngineAnswer[] = [];
  let wrong = 0;
  for (let i = 0; i < total; i++) {
    const moved = await move(a, b, `r${i}`, 4, 1 + Math.floor(Math.random() * 8 * MIB));
    if (!moved.ok) wrong++;
    if (i === Math.floor(total / 5) || i === total - 1)
      taken.push(await b.ask({ do: 'memory' }), await a.ask({ do: 'memory' }));
  }
  const [consumer, producer, consumerEnd, producerEnd] = taken as [
    EngineAnswer,
    EngineAnswer,
    EngineAnswer,
    EngineAnswer,
  ];
  const growth =
    Math.max(consumerEnd.resident! / consumer.resident!, producerEnd.resident! / producer.resident!) - 1;
  const gpu = consumerEnd.gpuUsed! - consumer.gpuUsed! + (producerEnd.gpuUsed! - producer.gpuUsed!);
  row(
    `${total} requests of 4 tensors`,
    `${wrong} wrong, GPU memory +${gpu} bytes, resident ${(100 * growth).toFixed(1)} % more`,
    wrong === 0 && gpu === 0 && growth < 0.05,
  );
  await quit([a, b]);
}

async function times(): Promise<void> {
  for (const sendType of SEND_TYPES) {
    const [a, b] = (await start(sendType, 0, 1)) as [Engine, Engine];
    for (const tokens of [16, 256, 1_024, 4_096]) {
      const bytes = Math.round(tokens * 4_096 * scale);
      let best = Number.POSITIVE_INFINITY;
      let wrong = '';
      for (let i = 0; i < 5; i++) {
        const moved = await move(a, b, `t${tokens}-${i}`, 32, bytes);
        if (moved.ok) best = Math.min(best, moved.milliseconds);
        else wrong = moved.error || 'bytes differ';
      }
      const rate = ((32 * bytes) / best / 1e6).toFixed(0);
      row(
        `${sendType}, 32 layers, ${tokens} tokens, ${((32 * bytes) / 1e6).toFixed(1)} MB`,
        `${ms(best)} ${rate} GB/s ${wrong}`,
        wrong === '',
      );
    }
    await quit([a, b]);
  }
}

async function killed(): Promise<void> {
  const [a, b] = (await start('PUT_ASYNC', 0, 1)) as [Engine, Engine];
  await move(a, b, 'warm', 1, 4_096);
  const bytes = Math.round(256 * MIB * scale);
  void b.ask({ do: 'receive', id: 'cut', count: 12, bytes, peer: a.address });
  const began = performance.now();
  const sending = a.ask({ do: 'send', id: 'cut', count: 12, bytes, peer: b.address });
  await new Promise((resolve) => setTimeout(resolve, 10));
  b.child.kill('SIGKILL');
  const { error } = await sending;
  row(
    'consumer killed in mid-transfer',
    `${ms(performance.now() - began)}: ${(error ?? 'all had been sent').slice(0, 90)}`,
    true,
  );
  const [next] = (await start('PUT_ASYNC', 1)) as [Engine];
  const again = await move(a, next, 'again', 4, MIB);
  row('another one is served', `${ms(again.milliseconds)} ${again.error}`, again.ok);
  await quit([a, next]);
}

await bothWays();
await crossing();
await memory();
await times();
await killed();
console.log(failures === 0 ? 'all as it should be' : `${failures} FAILED`);
process.exitCode = failures === 0 ? 0 : 1;
