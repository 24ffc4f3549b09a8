/**
 * How KV would travel between a worker that is started here and a pd-worker there: the other one is asked who it is (HELLO with `probe`, of
 * which nothing comes), and what both offer decides, as it does between workers. Where `direct` may be, its socket is tried too.
 */
import { randomBytes } from 'node:crypto';
import { closeSync, readFileSync } from 'node:fs';
import { userInfo } from 'node:os';
import type { WorkerConfig } from '../config/worker-config.ts';
import { PdError } from '../errors.ts';
import { type HostPort, zmqEndpoint } from '../net/address.ts';
import { decodeAnswered, encodeNative } from '../transfer/native/codec.ts';
import { directFallback, pairWay, type Ways } from '../transfer/native/hello.ts';
import { type HelloMessage, type Nonce, PROBE_ONLY } from '../transfer/native/messages.ts';
import { NATIVE_FEATURE } from '../wire/overlap.ts';
import { type Finding, fail, info, ok, warn } from './finding.ts';

/** A hello names no block, and its answer neither. */
const LIMITS = { maxBlocks: 1 };

/** `config`: of the worker that would run here. */
export async function nativeWayFinding(
  peer: HostPort,
  config: WorkerConfig,
  timeoutMs: number,
): Promise<Finding> {
  let theirs: HelloMessage;
  try {
    theirs = await helloOf(peer, timeoutMs);
  } catch (error) {
    const why = PdError.from(error).message;
    return info(`it does not say how KV would travel natively (${why}): an older worker, or the frozen wire`);
  }
  return await wayFinding(waysHere(config), theirs, knock);
}

/** `knock`: why no process of this user can be reached at that path, or undefined where one is. */
export async function wayFinding(
  mine: Ways | undefined,
  theirs: Ways,
  knock: (path: string) => Promise<string | undefined>,
): Promise<Finding> {
  if (theirs.transports.length === 0)
    return warn(
      'it speaks the frozen wire alone',
      'for the native hand-over: --wire auto or native on both ends',
    );
  if (!mine) return info('a worker here would speak the frozen wire alone (--wire, --kv-key)');
  const fallback =
    directFallback(mine, theirs) ??
    (theirs.direct && refused(theirs.direct.path, await knock(theirs.direct.path)));
  if (!fallback)
    return ok('KV would travel natively, by direct: both are on this host, and its socket answers');
  const way = pairWay(mine, theirs);
  const offered = theirs.transports.join(', ');
  if (way === 'host') return ok('KV would travel natively, by host');
  if (way) return info(`KV would travel natively, by ${way}, not direct: ${fallback.why}`);
  return fail(
    `no way for KV is open at both ends: it offers ${offered}, a worker here ${mine.transports.join(', ')}; not direct: ${fallback.why}`,
    'give both the same --device kind and --transport auto',
  );
}

function refused(path: string, why: string | undefined) {
  return why === undefined ? undefined : { reason: 'refused' as const, why: `its socket ${path}: ${why}` };
}

/** As the hello of such a worker has it; undefined for one that says none. */
function waysHere({ wire, transport, transfer }: WorkerConfig): Ways | undefined {
  if (wire === 'frozen' || transfer.kvKey !== 'transfer') return undefined;
  if (transfer.device === 'host') return { transports: ['host'] };
  const pairs = transport === 'direct' ? [] : (['nccl'] as const);
  if (transport === 'nccl') return { transports: pairs };
  return { transports: ['direct', ...pairs], direct: { bootId: bootId(), path: '' } };
}

function bootId(): string {
  return readFileSync('/proc/sys/kernel/random/boot_id', 'utf8').trim();
}

async function knock(path: string): Promise<string | undefined> {
  try {
    // koffi may not load here
    const { connectUnix, peerCredentials } = await import('../../ffi/unix.ts');
    const fd = connectUnix(path);
    if (fd === undefined) return 'too many connections wait there';
    const { uid } = peerCredentials(fd);
    closeSync(fd);
    return uid === userInfo().uid ? undefined : `it belongs to user ${uid}`;
  } catch (error) {
    return PdError.from(error).message;
  }
}

/** Throws where nothing of the native wire answers in time. */
async function helloOf(peer: HostPort, timeoutMs: number): Promise<HelloMessage> {
  const body = await askRouter(peer, '#native', encodeNative(question(), LIMITS), timeoutMs);
  if (typeof body === 'string')
    throw new PdError('PEER_ANSWER_TIMEOUT', `no answer within ${timeoutMs / 1_000} s`);
  const answer = decodeAnswered(body, LIMITS);
  if (answer.cmd === 'HELLO') return answer;
  throw new PdError('MESSAGE_INVALID', `it answers HELLO with ${answer.cmd}`);
}

/** The answer to one message, within `timeoutMs`: `refused` if the handshake is not completed, `silent` if there is none. `wire`: the end of our id. */
export async function askRouter(
  peer: HostPort,
  wire: '' | '#native',
  message: Uint8Array,
  timeoutMs: number,
): Promise<Buffer | 'refused' | 'silent'> {
  const { Dealer } = await import('zeromq');
  const dealer = new Dealer({
    routingId: `pd-doctor-${process.pid}${wire}`,
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
    await dealer.send(message);
    const [body] = await dealer.receive();
    return body!;
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'EAGAIN') return late;
    throw error;
  } finally {
    dealer.close();
  }
}

/** No worker has such a cache: what it refuses does not matter, its ways do. */
function question(): HelloMessage {
  return {
    cmd: 'HELLO',
    from: randomBytes(16).toString('hex') as Nonce,
    hello: { version: 1, features: [NATIVE_FEATURE], sendType: 'PUT_ASYNC' },
    cache: { blocks: 1, blockSize: 1, layers: 1, blockBytes: 1, family: 'mla' },
    transports: ['host'],
    probe: PROBE_ONLY,
  };
}
