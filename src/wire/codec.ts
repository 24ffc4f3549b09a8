/**
 * Messages to bytes and back. Without `native` the bytes are exactly those of vLLM's engine: a msgpack map, keys in a fixed order, ints in
 * their smallest form, `unique_id` as bin; answers to PUT are one raw character. Pure; decoding throws PdError and nothing else, with
 * `context.kind` = the label of pd_protocol_errors_total.
 */
import { Decoder, Encoder } from '@msgpack/msgpack';
import { PdError, unreachable } from '../errors.ts';
import {
  checkDtype,
  checkShape,
  checkTensorId,
  countField,
  type Fields,
  field,
  isFields,
  nearFields,
  optionalMap,
  promptFields,
  readNear,
  readPrompt,
  show,
  textField,
} from './fields.ts';
import { helloFields, readFeatures, readHello, readRefusal, readSendType } from './hello.ts';
import {
  checkMsgpack,
  DECODER_LIMITS,
  MAX_BODY_BYTES,
  MAX_DIGEST,
  MAX_TEXT,
  protocolError,
  type WireLimits,
} from './limits.ts';
import type { Answer, KvEventPorts, PingHello, PingMessage, WireMessage, WorkerLoad } from './messages.ts';
import { UNIQUE_ID_BYTES, type UniqueId } from './messages.ts';

const encoder = new Encoder();
const decoder = new Decoder(DECODER_LIMITS);

const RAW_ANSWERS = { send: 0x30, 'no-room': 0x31, 'no-pair': 0x32 } as const;

/** Throws what the receiver would: a message that exceeds the limits is not sent. */
export function encodeMessage(message: WireMessage): Uint8Array {
  switch (message.cmd) {
    case 'NEW': {
      const { cmd, native } = message;
      const unique_id = checkUniqueId(message.unique_id);
      return encode(native ? { cmd, unique_id, pd: helloFields(native) } : { cmd, unique_id });
    }
    case 'PUT': {
      const { cmd, shape, dtype } = message;
      const tensor_id = checkTensorId(message.tensor_id, cmd);
      checkShape(shape, dtype, { maxTensorBytes: Number.MAX_SAFE_INTEGER }, `${cmd} ${show(tensor_id)}`);
      return encode(
        message.native
          ? { cmd, tensor_id, shape, dtype, pd: promptFields(message.native.promptDigest) }
          : { cmd, tensor_id, shape, dtype },
      );
    }
    case 'GET': {
      const { cmd } = message;
      return encode({ cmd, tensor_id: checkTensorId(message.tensor_id, cmd) });
    }
    default:
      return unreachable(message, 'message');
  }
}

/** Adds to an error which request it leaves unanswered; `answerToInvalid` reads that from its context. */
export function decodeMessage(body: Uint8Array, limits: WireLimits): WireMessage {
  let fields: Fields | undefined;
  try {
    fields = decodeMap(body, 'message');
    return readMessage(fields, limits);
  } catch (error) {
    const { code, message, context, cause } = PdError.from(error);
    throw new PdError(code, message, { ...context, ...askedInVain(body, fields) }, { cause });
  }
}

function readMessage(fields: Fields, limits: WireLimits): WireMessage {
  const cmd = field(fields, 'cmd');
  switch (cmd) {
    case 'NEW': {
      const unique_id = checkUniqueId(field(fields, 'unique_id'));
      const pd = optionalMap(fields, 'pd', cmd);
      return pd ? { cmd, unique_id, native: readHello(pd, cmd) } : { cmd, unique_id };
    }
    case 'PUT':
      return readPut(fields, limits);
    case 'GET':
      return { cmd, tensor_id: checkTensorId(field(fields, 'tensor_id'), cmd) };
    default:
      throw typeof cmd === 'string'
        ? protocolError('unknown_command', `unknown command ${show(cmd)}`)
        : protocolError('bad_field', `message: cmd is ${show(cmd)}, not a string`);
  }
}

/**
 * The answer to a message that `decodeMessage` refused with `error`. Answers are matched by order, so every message that is recognizably
 * an announcement must get one: its sender would wait, vLLM for ever. Undefined for anything else.
 */
export function answerToInvalid(error: unknown): Answer | undefined {
  switch (error instanceof PdError ? error.context['cmd'] : undefined) {
    case 'PUT':
      return { kind: 'no-room' };
    case 'GET':
      return { kind: 'get', ret: 1 };
    default:
      return undefined;
  }
}

