/** Messages of the native hand-over to bytes and back. Pure; decoding throws protocol errors (wire/limits.ts) and nothing else. */
import { Decoder, Encoder } from '@msgpack/msgpack';
import { ERROR_TABLE, type ErrorCode, PdError, unreachable } from '../../errors.ts';
import type { LayoutFamily } from '../../kv/layout.ts';
import { countField, type Fields, field, isFields, optionalMap, show, textField } from '../../wire/fields.ts';
import { helloFields, readHello, readRefusal } from '../../wire/hello.ts';
import { type TransferId, transferIdOf } from '../../wire/ids.ts';
import {
  checkMsgpack,
  DECODER_LIMITS,
  MAX_BODY_BYTES,
  MAX_DIGEST,
  MAX_TENSOR_ID,
  MAX_TEXT,
  protocolError,
} from '../../wire/limits.ts';
import { UNIQUE_ID_BYTES, type UniqueId } from '../../wire/messages.ts';
import type { TokenLogprob } from '../../wire/token-logprob.ts';
import { blockListBytes, decodeBlocks, encodeBlocks } from './block-list.ts';
import {
  type AnsweredMessage,
  type AskedMessage,
  type DoneMessage,
  type DropMessage,
  HELD_STATES,
  type HelloMessage,
  type NativeMessage,
  type Nonce,
  type Ticket,
  TRANSPORTS,
  type WantMessage,
} from './messages.ts';

/** What this end allows. */
export interface NativeLimits {
  /** Blocks of the longest prompt, the most that a WANT may name. */
  readonly maxBlocks: number;
}

/** Completions of one prompt, and alternatives of one token. */
const MAX_DRAWN = 128;
const MAX_ALTERNATIVES = 128;
/** Of a page, which has a header in the place of slot 0 (transport/direct/page.ts). */
const MAX_SLOT = 255;
const MAX_LAYERS = 65_536;
const MAX_CACHE_BLOCKS = 2 ** 31 - 1;
const LAYOUT_FAMILIES = ['kv-first', 'blocks-first', 'mla'] as const satisfies readonly LayoutFamily[];
const NONCE_BYTES = 16;
const TICKET_BYTES = 16;
/** From here on more of them change little; and for how long at the most. */
const REHEARSALS = 80;
const REHEARSAL_MS = 60;

/** The longest native message: what the ROUTER's and DEALER's `maxMessageSize` must allow. The frozen wire keeps its own. Bytes. */
export function nativeBodyBytes({ maxBlocks }: NativeLimits): number {
  return MAX_BODY_BYTES + blockListBytes(maxBlocks);
}

const encoder = new Encoder();
// What bounds bins is the walk before it, which knows how long a list of blocks may be.
const { maxBinLength: _, ...decoderLimits } = DECODER_LIMITS;
const decoder = new Decoder(decoderLimits);

const COMMANDS = [
  'HELLO',
  'PAIR',
  'WANT',
  'DROP',
  'ACK',
  'HELD',
  'PART',
  'DONE',
  'FAIL',
  'DROPPED',
] as const satisfies readonly NativeMessage['cmd'][];

/** Whether `body` begins as one of these messages does, so that it is for this codec and not for the frozen wire's. */
export function isNativeMessage(body: Uint8Array): boolean {
  // fixmap, then the key cmd and a short string; none of them has 16 keys
  if ((body[0] ?? 0) >> 4 !== 0x8) return false;
  const head = Buffer.from(body.buffer, body.byteOffset, Math.min(body.length, 16)).toString('latin1', 1);
  return COMMANDS.some((cmd) => head.startsWith(`\xa3cmd${String.fromCharCode(0xa0 + cmd.length)}${cmd}`));
}

