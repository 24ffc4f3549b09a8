/**
 * `--peer HOST:PORT`: is there a KV listener, and could its worker reach one here? Nothing changes at the peer: it is asked, by GET, for
 * a tensor that nobody has. The ways in which a pair never opens are told apart: no route, nothing listens, something else listens, its
 * process is stopped or stuck, it listens but does not answer.
 */
import { connect, createServer, isIPv6, type Server, type Socket } from 'node:net';
import { DEFAULT_LIMITS } from '../config/transfer-options.ts';
import { PdError } from '../errors.ts';
import { asDestination, formatHostPort, type HostPort, zmqEndpoint } from '../net/address.ts';
import { reachable } from '../net/knock.ts';
import { EVERY_ADDRESS, reasonOf } from '../net/resolve.ts';
import { decodeAnswer, encodeMessage } from '../wire/codec.ts';
import { PROBE_TENSOR } from '../wire/ids.ts';
import type { Answer } from '../wire/messages.ts';
import { isLoopback } from './addresses.ts';
import { type Finding, fail, info, ok, type Section, warn } from './finding.ts';

export interface PeerQuestion {
  readonly peer: HostPort;
  /** Host that a worker here would tell the peer; absent where no worker in particular was asked about. */
  readonly announced?: string;
  readonly timeoutMs: number;
}

export async function peerSection({ peer, announced, timeoutMs }: PeerQuestion): Promise<Section> {
  const named = asDestination(peer);
  // A name without an address is told where it is connected to.
  const there = await reachable(named, timeoutMs).catch(() => named);
  const findings: Finding[] = [];
  const reached = await greet(there, timeoutMs);
  findings.push(reached.finding);
  if (reached.speaksZmq) findings.push(await ask(there, timeoutMs));
  if (reached.seenAs !== undefined)
    findings.push(...(await backwards(there, reached.seenAs, announced, timeoutMs)));
  return { title: `Peer ${formatHostPort(peer)}`, findings };
}

interface Greeting {
  readonly finding: Finding;
  readonly speaksZmq: boolean;
  /** Our address on this connection, which the peer's answers go to. */
  readonly seenAs?: string;
}

/** What ZeroMQ says first: a signature of ten bytes. */
const ZMTP_SIGNATURE = Buffer.from([0xff, 0, 0, 0, 0, 0, 0, 0, 1, 0x7f]);

async function greet(peer: HostPort, timeoutMs: number): Promise<Greeting> {
  const where = formatHostPort(peer);
  let socket: Socket;
  try {
    socket = await connectTo(peer, timeoutMs);
  } catch (cause) {
    return { finding: unreachable(where, cause as NodeJS.ErrnoException, timeoutMs), speaksZmq: false };
  }
  const seenAs = socket.localAddress?.replace(/^::ffff:/, '');
  const known = seenAs === undefined ? {} : { seenAs };
  let zmq: Buffer | undefined;
  try {
    zmq = await firstBytes(socket, ZMTP_SIGNATURE, timeoutMs);
  } finally {
    socket.destroy();
  }
  if (zmq?.[0] === 0xff && (zmq.length < 10 || (zmq[9]! & 1) === 1)) {
    return { finding: ok('reached over TCP, speaks ZeroMQ'), speaksZmq: true, ...known };
  }
  const http = (await speaksHttp(peer, timeoutMs)) ? ' but HTTP' : '';
  // Of a process that does nothing the kernel still takes connections.
  if (zmq === undefined && http === '') {
    const finding = fail(
      `${where} takes connections and says nothing within ${timeoutMs / 1_000} s: the process behind it is stopped or stuck`,
      'see what it does, on its machine: `ss -ltnp` names it, state T in `ps` is stopped (kill -CONT goes on); restart one that hangs',
    );
    return { finding, speaksZmq: false, ...known };
  }
  const mend =
    http === ''
      ? 'name the KV port of the worker (its log: zmq_address)'
      : "this is an HTTP port: name the worker's KV port (its log: zmq_address; the proxy's /health lists it)";
  return {
    finding: fail(`${where} is reached, and speaks no ZeroMQ${http}`, mend),
    speaksZmq: false,
    ...known,
  };
}

function unreachable(where: string, error: NodeJS.ErrnoException, timeoutMs: number): Finding {
  switch (error.code) {
    case 'ECONNREFUSED':
      return fail(
        `${where}: the machine answers, and nothing listens on that port`,
        "start the worker, or correct the address: a KV listener binds its machine's address, not loopback, unless --kv-host says so (its log has zmq_address); the port is --kv-port plus its rank",
      );
    case 'ETIMEDOUT':
      return fail(
        `${where}: no answer within ${timeoutMs / 1_000} s`,
        'a firewall drops it, the address is wrong, or the process there has been stopped for long: open the KV port on that machine (security group, iptables)',
      );
    case 'ENOTFOUND':
    case 'EAI_AGAIN':
      return fail(`${where}: the name has no address (${error.code})`, 'use an IP address, or correct DNS');
    default:
      return fail(
        `${where}: ${reasonOf(error)}`,
        'there is no route to that machine from here: see `ip route`',
      );
  }
}

