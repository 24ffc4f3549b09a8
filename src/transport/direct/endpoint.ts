/**
 * Where workers of one host meet to write into each other's caches: a Unix socket each, over which descriptors go.
 *
 *   PATH         connects, passes one frame with descriptors each way, and then stays open: its end is the one sure news that the other
 *                process is dead, so nobody closes it while it lives and may write. After the frames it carries one line each way,
 *                whether the other's cache could be mapped.
 *   PATH.bell    tells an event loop when to look at PATH, since Node reads no descriptors and offers no readiness of foreign sockets:
 *                whoever connects rings once its frame lies there, and the other end rings back once its answer does.
 *
 * A frame is its length (4 bytes, little-endian) and JSON: `{version, nonce, to, offer}` or `{version, refused}`. With an offer come two
 * descriptors: the cache's memory and the page. Both ends check user (SO_PEERCRED) and nonces (each other's hello) before they map anything.
 *
 * The integrator: both hellos carry boot id and PATH. Whoever has a WANT to fill connects (`connect`) after the other's hello; the one that
 * wants admits it (`admit`) with the offer. Each end maps what it was offered (mapping.ts) and says `tell`; a pair is open when `verdict`
 * of the other end says so as well. At shutdown: stop launching, drain, answer every WANT, and only then `close`.
 */
import { randomBytes } from 'node:crypto';
import { closeSync, lstatSync, mkdirSync, readdirSync, readFileSync, rmSync, unlinkSync } from 'node:fs';
import { connect as connectNet, createServer, type Server, Socket } from 'node:net';
import { tmpdir, userInfo } from 'node:os';
import { join } from 'node:path';
import type { FileDescriptor } from '../../../ffi/pointers.ts';
import {
  acceptUnix,
  connectUnix,
  listenUnix,
  MAX_MESSAGE,
  MAX_SOCKET_PATH,
  peerCredentials,
  receiveDescriptors,
  sendDescriptors,
} from '../../../ffi/unix.ts';
import { PdError } from '../../errors.ts';
import { type CacheClaims, readClaims } from './claims.ts';

const VERSION = 1;
const HEADER = 4;
const BELL = '.bell';
/** A verdict. */
const MAX_LINE = 4_096;
const CONNECT_TIMEOUT_MS = 5_000;
/** For the other end to map what it was offered: milliseconds, but a process that is stopped never says. */
const VERDICT_TIMEOUT_MS = 30_000;

/** A cache that the other end may write into, and the page of its WANTs. The descriptors are copied: they stay the offerer's. */
export interface Offer {
  readonly claims: CacheClaims;
  readonly cache: FileDescriptor;
  readonly page: FileDescriptor;
}

/** What an end thinks of the other one's offer. */
export type Verdict = { readonly mapped: true } | { readonly mapped: false; readonly why: string };

export interface EndpointOptions {
  /** Folder of sockets; a volume where containers share one. `socketFolder()` where nothing is said. */
  readonly folder?: string;
  /** This process's, as in its hello. */
  readonly nonce: string;
  /** Whether a process with this nonce may connect, and what it is offered; undefined refuses it. */
  readonly admit: (nonce: string) => { readonly offer: Offer | undefined } | undefined;
  readonly verdictTimeoutMs?: number;
  /** A process that was admitted. */
  readonly onLink: (link: DirectLink) => void;
  /** Why one was not: for the log. */
  readonly onRefused?: (error: PdError) => void;
  /** The user that peers must be; this process's own. */
  readonly uid?: number;
}

export interface ConnectOptions {
  /** From the peer's hello. */
  readonly path: string;
  readonly nonce: string;
  readonly offer?: Offer;
  readonly timeoutMs?: number;
}

/** Two processes of one host whose boot ids are equal may try `direct`. */
export function bootId(): string {
  return readFileSync('/proc/sys/kernel/random/boot_id', 'utf8').trim();
}

/**
 * The folder of this user's sockets, which is made where it is missing. Throws DIRECT_REFUSED where it is another user's, or others may look
 * into it: somebody could stand there in a worker's place.
 */
export function socketFolder(
  folder = join(process.env['XDG_RUNTIME_DIR'] || tmpdir(), `pd-worker-${userInfo().uid}`),
): string {
  try {
    mkdirSync(folder, { mode: 0o700 });
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'EEXIST')
      throw folderRefused(folder, (error as Error).message);
  }
  const found = lstatSync(folder);
  if (!found.isDirectory()) throw folderRefused(folder, 'it is no folder');
  if (found.uid !== userInfo().uid) throw folderRefused(folder, `it belongs to user ${found.uid}`);
  if ((found.mode & 0o077) !== 0)
    throw folderRefused(folder, `its mode is ${(found.mode & 0o777).toString(8)}, not 700`);
  return folder;
}

