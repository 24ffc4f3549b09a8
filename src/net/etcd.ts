/**
 * etcd, over the JSON gateway that it has since 3.4 (`/v3/...`): leases, keys under a prefix, and news of them. Bytes travel in base64, 64-bit
 * numbers as text. What it answers is bounded in size and time, since whoever holds that port could answer.
 */
import { once } from 'node:events';
import { type ClientRequest, type IncomingMessage, request } from 'node:http';
import { request as requestSecurely } from 'node:https';
import { within } from '../deferred.ts';
import { PdError } from '../errors.ts';
import { z } from '../zod.ts';
import { formatHostPort, type HostPort, parseHostPort } from './address.ts';
import { EVERY_ADDRESS, reasonOf } from './resolve.ts';

/** Where instances are registered. */
export interface EtcdAddress {
  readonly endpoints: readonly HostPort[];
  readonly secure: boolean;
  /** Before every key; ends with `/`. */
  readonly prefix: string;
  /** Whom it asks for a name and a password. */
  readonly user?: { readonly name: string; readonly password: string };
}

const DEFAULT_PREFIX = 'pd-worker/';

/** A password in an address is nobody's business, however the address is malformed. */
export function withoutPassword(text: string): string {
  return text.replace(/(:\/\/).*@/s, '$1***@');
}

/** `etcd://user:password@host:2379,host:2379/prefix`, or `etcds://` for TLS. Throws CONFIG_INVALID. */
export function parseEtcdAddress(text: string): EtcdAddress {
  const [, secure, name, password, hosts = '', prefix = ''] =
    /^etcd(s?):\/\/(?:([^:@/]+):([^:@/]+)@)?([^/@]+)(?:\/([^@]*))?$/.exec(text) ?? [];
  if (hosts === '')
    throw new PdError(
      'CONFIG_INVALID',
      `${JSON.stringify(withoutPassword(text))} is not etcd://HOST:2379, with further hosts after commas, a prefix after / and USER:PASSWORD@ before`,
    );
  const endpoints = hosts.split(',').map((host) => parseHostPort(host, 'address of etcd'));
  return {
    endpoints,
    secure: secure === 's',
    prefix: prefix === '' ? DEFAULT_PREFIX : `${prefix.replace(/\/+$/, '')}/`,
    ...(name !== undefined &&
      password !== undefined && { user: { name: plain(name), password: plain(password) } }),
  };
}

/** What stands percent-encoded in a URL. */
function plain(text: string): string {
  try {
    return decodeURIComponent(text);
  } catch (cause) {
    const why =
      'user and password of etcd: characters other than letters and digits are to be written as in a URL, % as %25';
    throw new PdError('CONFIG_INVALID', why, {}, { cause });
  }
}

export type EtcdChange =
  | { readonly kind: 'put'; readonly key: string; readonly value: Buffer }
  | { readonly kind: 'delete'; readonly key: string };

export interface EtcdListing {
  /** Changes after it are those that a watch from `revision + 1` tells. */
  readonly revision: bigint;
  readonly entries: ReadonlyMap<string, Buffer>;
}

const CALL_MS = 5_000;
/** Of a whole answer, and of one line of news. */
const MOST_BYTES = 16 * 2 ** 20;
const MOST_KEYS = 4_096;
/** Of an answer that says why not. */
const MOST_REASON_BYTES = 65_536;

const number64 = z.string().regex(/^-?\d{1,19}$/);
const bytes = z.base64().default('');
const header = z.object({ revision: number64.default('0') }).default({ revision: '0' });
const kv = z.object({ key: bytes, value: bytes });
const TOKEN = z.object({
  token: z
    .string()
    .min(1)
    .max(16_384)
    .regex(/^[\x21-\x7e]+$/),
});
const REFUSED = z.object({ error: z.string() });
const GRANTED = z.object({ ID: number64 });
const ALIVE = z.object({ result: z.object({ TTL: number64.default('0') }) });
const LISTED = z.object({ header, kvs: z.array(kv).default([]) });
const NEWS = z.object({
  result: z.object({
    canceled: z.boolean().default(false),
    compact_revision: number64.default('0'),
    cancel_reason: z.string().default(''),
    events: z.array(z.object({ type: z.string().default('PUT'), kv })).default([]),
  }),
});

export class Etcd {
  readonly #address: EtcdAddress;
  /** The endpoint that answered last. */
  #at = 0;
  /** Of the user; empty where etcd asks nobody. Absent: to be asked for. */
  #token: string | undefined;

  constructor(address: EtcdAddress) {
    this.#address = address;
  }

  /** For messages. */
  toString(): string {
    return `etcd at ${this.#address.endpoints.map(formatHostPort).join(', ')}`;
  }

