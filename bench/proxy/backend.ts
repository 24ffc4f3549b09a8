/**
 * An instance that answers at once, for measuring the proxy alone: it has no model and no KV, and only pings.
 *   argv: producer|consumer, HOST:PORT of the proxy's discovery, how many events a streamed answer has, milliseconds between them
 * With milliseconds given, there are as many events as `max_tokens` says. Long bodies are not parsed, as only the proxy's part is measured.
 * Prints its port on stdout and ends when its stdin closes.
 */
import { once } from 'node:events';
import { createServer, type ServerResponse } from 'node:http';
import type { AddressInfo } from 'node:net';
import { Dealer } from 'zeromq';
import { encodePing } from '../../src/wire/codec.ts';

const [role, discovery, eventCount, paceMs] = process.argv.slice(2);
const PING_MS = 1_000;
const LONG_BODY = 65_536;

const usage = {
  prompt_tokens: 16,
  completion_tokens: Number(eventCount),
  total_tokens: 16 + Number(eventCount),
};
const chunk = (finish: string | null) => ({
  ...{ id: 'cmpl-0', object: 'text_completion', created: 0, model: 'm' },
  choices: [{ index: 0, text: ' word', logprobs: null, finish_reason: finish }],
});
const whole = Buffer.from(JSON.stringify({ ...chunk('length'), usage }));
const event = `data: ${JSON.stringify(chunk(null))}\n\n`;
const lastEvents = `data: ${JSON.stringify(chunk('length'))}\n\ndata: [DONE]\n\n`;

interface Body {
  readonly stream?: boolean;
  readonly max_tokens?: number;
}

function pace(out: ServerResponse, events: number): void {
  let left = events;
  const timer = setInterval(() => {
    if (--left > 0) out.write(event);
    else out.end(lastEvents);
    if (left === 0) clearInterval(timer);
  }, Number(paceMs));
  out.once('close', () => clearInterval(timer));
}

const server = createServer((request, out) => {
  if (request.method === 'GET') {
    out.setHeader('content-type', 'application/json');
    out.end(JSON.stringify({ object: 'list', data: [{ id: 'm', object: 'model' }] }));
    return;
  }
  const chunks: Buffer[] = [];
  request.on('data', (data: Buffer) => chunks.push(data));
  request.on('end', () => {
    const bytes = Buffer.concat(chunks);
    const body = (bytes.length > LONG_BODY ? {} : JSON.parse(bytes.toString())) as Body;
    if (body.stream !== true) {
      out.writeHead(200, { 'content-type': 'application/json', 'content-length': whole.length });
      out.end(whole);
      return;
    }
    out.writeHead(200, { 'content-type': 'text/event-stream; charset=utf-8' });
    if (paceMs !== undefined) return pace(out, body.max_tokens ?? 1);
    for (let i = 1; i < Number(eventCount); i++) out.write(event);
    out.end(lastEvents);
  });
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
});
const ping = () => void dealer.send(body).catch(() => process.exit(1));
ping();
const timer = setInterval(ping, PING_MS);
console.log(port);

process.stdin.resume().once('end', () => {
  clearInterval(timer);
  dealer.close();
  server.close();
  server.closeAllConnections();
});