/** Throws what the other end would: a message that it must refuse does not leave. `limits`: what the other end allows. */
export function encodeNative(message: NativeMessage, limits: NativeLimits): Uint8Array {
  const fields = fieldsOf(message);
  readMessage(fields, limits);
  const body = encoder.encode(fields);
  if (body.length > nativeBodyBytes(limits)) {
    throw protocolError(
      'limit',
      `${message.cmd} of ${body.length} bytes, ${nativeBodyBytes(limits)} are allowed`,
    );
  }
  return body;
}

/** Says and reads what a request takes, so often that V8 has compiled it before the first one comes: that one alone would wait 30 ms for it. */
export function rehearseCodec(): void {
  const [from, to, ticket] = ['0'.repeat(32) as Nonce, '1'.repeat(32) as Nonce, '2'.repeat(32) as Ticket];
  const of = { from, to, seq: 1, ticket };
  const digest = '3'.repeat(32);
  const blocks = Array.from({ length: 64 }, (_, i) => (5 * i) % 64);
  const limits = { maxBlocks: blocks.length };
  const prompt = { promptDigest: digest, tokens: 1_024, skip: 0, blocks };
  const id = 'rehearsal' as TransferId;
  const want = { cmd: 'WANT', ...of, floor: 1, id, ...prompt, samplingDigest: digest, slot: 1 } as const;
  const done = { cmd: 'DONE', ...of, drawn: [1], samplingDigest: digest, promised: 64, written: 64 } as const;
  const until = performance.now() + REHEARSAL_MS;
  for (let i = 0; i < REHEARSALS && performance.now() < until; i++) {
    decodeAsked(encodeNative({ ...want, transport: 'direct' }, limits), limits);
    decodeAnswered(encodeNative(done, limits), limits);
    decodeAsked(encodeNative({ cmd: 'ACK', ...of, floor: 2 }, limits), limits);
  }
}

/** What a ROUTER has read. */
export function decodeAsked(body: Uint8Array, limits: NativeLimits): AskedMessage {
  const message = decodeNative(body, limits);
  switch (message.cmd) {
    case 'HELLO':
    case 'WANT':
    case 'DROP':
    case 'ACK':
      return message;
    default:
      throw protocolError('unknown_command', `${message.cmd} from a consumer, which only a producer says`);
  }
}

/** What a DEALER has read. */
export function decodeAnswered(body: Uint8Array, limits: NativeLimits): AnsweredMessage {
  const message = decodeNative(body, limits);
  switch (message.cmd) {
    case 'WANT':
    case 'DROP':
    case 'ACK':
      throw protocolError('unknown_command', `${message.cmd} from a producer, which only a consumer says`);
    default:
      return message;
  }
}

function decodeNative(body: Uint8Array, limits: NativeLimits): NativeMessage {
  checkMsgpack(body, {
    body: nativeBodyBytes(limits),
    bin: Math.max(UNIQUE_ID_BYTES, blockListBytes(limits.maxBlocks)),
  });
  let fields: unknown;
  try {
    fields = decoder.decode(body);
  } catch (cause) {
    throw cause instanceof PdError
      ? cause
      : protocolError('malformed', 'native message cannot be decoded', { cause });
  }
  if (!isFields(fields)) throw protocolError('malformed', `native message is ${show(fields)}, not a map`);
  return readMessage(fields, limits);
}