export function encodeAnswer(answer: Answer): Uint8Array {
  switch (answer.kind) {
    case 'send':
    case 'no-room':
    case 'no-pair':
      return Uint8Array.of(RAW_ANSWERS[answer.kind]);
    case 'get': {
      const { ret } = answer;
      const fields = ret === 0 ? { ret, shape: answer.shape, dtype: answer.dtype } : { ret };
      const pd =
        ret === 0
          ? promptFields(answer.promptDigest)
          : { ...(answer.gone ? { gone: true } : {}), ...nearFields(answer.near) };
      return encode(Object.keys(pd).length > 0 ? { ...fields, pd } : fields);
    }
    case 'hello': {
      const { refused } = answer;
      const pd = helloFields(answer.hello);
      if (!refused) return encode({ pd });
      // The message has both values of a mismatch, so it may be long.
      return encode({ pd: { ...pd, refused: { ...refused, message: refused.message.slice(0, MAX_TEXT) } } });
    }
    default:
      return unreachable(answer, 'answer');
  }
}

export function decodeAnswer(body: Uint8Array, limits: WireLimits): Answer {
  if (body.length === 1) {
    switch (body[0]) {
      case RAW_ANSWERS.send:
        return { kind: 'send' };
      case RAW_ANSWERS['no-room']:
        return { kind: 'no-room' };
      case RAW_ANSWERS['no-pair']:
        return { kind: 'no-pair' };
    }
  }
  const fields = decodeMap(body, 'answer');
  const ret = field(fields, 'ret');
  const pd = optionalMap(fields, 'pd', 'answer');
  if (ret === undefined && pd) {
    const hello = readHello(pd, 'answer to NEW');
    const refused = readRefusal(pd);
    return refused ? { kind: 'hello', hello, refused } : { kind: 'hello', hello };
  }
  switch (ret) {
    case 0: {
      const dtype = checkDtype(field(fields, 'dtype'), 'answer to GET');
      const shape = checkShape(field(fields, 'shape'), dtype, limits, 'answer to GET');
      return { kind: 'get', ret, shape, dtype, ...(pd && readPrompt(pd, 'answer to GET')) };
    }
    case 1:
      return {
        kind: 'get',
        ret,
        ...(pd && field(pd, 'gone') === true ? { gone: true } : {}),
        ...(pd ? readNear(pd, 'answer to GET') : {}),
      };
    default:
      throw protocolError('bad_field', `answer: ret is ${show(ret)}, not 0 or 1`);
  }
}

export function encodePing(ping: PingMessage): Uint8Array {
  return encode(pingFields(ping));
}

/** A ping as it travels, before it is bytes: `GET /instance` answers with the same, as JSON. */
export function pingFields({ type, http_address, zmq_address, native }: PingMessage): Fields {
  if (!native) return { type, http_address, zmq_address };
  const { version, digest, model, sendType, features, load, events, tokenizer, started } = native;
  const told = {
    ...(sendType === undefined ? {} : { send_type: sendType }),
    ...(features === undefined ? {} : { features }),
    ...(load === undefined ? {} : { load: loadFields(load) }),
    ...(events === undefined ? {} : { events }),
    ...(tokenizer === undefined ? {} : { tokenizer }),
    ...(started === undefined ? {} : { started }),
  };
  return { type, http_address, zmq_address, pd: { version, digest, model, ...told } };
}

/** Addresses stay strings here; the reader parses them (`net/address.ts`). */
export function decodePing(body: Uint8Array): PingMessage {
  return readPing(decodeMap(body, 'ping'));
}

/** The HTTP address that a ping gives which cannot be read otherwise, for people; undefined where it gives none. */
export function claimedAddress(body: Uint8Array): string | undefined {
  try {
    const address = field(decodeMap(body, 'ping'), 'http_address');
    return address === undefined ? undefined : show(address);
  } catch {
    return undefined;
  }
}

/** The reverse of `pingFields`. */
export function readPing(fields: unknown): PingMessage {
  if (!isFields(fields)) throw protocolError('malformed', `ping: ${show(fields)} is not a map`);
  const type = field(fields, 'type');
  if (type !== 'P' && type !== 'D') {
    throw protocolError('bad_field', `ping: type is ${show(type)}, not "P" or "D"`);
  }
  const http_address = textField(fields, 'http_address', MAX_TEXT, 'ping');
  const zmq_address = textField(fields, 'zmq_address', MAX_TEXT, 'ping');
  const pd = optionalMap(fields, 'pd', 'ping');
  const ping = { type, http_address, zmq_address } as const;
  return pd ? { ...ping, native: readPingHello(pd) } : ping;
}

function encode(fields: Fields): Uint8Array {
  const bytes = encoder.encode(fields);
  if (bytes.length > MAX_BODY_BYTES) {
    throw protocolError('limit', `message of ${bytes.length} bytes, ${MAX_BODY_BYTES} are allowed`);
  }
  return bytes;
}