function folderRefused(folder: string, why: string): PdError {
  return new PdError('DIRECT_REFUSED', `no socket for direct writes in ${folder}: ${why}`, { folder });
}

export class DirectEndpoint {
  /** To be told in hello. */
  readonly path: string;
  readonly #options: EndpointOptions;
  readonly #uid: number;
  readonly #listener: FileDescriptor;
  readonly #bell: Server;
  readonly #ringing = new Set<Socket>();
  readonly #links = new Set<DirectLink>();
  #disposed = false;

  private constructor(path: string, listener: FileDescriptor, options: EndpointOptions) {
    this.path = path;
    this.#listener = listener;
    this.#options = options;
    this.#uid = options.uid ?? userInfo().uid;
    this.#bell = createServer((socket) => this.#rung(socket));
  }

  /** Listens under a fresh name. Throws DIRECT_REFUSED or SYSTEM_CALL_FAILED. */
  static async listen(options: EndpointOptions): Promise<DirectEndpoint> {
    const folder = socketFolder(options.folder);
    removeStale(folder);
    const path = join(folder, randomBytes(8).toString('hex'));
    if (Buffer.byteLength(path + BELL) > MAX_SOCKET_PATH)
      throw folderRefused(folder, `a socket's path may have ${MAX_SOCKET_PATH} bytes`);
    const endpoint = new DirectEndpoint(path, listenUnix(path), options);
    try {
      await new Promise<void>((resolve, reject) => {
        endpoint.#bell.once('error', reject).listen(path + BELL, resolve);
      });
    } catch (error) {
      await endpoint.dispose();
      throw folderRefused(folder, (error as Error).message);
    }
    endpoint.#bell.on('error', () => {});
    return endpoint;
  }