function fieldsOf(message: NativeMessage): Fields {
  const { cmd } = message;
  if (message.cmd === 'HELLO') return fieldsOfHello(message);
  const head = { cmd, from: bytesOf(message.from), to: bytesOf(message.to) };
  if (message.cmd === 'PAIR') return { ...head, unique_id: message.uniqueId };
  if (message.cmd === 'DROP') {
    const { want, floor, id } = message;
    return { ...head, ...(want && { seq: want.seq, ticket: bytesOf(want.ticket) }), floor, id };
  }
  const of = { ...head, seq: message.seq, ticket: bytesOf(message.ticket) };
  switch (message.cmd) {
    case 'WANT': {
      const { floor, id, promptDigest, tokens, skip, blocks, slot, samplingDigest, transport } = message;
      return {
        ...of,
        floor,
        id,
        prompt: promptDigest,
        tokens,
        skip,
        count: blocks.length,
        blocks: encodeBlocks(blocks),
        ...(slot !== undefined && { slot }),
        sampling: samplingDigest,
        transport,
      };
    }
    case 'ACK':
      return { ...of, floor: message.floor };
    case 'HELD':
      return { ...of, state: message.state };
    case 'PART': {
      const { part, layer, layers, block, blocks } = message;
      return { ...of, part, layer, layers, block, blocks };
    }
    case 'DONE': {
      const { drawn, logprobs, samplingDigest, promised, written } = message;
      return {
        ...of,
        drawn,
        ...(logprobs && { logprobs: logprobs.map(logprobFields) }),
        sampling: samplingDigest,
        promised,
        written,
      };
    }
    case 'FAIL':
      return { ...of, code: message.code, message: message.message.slice(0, MAX_TEXT) };
    case 'DROPPED':
      return of;
    default:
      return unreachable(message, 'message');
  }
}

function readMessage(fields: Fields, limits: NativeLimits): NativeMessage {
  const name = field(fields, 'cmd');
  const cmd = COMMANDS.find((known) => known === name);
  if (!cmd) throw protocolError('unknown_command', `unknown native command ${show(name)}`);
  if (cmd === 'HELLO') return readHelloMessage(fields);
  const addressed = {
    from: hexField(fields, 'from', NONCE_BYTES, cmd) as Nonce,
    to: hexField(fields, 'to', NONCE_BYTES, cmd) as Nonce,
  };
  if (cmd === 'PAIR') {
    const uniqueId = bytesField(fields, 'unique_id', UNIQUE_ID_BYTES, cmd) as UniqueId;
    return { cmd, ...addressed, uniqueId };
  }
  if (cmd === 'DROP') return readDrop(fields, addressed);
  const of = { ...addressed, ...readWantRef(fields, cmd) };
  switch (cmd) {
    case 'WANT':
      return readWant(fields, of, limits);
    case 'ACK':
      return { cmd, ...of, floor: countField(fields, 'floor', 1, cmd) };
    case 'HELD':
      return { cmd, ...of, state: nameField(fields, 'state', HELD_STATES, cmd) };
    case 'PART':
      return {
        cmd,
        ...of,
        part: countField(fields, 'part', 1, cmd),
        layer: boundedField(fields, 'layer', 0, MAX_LAYERS, cmd),
        layers: boundedField(fields, 'layers', 1, MAX_LAYERS, cmd),
        block: boundedField(fields, 'block', 0, limits.maxBlocks, cmd),
        blocks: boundedField(fields, 'blocks', 1, limits.maxBlocks, cmd),
      };
    case 'DONE':
      return readDone(fields, of, limits);
    case 'FAIL':
      return {
        cmd,
        ...of,
        code: readCode(fields, cmd),
        message: textField(fields, 'message', MAX_TEXT, cmd),
      };
    case 'DROPPED':
      return { cmd, ...of };
    default:
      return unreachable(cmd, 'command');
  }
}

function fieldsOfHello(message: HelloMessage): Fields {
  const { from, hello, cache, transports, direct, refused, probe } = message;
  const { blocks, blockSize, layers, blockBytes, family } = cache;
  return {
    cmd: 'HELLO',
    from: bytesOf(from),
    ...helloFields(hello),
    cache: { blocks, block_size: blockSize, layers, block_bytes: blockBytes, family },
    transports,
    ...(direct && { direct: { boot_id: direct.bootId, path: direct.path } }),
    ...(refused && { refused: { code: refused.code, message: refused.message.slice(0, MAX_TEXT) } }),
    ...(probe !== undefined && { probe }),
  };
}