async function ask(peer: HostPort, timeoutMs: number): Promise<Finding> {
  let answer: Answer | 'refused' | 'silent';
  try {
    answer = await getNothing(peer, timeoutMs);
  } catch (cause) {
    return fail(
      `it answers a GET with what the protocol does not know: ${PdError.from(cause).message}`,
      'is this the KV port of a pd-worker or of vLLM?',
    );
  }
  if (answer === 'refused') {
    return fail(
      'it speaks ZeroMQ and takes no connection from this machine',
      "is this machine's address in its --allow-peers? Is it a KV port (a ROUTER), and no other socket of ZeroMQ?",
    );
  }
  if (answer === 'silent') {
    return fail(
      `it accepts messages and does not answer a GET within ${timeoutMs / 1_000} s`,
      'a discovery port of a proxy never answers: name the KV port; a worker that hangs is seen in its log, a vLLM listener answers only when its transfer is over',
    );
  }
  if (answer.kind === 'get' && answer.ret === 1) {
    return ok(
      answer.seq === undefined
        ? 'its KV listener answers; it is not a pd-worker (vLLM?)'
        : 'its KV listener answers; it is a pd-worker',
    );
  }
  if (answer.kind === 'no-pair') return ok('its KV listener answers; it is a pd-worker');
  return warn(`its KV listener answers a GET for nothing with ${JSON.stringify(answer)}`);
}

/** `refused`: the handshake never ends; `silent`: no answer. Both within `timeoutMs`. */
async function getNothing(peer: HostPort, timeoutMs: number): Promise<Answer | 'refused' | 'silent'> {
  const { Dealer } = await import('zeromq');
  const dealer = new Dealer({
    routingId: `pd-doctor-${process.pid}`,
    linger: 0,
    immediate: true,
    ipv6: true,
    sendTimeout: timeoutMs,
    receiveTimeout: timeoutMs,
  });
  let late: 'refused' | 'silent' = 'refused';
  dealer.events.on('handshake', () => {
    late = 'silent';
  });
  try {
    dealer.connect(zmqEndpoint(peer));
    await dealer.send(encodeMessage({ cmd: 'GET', tensor_id: PROBE_TENSOR, native: { seq: 0 } }));
    const [body] = await dealer.receive();
    return decodeAnswer(body!, DEFAULT_LIMITS);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'EAGAIN') return late;
    throw error;
  } finally {
    dealer.close();
  }
}

/** The other direction, as far as it can be tried from here: the address that the peer would be told must lead back to this machine. */
async function backwards(
  peer: HostPort,
  seenAs: string,
  announced: string | undefined,
  timeoutMs: number,
): Promise<Finding[]> {
  const told = announced ?? seenAs;
  const findings: Finding[] = [];
  if (isLoopback(told) && !isLoopback(peer.host) && !isLoopback(seenAs)) {
    return [
      fail(
        `a worker here would tell the peer ${told}, where the peer finds itself`,
        `start it with --kv-host ${seenAs}, the address by which the peer sees this machine`,
      ),
    ];
  }
  if (announced !== undefined && announced !== seenAs && !isLoopback(seenAs)) {
    findings.push(
      warn(
        `the peer sees this machine as ${seenAs}, and a worker here would tell it ${announced}`,
        `if ${announced} is not reached from there: --kv-host ${seenAs} or PD_HOST_IP=${seenAs}`,
      ),
    );
  }
  try {
    const port = await loopThrough(told, timeoutMs);
    findings.push(
      ok(`the way back: this machine takes connections at ${told} (tried on port ${port}, by itself)`),
      info(
        `whether the peer's machine reaches it, only a run there tells: pd-doctor --peer ${formatHostPort({ host: told, port: 8082 })} with the KV port of a worker that runs here`,
      ),
    );
  } catch (cause) {
    findings.push(
      warn(
        `the way back: this machine does not reach itself at ${told}: ${reasonOf(cause)}`,
        `tell others an address of this machine: --kv-host ${seenAs}`,
      ),
    );
  }
  return findings;
}

/** Listens on every address, connects to itself at `host`, and says which port that was. */
async function loopThrough(host: string, timeoutMs: number): Promise<number> {
  const server: Server = createServer((socket) => socket.destroy());
  await new Promise<void>((resolve, reject) => {
    server.once('error', reject).listen({ host: isIPv6(host) ? '::' : '0.0.0.0', port: 0 }, resolve);
  });
  try {
    const address = server.address();
    const port = typeof address === 'object' && address !== null ? address.port : 0;
    (await connectTo({ host, port }, timeoutMs)).destroy();
    return port;
  } finally {
    server.close();
  }
}

function connectTo({ host, port }: HostPort, timeoutMs: number): Promise<Socket> {
  return new Promise((resolve, reject) => {
    const socket = connect({ host, port, ...EVERY_ADDRESS });
    const timer = setTimeout(() => {
      socket.destroy();
      reject(Object.assign(new Error(`no connection within ${timeoutMs} ms`), { code: 'ETIMEDOUT' }));
    }, timeoutMs);
    socket.once('connect', () => {
      clearTimeout(timer);
      resolve(socket);
    });
    socket.on('error', (error) => {
      clearTimeout(timer);
      reject(error); // after `connect` nobody listens any more
    });
  });
}

/** What comes first after `sent`: undefined where nothing does in time, empty where the other end hangs up. */
function firstBytes(socket: Socket, sent: Uint8Array, timeoutMs: number): Promise<Buffer | undefined> {
  return new Promise((resolve) => {
    const timer = setTimeout(() => resolve(undefined), timeoutMs);
    const done = (bytes: Buffer) => {
      clearTimeout(timer);
      resolve(bytes);
    };
    socket.once('data', done).once('close', () => done(Buffer.alloc(0)));
    socket.write(sent);
  });
}

async function speaksHttp(peer: HostPort, timeoutMs: number): Promise<boolean> {
  try {
    const socket = await connectTo(peer, timeoutMs);
    const request = Buffer.from('GET /health HTTP/1.0\r\n\r\n');
    const answer = await firstBytes(socket, request, timeoutMs);
    socket.destroy();
    return answer?.subarray(0, 5).toString('latin1') === 'HTTP/';
  } catch {
    return false;
  }
}
