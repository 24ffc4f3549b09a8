/**
 * An instance that answers at once, for measuring the proxy alone: it has no model and no KV, and only pings.
 *   argv: producer|consumer, HOST:PORT of the proxy's discovery, how many events a streamed answer has, milliseconds between them, `ours`
 * With milliseconds given (not 0), there are as many events as `max_tokens` says. Every event carries `t`, when it was written. `ours`: it
 * announces itself as a pd-worker does that may be asked at once, else as one of vLLM. Bodies are not parsed: `stream` and `max_tokens` are
 * looked for at their beginning.
 * Prints its port on stdout and ends when its stdin closes.
 */
import { once } from 'node:events';
import { type AddressInfo, createServer, type Socket } from 'node:net';
import { Dealer } from 'zeromq';
import { encodePing } from '../../src/wire/codec.ts';
import { OVERLAP_FEATURE } from '../../src/wire/overlap.ts';
import { monotonicMs } from '../measure/machine.ts';
import { chunkOf, LAST_CHUNK, MessageReader } from './raw-http.ts';

const [role, discovery, eventCount, paceMs = '0', kind] = process.argv.slice(2);
const PING_MS = 1_000;
/** Of a body: its fields that matter come first. */
const LOOKED_AT = 512;

const usage = {
  prompt_tokens: 16,
  completion_tokens: Number(eventCount),
  total_tokens: 16 + Number(eventCount),
};
const chunk = (finish: string | null) => ({
  ...{ id: 'cmpl-0', object: 'text_completion', created: 0, model: 'm' },
  choices: [{ index: 0, text: ' word', logprobs: null, finish_reason: finish }],
});
const wholeOf = (json: object) => {
  const body = JSON.stringify(json);
  return `HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: ${Buffer.byteLength(body)}\r\n\r\n${body}`;
};
const answer = wholeOf({ ...chunk('length'), usage });
const models = wholeOf({ object: 'list', data: [{ id: 'm', object: 'model' }] });
const streamHead =
  'HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n';
/** Its `t` has always as many digits. */
const event = () =>
  chunkOf(`data: ${JSON.stringify({ t: Number(monotonicMs().toFixed(3)), ...chunk(null) })}\n\n`);
const lastEvents = () =>
  `${chunkOf(`data: ${JSON.stringify(chunk('length'))}\n\ndata: [DONE]\n\n`)}${LAST_CHUNK}`;

function pace(out: Socket, events: number): void {
  out.write(streamHead);
  let left = events;
  const timer = setInterval(() => {
    out.write(--left > 0 ? event() : lastEvents());
    if (left === 0) end();
  }, Number(paceMs));
  const end = () => {
    clearInterval(timer);
    out.off('close', end);
  };
  out.on('close', end);
}

function serve(socket: Socket): void {
  let head = '';
  let begin = '';
  const reader = new MessageReader({
    onHead: (text) => {
      head = text;
      begin = '';
    },
    onData: (bytes) => {
      if (begin.length < LOOKED_AT) begin += bytes.toString('latin1', 0, LOOKED_AT - begin.length);
    },
    onEnd: () => {
      if (head.startsWith('GET')) socket.write(models);
      else if (!/"stream": *true/.test(begin)) socket.write(answer);
      else if (paceMs === '0') {
        let events = '';
        for (let i = 1; i < Number(eventCount); i++) events += event();
        socket.write(streamHead + events + lastEvents());
      } else pace(socket, Number(/"max_tokens": *(\d+)/.exec(begin)?.[1] ?? 1));
    },
  });
  socket.on('data', (read) => reader.push(read));
  socket.on('error', () => socket.destroy());
}

const sockets = new Set<Socket>();
const server = createServer({ noDelay: true }, (socket) => {
  sockets.add(socket);
  socket.once('close', () => sockets.delete(socket));
  serve(socket);
});
server.listen(0, '127.0.0.1');
await once(server, 'listening');
const { port } = server.address() as AddressInfo;

const zmqAddress = `127.0.0.1:${port}`; // only a name here: nothing listens for KV
const dealer = new Dealer({ routingId: zmqAddress, linger: 0, sendTimeout: PING_MS });
dealer.connect(`tcp://${discovery}`);
const body = encodePing({
  type: role === 'producer' ? 'P' : 'D',
  http_address: `127.0.0.1:${port}`,
  zmq_address: zmqAddress,
  ...(kind === 'ours' && {
    native: { version: 1, digest: 'bench', model: 'm', features: [OVERLAP_FEATURE] },
  }),
});
const ping = () => void dealer.send(body).catch(() => process.exit(1));
ping();
const timer = setInterval(ping, PING_MS);
console.log(port);

process.stdin.resume().once('end', () => {
  clearInterval(timer);
  dealer.close();
  server.close();
  for (const socket of sockets) socket.destroy();
});