function readHelloMessage(fields: Fields): HelloMessage {
  const cmd = 'HELLO';
  const cache = optionalMap(fields, 'cache', cmd);
  if (!cache) throw protocolError('bad_field', `${cmd}: no cache`);
  const transports = field(fields, 'transports');
  if (!Array.isArray(transports)) {
    throw protocolError('bad_field', `${cmd}: transports are ${show(transports)}, not a list`);
  }
  const direct = optionalMap(fields, 'direct', cmd);
  const refused = readRefusal(fields);
  return {
    cmd,
    from: hexField(fields, 'from', NONCE_BYTES, cmd) as Nonce,
    hello: readHello(fields, cmd),
    cache: {
      blocks: boundedField(cache, 'blocks', 1, MAX_CACHE_BLOCKS, cmd),
      blockSize: countField(cache, 'block_size', 1, cmd),
      layers: boundedField(cache, 'layers', 1, MAX_LAYERS, cmd),
      blockBytes: countField(cache, 'block_bytes', 1, cmd),
      family: nameField(cache, 'family', LAYOUT_FAMILIES, cmd),
    },
    // a later version may have ways that this one does not know
    transports: TRANSPORTS.filter((known) => transports.includes(known)),
    ...(direct && {
      direct: {
        bootId: textField(direct, 'boot_id', MAX_DIGEST, cmd),
        path: textField(direct, 'path', MAX_TEXT, cmd),
      },
    }),
    ...(refused && { refused }),
    ...(field(fields, 'probe') !== undefined && { probe: textField(fields, 'probe', MAX_TENSOR_ID, cmd) }),
  };
}

type Addressed = Pick<WantMessage, 'from' | 'to'>;
type OfWant = Pick<WantMessage, 'from' | 'to' | 'seq' | 'ticket'>;

function readWantRef(fields: Fields, what: string): Pick<WantMessage, 'seq' | 'ticket'> {
  return {
    seq: countField(fields, 'seq', 1, what),
    ticket: hexField(fields, 'ticket', TICKET_BYTES, what) as Ticket,
  };
}

function readWant(fields: Fields, of: OfWant, { maxBlocks }: NativeLimits): WantMessage {
  const cmd = 'WANT';
  const count = boundedField(fields, 'count', 1, maxBlocks, cmd);
  const blocks = field(fields, 'blocks');
  if (!(blocks instanceof Uint8Array)) {
    throw protocolError('bad_field', `${cmd}: blocks are ${show(blocks)}, not bytes`);
  }
  return {
    cmd,
    ...of,
    floor: countField(fields, 'floor', 1, cmd),
    id: readId(fields, cmd),
    promptDigest: textField(fields, 'prompt', MAX_DIGEST, cmd),
    tokens: countField(fields, 'tokens', 1, cmd),
    skip: boundedField(fields, 'skip', 0, maxBlocks, cmd),
    blocks: decodeBlocks(blocks, count, cmd),
    ...(field(fields, 'slot') !== undefined && {
      slot: boundedField(fields, 'slot', 1, MAX_SLOT, cmd),
    }),
    samplingDigest: textField(fields, 'sampling', MAX_DIGEST, cmd),
    transport: nameField(fields, 'transport', TRANSPORTS, cmd),
  };
}

function readDrop(fields: Fields, addressed: Addressed): DropMessage {
  const cmd = 'DROP';
  return {
    cmd,
    ...addressed,
    floor: countField(fields, 'floor', 1, cmd),
    id: readId(fields, cmd),
    ...(field(fields, 'seq') !== undefined && { want: readWantRef(fields, cmd) }),
  };
}