  /** A lease that ends after so many seconds without `keepAlive`. All calls throw REGISTRY_FAILED, or the signal's reason. */
  async grant(seconds: number, signal: AbortSignal): Promise<string> {
    return (await this.#call('lease/grant', { TTL: seconds }, GRANTED, signal)).ID;
  }

  /** False where the lease has ended. */
  async keepAlive(lease: string, signal: AbortSignal): Promise<boolean> {
    return Number((await this.#call('lease/keepalive', { ID: lease }, ALIVE, signal)).result.TTL) > 0;
  }

  async revoke(lease: string, signal: AbortSignal): Promise<void> {
    await this.#call('lease/revoke', { ID: lease }, z.unknown(), signal);
  }

  async put(key: string, value: Uint8Array, lease: string, signal: AbortSignal): Promise<void> {
    const body = { key: this.#key(key), value: Buffer.from(value).toString('base64'), lease };
    await this.#call('kv/put', body, z.unknown(), signal);
  }

  async list(signal: AbortSignal): Promise<EtcdListing> {
    const body = { ...this.#range(), limit: MOST_KEYS };
    const { header: at, kvs } = await this.#call('kv/range', body, LISTED, signal);
    const entries = kvs.map(({ key, value }) => [this.#name(key), Buffer.from(value, 'base64')] as const);
    return { revision: BigInt(at.revision), entries: new Map(entries) };
  }

  /**
   * What changes from that revision on, as it happens; nothing for as long as nothing does. Ends where etcd ends it: because it has forgotten
   * those revisions (compaction), which is then to be listed again.
   */
  async *watch(from: bigint, signal: AbortSignal): AsyncGenerator<readonly EtcdChange[]> {
    const asked = { create_request: { ...this.#range(), start_revision: String(from) } };
    const response = await this.#send('watch', asked, signal);
    /** Of a line that has not ended. */
    let parts: string[] = [];
    let length = 0;
    try {
      response.setEncoding('utf8');
      for await (const chunk of response) {
        const lines = (chunk as string).split('\n');
        length += lines[0]!.length;
        if (length > MOST_BYTES) throw this.#failure('watch', `a line of more than ${MOST_BYTES} bytes`);
        parts.push(lines[0]!);
        if (lines.length === 1) continue;
        lines[0] = parts.join('');
        parts = [lines.pop()!];
        length = parts[0]!.length;
        for (const line of lines.filter((one) => one.trim() !== '')) {
          const { events, canceled } = this.#read('watch', line, NEWS).result;
          if (canceled) return;
          const changes = events.map(({ type, kv: { key, value } }): EtcdChange => {
            const name = this.#name(key);
            return type === 'DELETE'
              ? { kind: 'delete', key: name }
              : { kind: 'put', key: name, value: Buffer.from(value, 'base64') };
          });
          if (changes.length > 0) yield changes;
        }
      }
    } catch (error) {
      if (signal.aborted) throw signal.reason;
      throw error instanceof PdError ? error : this.#failure('watch', reasonOf(error), error);
    } finally {
      response.destroy();
    }
  }

  #key(name: string): string {
    return Buffer.from(this.#address.prefix + name).toString('base64');
  }

  #name(key: string): string {
    return Buffer.from(key, 'base64').toString().slice(this.#address.prefix.length);
  }

  /** Every key under the prefix: up to what comes after it. */
  #range(): { readonly key: string; readonly range_end: string } {
    const end = Buffer.from(this.#address.prefix);
    end[end.length - 1]!++;
    return { key: this.#key(''), range_end: end.toString('base64') };
  }

  async #call<T>(path: string, body: object, schema: z.ZodType<T>, signal: AbortSignal): Promise<T> {
    const bound = within(CALL_MS, signal);
    try {
      const response = await this.#send(path, body, bound);
      return this.#read(path, await this.#whole(path, response, MOST_BYTES), schema);
    } catch (error) {
      if (signal.aborted) throw signal.reason;
      if (bound.aborted) throw this.#failure(path, `no answer within ${CALL_MS} ms`);
      throw error instanceof PdError ? error : this.#failure(path, reasonOf(error), error);
    }
  }

  /** Asks each endpoint in turn, beginning with the last that answered. Resolves with an answer of status 200. */
  async #send(path: string, body: object, signal: AbortSignal): Promise<IncomingMessage> {
    const { endpoints } = this.#address;
    const why: string[] = [];
    for (let i = 0; i < endpoints.length; i++) {
      const at = (this.#at + i) % endpoints.length;
      // Of several, one that hangs must not use up the time of all.
      const mine =
        endpoints.length > 1 && i < endpoints.length - 1
          ? AbortSignal.timeout(Math.floor(CALL_MS / endpoints.length))
          : signal;
      try {
        const response = await this.#sendAs(endpoints[at]!, path, body, signal, mine);
        this.#at = at;
        return response;
      } catch (error) {
        if (signal.aborted) throw error;
        why.push(`${formatHostPort(endpoints[at]!)}: ${reasonOf(error)}`);
      }
    }
    throw this.#failure(path, why.join('; '));
  }

  /** As the user, if there is one: with a token, of which etcd forgets those that are old, and all when it is restarted. */
  async #sendAs(
    endpoint: HostPort,
    path: string,
    body: object,
    signal: AbortSignal,
    mine: AbortSignal,
  ): Promise<IncomingMessage> {
    for (let first = true; ; first = false) {
      if (this.#address.user)
        this.#token ??= await this.#authenticate(endpoint, this.#address.user, signal, mine);
      const response = await this.#post(endpoint, path, body, signal, mine);
      if (response.statusCode === 200) return response;
      const reason = await this.#refusal(path, response);
      if (!first || !this.#address.user || !isStale(response.statusCode, reason)) throw new Error(reason);
      this.#token = undefined;
    }
  }

  async #authenticate(
    endpoint: HostPort,
    user: NonNullable<EtcdAddress['user']>,
    signal: AbortSignal,
    mine: AbortSignal,
  ): Promise<string> {
    const path = 'auth/authenticate';
    const response = await this.#post(endpoint, path, user, signal, mine);
    if (response.statusCode === 200)
      return this.#read(path, await this.#whole(path, response, MOST_REASON_BYTES), TOKEN).token;
    const reason = await this.#refusal(path, response);
    if (/authentication is not enabled/.test(reason)) return '';
    throw new Error(`${path} as user ${user.name}: ${reason}`);
  }

  /** Resolves with an answer of any status; within `mine`, then its body within `signal`. */
  async #post(
    { host, port }: HostPort,
    path: string,
    body: object,
    signal: AbortSignal,
    mine: AbortSignal,
  ): Promise<IncomingMessage> {
    const options = {
      host,
      port,
      path: `/v3/${path}`,
      method: 'POST',
      agent: false,
      signal,
      ...EVERY_ADDRESS,
    };
    const headers = {
      'content-type': 'application/json',
      ...(this.#token && { authorization: this.#token }),
    };
    const open = this.#address.secure ? requestSecurely : request;
    const asked: ClientRequest = open({ ...options, headers });
    asked.on('error', () => {}); // thrown by `once`
    asked.end(JSON.stringify(body));
    const [response] = (await once(asked, 'response', { signal: mine }).catch((error: unknown) => {
      asked.destroy();
      throw error;
    })) as [IncomingMessage];
    return response;
  }

  /** Why it has not done it. */
  async #refusal(path: string, response: IncomingMessage): Promise<string> {
    const status = `status ${response.statusCode}`;
    const timer = setTimeout(() => response.destroy(), CALL_MS);
    try {
      const said = REFUSED.safeParse(JSON.parse(await this.#whole(path, response, MOST_REASON_BYTES)));
      return said.success ? `${status}: ${said.data.error.slice(0, 256)}` : status;
    } catch {
      return status;
    } finally {
      clearTimeout(timer);
    }
  }

  async #whole(path: string, response: IncomingMessage, mostBytes: number): Promise<string> {
    const parts: Buffer[] = [];
    let size = 0;
    for await (const part of response) {
      size += (part as Buffer).length;
      if (size > mostBytes) {
        response.destroy();
        throw this.#failure(path, `an answer of more than ${mostBytes} bytes`);
      }
      parts.push(part as Buffer);
    }
    return Buffer.concat(parts).toString('utf8');
  }

  #read<T>(path: string, text: string, schema: z.ZodType<T>): T {
    let found: unknown;
    try {
      found = JSON.parse(text);
    } catch (cause) {
      throw this.#failure(path, 'its answer is not JSON', cause);
    }
    const read = schema.safeParse(found);
    if (read.success) return read.data;
    const reason = (found as { error?: { message?: unknown } | null } | null)?.error?.message;
    throw this.#failure(
      path,
      typeof reason === 'string' ? reason : 'its answer has another form',
      read.error,
    );
  }

  #failure(path: string, why: string, cause?: unknown): PdError {
    return new PdError('REGISTRY_FAILED', `${this}: ${path}: ${why}`, {}, { cause });
  }
}

/** The token has ended, etcd has begun to ask for one, or what users may do has changed since. */
function isStale(status: number | undefined, reason: string): boolean {
  return (
    status === 401 || (status === 400 && /user name is empty|revision of auth store is old/.test(reason))
  );
}
