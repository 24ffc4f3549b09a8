/**
 * Load on one HTTP server, from connections that each send their next request when the last is answered. Started by speed.ts, which gives it
 * a core of its own; argv: a LoadPlan in JSON. Prints a LoadResult.
 */
import { once } from 'node:events';
import { connect, type Socket } from 'node:net';
import { monotonicMs } from '../measure/machine.ts';
import type { LoadPlan, LoadResult } from './load-plan.ts';
import { MessageReader } from './raw-http.ts';

const COUNTER = '0000000000';
const START_MS = 10_000;

const plan = JSON.parse(process.argv[2]!) as LoadPlan;
const begin = monotonicMs();
const from = begin + plan.warmUpMs;
const until = from + plan.ms;
const latencies: number[] = [];
let all = 0;
let failed = 0;
/** Another in every run: the clock goes faster than requests do. */
let count = plan.seed * 1e9 + (Math.floor(begin * 100) % 1e9);

/** A request in its memory, which one connection writes again and again. */
class Request {
  readonly #bytes: Buffer;
  readonly #counterAt: number;
  #turn = 0;

  constructor() {
    const tokens = Math.ceil((plan.warmUpMs + plan.ms) / (plan.paceMs ?? 20)) + 100;
    const start = `{"stream":${plan.answers !== 'whole'},"max_tokens":${tokens},"model":"m","prompt":"`;
    const text = plan.bodyBytes - start.length - 2;
    const at = plan.prefixes === 'shared' ? Math.floor((text * 3) / 4) : 0;
    const words = 'lorem ipsum dolor sit amet '.repeat(Math.ceil(text / 27));
    const prompt = `${words.slice(0, at)}${COUNTER}${words.slice(0, Math.max(0, text - at - COUNTER.length))}`;
    const body = `${start}${prompt}"}`;
    const more = Object.entries(plan.headers ?? {}).map(([name, value]) => `${name}: ${value}\r\n`);
    const head = `POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n${more.join('')}content-length: ${body.length}\r\n\r\n`;
    this.#bytes = Buffer.from(head + body, 'latin1');
    this.#counterAt = head.length + start.length + at;
  }

  next(): Buffer {
    const same = plan.prefixes === 'hot' || (plan.prefixes === 'mixed' && this.#turn++ % 2 === 0);
    const counter = same ? COUNTER : String(++count).padStart(COUNTER.length, '0');
    this.#bytes.write(counter, this.#counterAt, 'latin1');
    return this.#bytes;
  }
}

function closedLoop(socket: Socket): void {
  const request = new Request();
  let sentAt = 0;
  let head = '';
  const send = () => {
    sentAt = monotonicMs();
    socket.write(request.next());
  };
  const reader = new MessageReader({
    onHead: (text) => {
      head = text;
    },
    onData: () => {},
    onEnd: () => {
      const now = monotonicMs();
      all++;
      if (now >= from) {
        if (head.startsWith('HTTP/1.1 200')) latencies.push(now - sentAt);
        else failed++;
      }
      if (now < until) send();
      else socket.end();
    },
  });
  socket.on('data', (read) => reader.push(read));
  send();
}

/** As backend.ts writes it, three digits after the point. */
const STAMP = /"t":([\d.]+)/g;

function stream(socket: Socket): void {
  const reader = new MessageReader({
    onHead: (text) => {
      if (!text.startsWith('HTTP/1.1 200')) failed++;
    },
    onData: (bytes) => {
      const now = monotonicMs();
      for (const [, stamp] of bytes.toString('latin1').matchAll(STAMP)) {
        all++;
        if (now >= from && now < until) latencies.push(now - Number(stamp));
      }
    },
    onEnd: () => {
      failed++; // none should end
    },
  });
  socket.on('data', (read) => reader.push(read));
  socket.write(new Request().next());
}

async function lane(at: number): Promise<void> {
  const { connections, port, answers, paceMs = 20 } = plan;
  if (answers === 'paced') {
    // Evenly over one interval and over the first half of the warm-up, so that neither beginnings nor events come all at once.
    const spread = Math.floor((plan.warmUpMs * at) / connections / 2);
    await new Promise((resolve) => setTimeout(resolve, spread + ((at * 7) % paceMs)));
  }
  const socket = connect({ port, host: '127.0.0.1', noDelay: true });
  const deadline = setTimeout(() => socket.destroy(new Error('no connection')), START_MS);
  await once(socket, 'connect');
  clearTimeout(deadline);
  const closed = once(socket, 'close');
  let over = false;
  if (answers === 'paced') {
    stream(socket);
    setTimeout(() => {
      over = true; // timers may come a little early
      socket.destroy();
    }, until - monotonicMs());
  } else {
    closedLoop(socket);
    // One that hangs counts as failed.
    setTimeout(
      () => {
        if (socket.destroyed) return;
        failed++;
        socket.destroy();
      },
      until + START_MS - monotonicMs(),
    ).unref();
  }
  await closed;
  if (!over && monotonicMs() < until) failed++;
}

await Promise.all(
  Array.from({ length: plan.connections }, (_, at) =>
    lane(at).catch(() => {
      failed++;
    }),
  ),
);
const result: LoadResult = {
  latenciesMs: latencies.map((one) => Math.round(one * 1e6) / 1e6),
  failed,
  all,
  perSecond: (latencies.length * 1_000) / plan.ms,
};
console.log(JSON.stringify(result));