function readDone(fields: Fields, of: OfWant, { maxBlocks }: NativeLimits): DoneMessage {
  const cmd = 'DONE';
  const drawn = field(fields, 'drawn');
  if (!Array.isArray(drawn) || !drawn.every(isTokenId)) {
    throw protocolError('bad_field', `${cmd}: drawn is ${show(drawn)}, not a list of token ids`);
  }
  if (drawn.length > MAX_DRAWN) {
    throw protocolError('limit', `${cmd}: ${drawn.length} tokens drawn, ${MAX_DRAWN} are allowed`);
  }
  const logprobs = field(fields, 'logprobs');
  if (logprobs !== undefined && (!Array.isArray(logprobs) || logprobs.length !== drawn.length)) {
    throw protocolError('bad_field', `${cmd}: logprobs are ${show(logprobs)}, not one for each token`);
  }
  return {
    cmd,
    ...of,
    drawn,
    ...(logprobs && { logprobs: logprobs.map((one: unknown, index) => readLogprob(one, drawn[index]!)) }),
    samplingDigest: textField(fields, 'sampling', MAX_DIGEST, cmd),
    promised: boundedField(fields, 'promised', 0, maxBlocks, cmd),
    written: boundedField(fields, 'written', 0, maxBlocks, cmd),
  };
}

/** `[logprob, [[token, logprob], ...]]` */
function logprobFields({ logprob, top }: TokenLogprob): unknown {
  return [logprob, top.map((one) => [one.token, one.logprob])];
}

function readLogprob(value: unknown, token: number): TokenLogprob {
  const invalid = () => protocolError('bad_field', `DONE: a logprob is ${show(value)}`);
  if (!Array.isArray(value) || value.length !== 2) throw invalid();
  const [logprob, top] = value as unknown[];
  if (!isLogprob(logprob) || !Array.isArray(top)) throw invalid();
  if (top.length > MAX_ALTERNATIVES) {
    throw protocolError('limit', `DONE: ${top.length} alternatives, ${MAX_ALTERNATIVES} are allowed`);
  }
  return {
    token,
    logprob,
    top: top.map((pair: unknown) => {
      if (!Array.isArray(pair) || pair.length !== 2) throw invalid();
      const [id, its] = pair as unknown[];
      if (!isTokenId(id) || !isLogprob(its)) throw invalid();
      return { token: id, logprob: its };
    }),
  };
}

export function isTokenId(value: unknown): value is number {
  return typeof value === 'number' && Number.isInteger(value) && value >= 0 && value < 2 ** 31;
}

/** A token that is as good as impossible has minus infinity. */
function isLogprob(value: unknown): value is number {
  return typeof value === 'number' && !Number.isNaN(value) && value !== Number.POSITIVE_INFINITY;
}

function readId(fields: Fields, what: string): TransferId {
  return transferIdOf(textField(fields, 'id', MAX_TENSOR_ID, what));
}

/** A later version may know codes that this one does not; its message says more anyway. */
function readCode(fields: Fields, what: string): ErrorCode {
  const code = textField(fields, 'code', 64, what);
  return Object.hasOwn(ERROR_TABLE, code) ? (code as ErrorCode) : 'KV_SEND_FAILED';
}

function boundedField(fields: Fields, key: string, least: number, most: number, what: string): number {
  const value = countField(fields, key, least, what);
  if (value > most) throw protocolError('limit', `${what}: ${key} is ${value}, ${most} are allowed`);
  return value;
}

function nameField<Name extends string>(
  fields: Fields,
  key: string,
  names: readonly Name[],
  what: string,
): Name {
  const value = field(fields, key);
  const name = names.find((known) => known === value);
  if (name !== undefined) return name;
  throw protocolError('bad_field', `${what}: ${key} is ${show(value)}, not ${names.join(', ')}`);
}

function bytesField(fields: Fields, key: string, length: number, what: string): Uint8Array {
  const value = field(fields, key);
  if (value instanceof Uint8Array && value.length === length) return value;
  throw protocolError('bad_field', `${what}: ${key} is ${show(value)}, not ${length} bytes`);
}

function hexField(fields: Fields, key: string, length: number, what: string): string {
  return Buffer.from(bytesField(fields, key, length, what)).toString('hex');
}

function bytesOf(hex: string): Uint8Array {
  return Uint8Array.from(Buffer.from(hex, 'hex'));
}