  /** Throws DIRECT_REFUSED with the reason, of this end or the other one's; MESSAGE_INVALID for an answer that is none. */
  async connect(options: ConnectOptions): Promise<DirectLink> {
    const { path, nonce, offer, timeoutMs = CONNECT_TIMEOUT_MS } = options;
    if (this.#disposed)
      throw new PdError('ENGINE_CLOSED', 'the endpoint for direct writes has been disposed');
    let fd: FileDescriptor | undefined;
    try {
      fd = connectUnix(path);
      if (fd === undefined) throw new PdError('DIRECT_REFUSED', `too many connections wait at ${path}`);
      this.#checkUser(fd);
      this.#introduce(fd, nonce, offer);
      await ring(path + BELL, timeoutMs);
      if (this.#disposed)
        throw new PdError('ENGINE_CLOSED', 'the endpoint for direct writes was disposed meanwhile');
      return this.#linked(fd, receiveFrame(fd), nonce);
    } catch (error) {
      if (fd !== undefined) closeSync(fd);
      const failed = PdError.from(error, 'DIRECT_REFUSED');
      if (failed.code !== 'SYSTEM_CALL_FAILED') throw failed;
      throw new PdError('DIRECT_REFUSED', failed.message, { path }, { cause: failed });
    }
  }

  /** Stops listening and closes every link: after the last write has ended and every WANT is answered. Idempotent. */
  async dispose(): Promise<void> {
    if (this.#disposed) return;
    this.#disposed = true;
    rmSync(this.path, { force: true });
    closeSync(this.#listener);
    for (const socket of this.#ringing) socket.destroy();
    for (const link of this.#links) link.close();
    await new Promise<void>((resolve) => this.#bell.close(() => resolve()));
  }

  /** Whoever rings has connected and sent its frame before: all there is can be read without waiting. */
  #rung(socket: Socket): void {
    this.#ringing.add(socket);
    socket.on('error', () => {}).once('close', () => this.#ringing.delete(socket));
    socket.setTimeout(CONNECT_TIMEOUT_MS, () => socket.destroy());
    for (let fd = acceptUnix(this.#listener); fd !== undefined; fd = acceptUnix(this.#listener))
      this.#admit(fd);
    for (const each of this.#ringing) each.end('!');
  }

  #admit(fd: FileDescriptor): void {
    let link: DirectLink;
    try {
      this.#checkUser(fd);
      const frame = receiveFrame(fd);
      if (!frame) {
        // only looked whether somebody lives here
        closeSync(fd);
        return;
      }
      const admitted = frame.to === this.#options.nonce ? this.#options.admit(frame.nonce) : undefined;
      if (!admitted) {
        closeAll(frame);
        const why =
          frame.to === this.#options.nonce
            ? 'no hello of that process is known here'
            : 'this is another process than its hello said';
        throw new PdError('DIRECT_REFUSED', why, { nonce: frame.nonce });
      }
      this.#introduce(fd, frame.nonce, admitted.offer);
      link = this.#linked(fd, frame, frame.nonce);
    } catch (error) {
      const failed = PdError.from(error, 'DIRECT_REFUSED');
      try {
        sendFrame(fd, { version: VERSION, refused: failed.message });
      } catch {
        // gone already
      }
      closeSync(fd);
      this.#options.onRefused?.(failed);
      return;
    }
    this.#options.onLink(link);
  }

  #introduce(fd: FileDescriptor, to: string, offer: Offer | undefined): void {
    const { nonce } = this.#options;
    sendFrame(fd, { version: VERSION, nonce, to, offer: offer?.claims ?? null }, offer);
  }

  #linked(fd: FileDescriptor, frame: Frame | undefined, nonce: string): DirectLink {
    if (!frame) throw new PdError('DIRECT_REFUSED', 'the peer ended without an answer');
    if (frame.nonce !== nonce || frame.to !== this.#options.nonce) {
      closeAll(frame);
      throw new PdError('DIRECT_REFUSED', 'another process answers at that path than its hello said', {
        nonce: frame.nonce,
      });
    }
    const { verdictTimeoutMs = VERDICT_TIMEOUT_MS } = this.#options;
    const link = new DirectLink(fd, nonce, frame.offer, verdictTimeoutMs, (closed) =>
      this.#links.delete(closed),
    );
    this.#links.add(link);
    return link;
  }

  #checkUser(fd: FileDescriptor): void {
    const { uid, pid } = peerCredentials(fd);
    if (uid !== this.#uid)
      throw new PdError('DIRECT_REFUSED', `process ${pid} belongs to user ${uid}, not ${this.#uid}`, {
        pid,
        uid,
      });
  }
}

/** A connection to another process that is alive as long as this is. */
export class DirectLink {
  /** The peer's nonce. */
  readonly peer: string;
  /** What may be written into. Its descriptors are this process's now: whoever maps them closes them. */
  readonly offer: Offer | undefined;
  /** Resolves when the other process is dead, or has closed its end after its last write. Never rejects. */
  readonly ended: Promise<void>;
  /** What the other end thinks of our offer; `mapped: false` where it ends before it says so, or does not say so in time. Never rejects. */
  readonly verdict: Promise<Verdict>;
  readonly #socket: Socket;

  constructor(
    fd: FileDescriptor,
    peer: string,
    offer: Offer | undefined,
    verdictTimeoutMs: number,
    onEnd: (link: DirectLink) => void,
  ) {
    this.peer = peer;
    this.offer = offer;
    const socket = new Socket({ fd, readable: true, writable: true });
    this.#socket = socket;
    socket.on('error', () => {});
    this.ended = new Promise((resolve) => {
      socket.once('close', () => {
        onEnd(this);
        resolve();
      });
    });
    this.verdict = new Promise<Verdict>((resolve) => {
      const why = `the other end did not say within ${verdictTimeoutMs / 1_000} s whether it could map the cache`;
      const late = setTimeout(() => resolve({ mapped: false, why }), verdictTimeoutMs).unref();
      void this.ended.then(() => clearTimeout(late));
      let text = '';
      socket.setEncoding('utf8').on('data', (part: string) => {
        text += part;
        const end = text.indexOf('\n');
        if (end >= 0) resolve(readVerdict(text.slice(0, end)));
        else if (text.length > MAX_LINE) socket.destroy();
      });
      void this.ended.then(() => resolve({ mapped: false, why: 'the connection ended' }));
    });
  }

  /** What became of the other end's offer. Once. */
  tell(verdict: Verdict): void {
    const why = verdict.mapped ? undefined : verdict.why.slice(0, MAX_LINE / 4);
    this.#socket.write(`${JSON.stringify({ mapped: verdict.mapped, why })}\n`);
  }

  /** Says to the other end that nothing of this process will write any more: only when that is so. Idempotent. */
  close(): void {
    this.#socket.destroy();
  }
}

function readVerdict(line: string): Verdict {
  try {
    const value: unknown = JSON.parse(line);
    if (typeof value === 'object' && value !== null && 'mapped' in value) {
      if (value.mapped === true) return { mapped: true };
      if ('why' in value && typeof value.why === 'string') return { mapped: false, why: value.why };
    }
  } catch {
    // as below
  }
  return { mapped: false, why: 'the other end said what cannot be read' };
}

interface Frame {
  readonly nonce: string;
  readonly to: string;
  readonly offer: Offer | undefined;
}

function sendFrame(fd: FileDescriptor, value: unknown, offer?: Offer): void {
  const body = Buffer.from(JSON.stringify(value));
  const frame = Buffer.alloc(HEADER + body.length);
  frame.writeUInt32LE(body.length);
  body.copy(frame, HEADER);
  if (frame.length > MAX_MESSAGE) throw new PdError('LIMIT_EXCEEDED', `a frame of ${frame.length} bytes`);
  sendDescriptors(fd, frame, offer ? [offer.cache, offer.page] : []);
}

/** A frame that lies there already. Reads no byte beyond it. Undefined: the end without a byte. Throws DIRECT_REFUSED with the other end's reason, or MESSAGE_INVALID. */
function receiveFrame(fd: FileDescriptor): Frame | undefined {
  const descriptors: FileDescriptor[] = [];
  try {
    const read = (bytes: number): Buffer => {
      const received = receiveDescriptors(fd, bytes);
      descriptors.push(...(received?.descriptors ?? []));
      if (received?.bytes.length !== bytes) throw new PdError('MESSAGE_INVALID', 'a frame that is cut short');
      return Buffer.from(received.bytes);
    };
    const header = receiveDescriptors(fd, HEADER);
    if (header?.bytes.length === 0) return undefined;
    descriptors.push(...(header?.descriptors ?? []));
    if (header?.bytes.length !== HEADER) throw new PdError('MESSAGE_INVALID', 'a frame that is cut short');
    const length = Buffer.from(header.bytes).readUInt32LE();
    if (length > MAX_MESSAGE - HEADER) throw new PdError('MESSAGE_INVALID', `a frame of ${length} bytes`);
    return readFrame(JSON.parse(read(length).toString()), descriptors);
  } catch (error) {
    for (const descriptor of descriptors) closeSync(descriptor);
    throw PdError.from(error, 'MESSAGE_INVALID');
  }
}

function readFrame(value: unknown, descriptors: readonly FileDescriptor[]): Frame {
  if (typeof value !== 'object' || value === null)
    throw new PdError('MESSAGE_INVALID', 'a frame is no object');
  const { version, nonce, to, offer, refused } = value as Readonly<Record<string, unknown>>;
  if (version !== VERSION)
    throw new PdError(
      'DIRECT_REFUSED',
      `the peer speaks version ${String(version)} of this socket, this end ${VERSION}`,
    );
  if (typeof refused === 'string')
    throw new PdError('DIRECT_REFUSED', `the peer refused: ${refused.slice(0, MAX_LINE)}`);
  if (typeof nonce !== 'string' || typeof to !== 'string')
    throw new PdError('MESSAGE_INVALID', 'a frame without nonces');
  const wanted = offer === null || offer === undefined ? 0 : 2;
  if (descriptors.length !== wanted)
    throw new PdError(
      'MESSAGE_INVALID',
      `${descriptors.length} descriptors came, ${wanted} belong to the frame`,
    );
  if (wanted === 0) return { nonce, to, offer: undefined };
  return { nonce, to, offer: { claims: readClaims(offer), cache: descriptors[0]!, page: descriptors[1]! } };
}

function closeAll({ offer }: Frame): void {
  if (!offer) return;
  closeSync(offer.cache);
  closeSync(offer.page);
}

/** Resolves when the other end has rung back. */
function ring(path: string, timeoutMs: number): Promise<void> {
  return new Promise((resolve, reject) => {
    const socket = connectNet(path);
    const refused = (why: string) => reject(new PdError('DIRECT_REFUSED', `${path}: ${why}`, { path }));
    socket.setTimeout(timeoutMs, () => {
      refused(`no answer within ${timeoutMs} ms`);
      socket.destroy();
    });
    socket.once('error', (error) => refused(error.message));
    socket.once('data', () => {
      resolve();
      socket.destroy();
    });
    socket.once('end', () => refused('closed without an answer'));
  });
}

/** Names of workers that were killed: nobody listens there. */
function removeStale(folder: string): void {
  for (const name of readdirSync(folder)) {
    if (!/^[0-9a-f]{16}$/.test(name)) continue;
    const path = join(folder, name);
    try {
      const fd = connectUnix(path);
      if (fd !== undefined) closeSync(fd);
    } catch (error) {
      if (PdError.from(error).context['errno'] !== 'ECONNREFUSED') continue;
      for (const each of [path, path + BELL]) {
        try {
          unlinkSync(each);
        } catch {
          // another start was quicker
        }
      }
    }
  }
}