function decodeMap(body: Uint8Array, what: string): Fields {
  checkMsgpack(body);
  let value: unknown;
  try {
    value = decoder.decode(body);
  } catch (cause) {
    throw protocolError('malformed', `${what}: ${PdError.from(cause).message}`, { cause });
  }
  if (!isFields(value)) throw protocolError('malformed', `${what}: ${show(value)} is not a map`);
  return value;
}

/** A copy, so that the socket's buffer can be freed. */
function checkUniqueId(value: unknown): UniqueId {
  if (!(value instanceof Uint8Array) || value.length !== UNIQUE_ID_BYTES) {
    throw protocolError('bad_field', `NEW: unique_id is ${show(value)}, not ${UNIQUE_ID_BYTES} bytes`);
  }
  return new Uint8Array(value) as UniqueId;
}

function readPut(fields: Fields, limits: WireLimits): WireMessage {
  const cmd = 'PUT';
  const tensor_id = checkTensorId(field(fields, 'tensor_id'), cmd);
  const what = `${cmd} ${show(tensor_id)}`;
  const dtype = checkDtype(field(fields, 'dtype'), what);
  const shape = checkShape(field(fields, 'shape'), dtype, limits, what);
  const put = { cmd, tensor_id, shape, dtype } as const;
  const pd = optionalMap(fields, 'pd', what);
  return pd ? { ...put, native: readPrompt(pd, what) } : put;
}

/** What a refused announcement asks for, as far as it is readable. */
function askedInVain(body: Uint8Array, fields: Fields | undefined): { readonly cmd?: string } {
  // Even if it is too large or too deep to decode, it begins as all do: a vLLM peer's id may be longer than we allow.
  if (!fields) return leadingCommand(body);
  const cmd = field(fields, 'cmd');
  return typeof cmd === 'string' ? { cmd } : {};
}

/** `cmd` of a map that begins with it. */
function leadingCommand(body: Uint8Array): { readonly cmd?: string } {
  const [first = 0] = body;
  // fixmap, map 16 and map 32
  const at = first >> 4 === 0x8 ? 1 : first === 0xde ? 3 : first === 0xdf ? 5 : undefined;
  if (at === undefined) return {};
  const head = Buffer.from(body.subarray(at, at + 9)).toString('latin1');
  const cmd = ['PUT', 'GET'].find((name) =>
    head.startsWith(`\xa3cmd${String.fromCharCode(0xa0 + name.length)}${name}`),
  );
  return cmd ? { cmd } : {};
}

function readPingHello(pd: Fields): PingHello {
  return {
    version: countField(pd, 'version', 1, 'ping'),
    digest: textField(pd, 'digest', MAX_TEXT, 'ping'),
    model: textField(pd, 'model', MAX_TEXT, 'ping'),
    ...(field(pd, 'send_type') === undefined ? {} : { sendType: readSendType(pd, 'ping') }),
    ...(field(pd, 'features') === undefined ? {} : { features: readFeatures(pd, 'ping') }),
    ...readLoad(pd),
    ...readEventPorts(pd),
    ...(field(pd, 'tokenizer') === undefined
      ? {}
      : { tokenizer: textField(pd, 'tokenizer', MAX_DIGEST, 'ping') }),
    ...(field(pd, 'started') === undefined ? {} : { started: countField(pd, 'started', 0, 'ping') }),
  };
}

function loadFields({ running, waiting, kvUsed, kvBlocks, queuedTokens }: WorkerLoad): Fields {
  return { running, waiting, kv_used: kvUsed, kv_blocks: kvBlocks, queued: queuedTokens };
}

function readEventPorts(pd: Fields): { readonly events?: KvEventPorts } {
  const events = optionalMap(pd, 'events', 'ping');
  if (!events) return {};
  const port = (key: string) => {
    const value = countField(events, key, 1, 'events of a ping');
    if (value > 65_535) throw protocolError('bad_field', `events of a ping: ${key} is ${value}, not a port`);
    return value;
  };
  return {
    events: { publish: port('publish'), replay: port('replay'), snapshot: port('snapshot') },
  };
}

function readLoad(pd: Fields): { readonly load?: WorkerLoad } {
  const load = optionalMap(pd, 'load', 'ping');
  if (!load) return {};
  const count = (key: string) => countField(load, key, 0, 'load of a ping');
  return {
    load: {
      running: count('running'),
      waiting: count('waiting'),
      kvUsed: count('kv_used'),
      kvBlocks: count('kv_blocks'),
      queuedTokens: count('queued'),
    },
  };
}
