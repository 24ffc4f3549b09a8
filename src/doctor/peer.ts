/**
 * `--peer HOST:PORT`: is there a KV listener, and could its worker reach one here? Nothing changes at the peer: it gets a GET for a
 * tensor that nobody has. Tells apart why a pair never opens: no route, nothing listens, something else listens, its process is stopped
 * or stuck, it listens but does not answer.
 */
import { once } from 'node:events';
import { type AddressInfo, connect, createServer, isIPv6, type Socket } from 'node:net';
import { DEFAULT_LIMITS } from '../config/transfer-options.ts';
import type { WorkerConfig } from '../config/worker-config.ts';
import { withDeadline } from '../deferred.ts';
import { PdError } from '../errors.ts';
import { asDestination, formatHostPort, type HostPort } from '../net/address.ts';
import { reachable } from '../net/knock.ts';
import { EVERY_ADDRESS, reasonOf } from '../net/resolve.ts';
import { decodeAnswer, encodeMessage } from '../wire/codec.ts';
import { PROBE_TENSOR } from '../wire/ids.ts';
import type { Answer } from '../wire/messages.ts';
import { isLoopback } from './addresses.ts';
import { type Finding, fail, info, ok, type Section, warn } from './finding.ts';
import { askRouter, nativeWayFinding } from './native-way.ts';

export interface PeerQuestion {
  readonly peer: HostPort;
  /** The host that a worker here would announce; absent if no worker in particular was asked about. */
  readonly announced?: string;
  /** Of the worker that would run here. */
  readonly config?: WorkerConfig;
  readonly timeoutMs: number;
}

export async function peerSection({ peer, announced, config, timeoutMs }: PeerQuestion): Promise<Section> {
  const named = asDestination(peer);
  // A name that does not resolve is reported where it is connected to.
  const there = await reachable(named, timeoutMs).catch(() => named);
  const findings: Finding[] = [];
  const reached = await greet(there, timeoutMs);
  findings.push(reached.finding);
  if (reached.speaksZmq) {
    const answer = await ask(there, timeoutMs);
    findings.push(answer.finding);
    if (answer.ours && config) findings.push(await nativeWayFinding(there, config, timeoutMs));
  }
  if (reached.seenAs !== undefined)
    findings.push(...(await backwards(there, reached.seenAs, announced, timeoutMs)));
  return { title: `Peer ${formatHostPort(peer)}`, findings };
}

interface Greeting {
  readonly finding: Finding;
  readonly speaksZmq: boolean;
  /** Our address on this connection, where the peer's answers go. */
  readonly seenAs?: string;
}

/** The ten bytes that every ZeroMQ connection begins with. */
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
    return { finding: ok('reachable over TCP, speaks ZeroMQ'), speaksZmq: true, ...known };
  }
  const http = await speaksHttp(peer, timeoutMs);
  // The kernel accepts connections even for a process that does nothing.
  if (zmq === undefined && !http) {
    const finding = fail(
      `${where} accepts connections but sends nothing within ${timeoutMs / 1_000} s: the process behind it is stopped or stuck`,
      'on its machine, `ss -ltnp` names the process; state T in `ps` means stopped (kill -CONT resumes it); restart one that hangs',
    );
    return { finding, speaksZmq: false, ...known };
  }
  const fix = http
    ? "this is an HTTP port: give the worker's KV port (zmq_address in its log and in the proxy's /health)"
    : "give the worker's KV port (zmq_address in its log)";
  return {
    finding: fail(`${where} is reachable but speaks ${http ? 'HTTP, not ZeroMQ' : 'no ZeroMQ'}`, fix),
    speaksZmq: false,
    ...known,
  };
}

function unreachable(where: string, error: NodeJS.ErrnoException, timeoutMs: number): Finding {
  switch (error.code) {
    case 'ECONNREFUSED':
      return fail(
        `${where}: the machine answers, but nothing listens on that port`,
        "start the worker, or fix the address: a KV listener binds its machine's address, not loopback, unless --kv-host says so (zmq_address in its log); the port is --kv-port plus its rank",
      );
    case 'ETIMEDOUT':
      return fail(
        `${where}: no answer within ${timeoutMs / 1_000} s`,
        'a firewall drops it, the address is wrong, or the process there has long been stopped: open the KV port on that machine (security group, iptables)',
      );
    case 'ENOTFOUND':
    case 'EAI_AGAIN':
      return fail(`${where}: the name does not resolve (${error.code})`, 'use an IP address, or fix DNS');
    default:
      return fail(
        `${where}: ${reasonOf(error)}`,
        'there is no route to that machine from here: check `ip route`',
      );
  }
}

async function ask(
  peer: HostPort,
  timeoutMs: number,
): Promise<{ readonly finding: Finding; readonly ours?: true }> {
  let answer: Answer | 'refused' | 'silent';
  try {
    const message = encodeMessage({ cmd: 'GET', tensor_id: PROBE_TENSOR });
    const body = await askRouter(peer, '', message, timeoutMs);
    answer = typeof body === 'string' ? body : decodeAnswer(body, DEFAULT_LIMITS);
  } catch (cause) {
    const what = `its answer to a GET is not of the protocol: ${PdError.from(cause).message}`;
    return { finding: fail(what, 'is this the KV port of a pd-worker or of vLLM?') };
  }
  if (answer === 'refused') {
    const fix =
      "is this machine's address in its --allow-peers? Is it a KV port (a ROUTER) and not some other ZeroMQ socket?";
    return { finding: fail('it speaks ZeroMQ but refuses connections from this machine', fix) };
  }
  if (answer === 'silent') {
    const fix =
      "a proxy's discovery port never answers: give the KV port; the log shows whether a worker hangs; a vLLM listener answers only once its transfer is done";
    return {
      finding: fail(`it accepts messages but does not answer a GET within ${timeoutMs / 1_000} s`, fix),
    };
  }
  if (answer.kind === 'get' && answer.ret === 1) {
    if (!answer.gone)
      return { finding: ok('its KV listener answers; it is not a pd-worker (vLLM?), or an older one') };
  } else if (answer.kind !== 'no-pair') {
    const what = `its KV listener answers a GET for an unknown tensor with ${JSON.stringify(answer)}`;
    return { finding: warn(what) };
  }
  return { finding: ok('its KV listener answers; it is a pd-worker'), ours: true };
}

/** The other direction, as far as it can be tested from here: the address announced to the peer must lead back to this machine. */
async function backwards(
  peer: HostPort,
  seenAs: string,
  announced: string | undefined,
  timeoutMs: number,
): Promise<Finding[]> {
  const host = announced ?? seenAs;
  const findings: Finding[] = [];
  if (isLoopback(host) && !isLoopback(peer.host) && !isLoopback(seenAs)) {
    return [
      fail(
        `a worker here would announce ${host}, which on the peer's machine is the peer itself`,
        `start it with --kv-host ${seenAs}, the address that the peer sees this machine as`,
      ),
    ];
  }
  if (announced !== undefined && announced !== seenAs && !isLoopback(seenAs)) {
    findings.push(
      warn(
        `the peer sees this machine as ${seenAs}, but a worker here would announce ${announced}`,
        `if ${announced} is unreachable from there: --kv-host ${seenAs} or PD_HOST_IP=${seenAs}`,
      ),
    );
  }
  try {
    const port = await loopThrough(host, timeoutMs);
    findings.push(
      ok(`the way back: this machine accepts connections at ${host} (it tested itself, on port ${port})`),
      info(
        `only a run there shows whether the peer's machine can reach it: pd-doctor --peer ${formatHostPort({ host, port: 8082 })}, with the KV port of a worker running here`,
      ),
    );
  } catch (cause) {
    findings.push(
      warn(
        `the way back: this machine cannot reach itself at ${host}: ${reasonOf(cause)}`,
        `announce an address of this machine: --kv-host ${seenAs}`,
      ),
    );
  }
  return findings;
}

/** Listens on every address, connects to itself at `host`, and returns the port that it used. */
async function loopThrough(host: string, timeoutMs: number): Promise<number> {
  const server = createServer((socket) => socket.destroy());
  await once(server.listen({ host: isIPv6(host) ? '::' : '0.0.0.0', port: 0 }), 'listening');
  try {
    const { port } = server.address() as AddressInfo;
    (await connectTo({ host, port }, timeoutMs)).destroy();
    return port;
  } finally {
    server.close();
  }
}

async function connectTo({ host, port }: HostPort, timeoutMs: number): Promise<Socket> {
  const socket = connect({ host, port, ...EVERY_ADDRESS });
  socket.on('error', () => {}); // `once` throws those before `connect`; later ones close the socket, which is enough
  if (await withDeadline(once(socket, 'connect'), timeoutMs)) return socket;
  socket.destroy();
  throw Object.assign(new Error(`no connection within ${timeoutMs} ms`), { code: 'ETIMEDOUT' });
}

/** The first bytes after `sent`: undefined if none come in time, empty if the other end hangs up. */
function firstBytes(socket: Socket, sent: Uint8Array, timeoutMs: number): Promise<Buffer | undefined> {
  const first = new Promise<Buffer>((resolve) => {
    socket.once('data', resolve).once('close', () => resolve(Buffer.alloc(0)));
  });
  socket.write(sent);
  return withDeadline(first, timeoutMs);
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
