/** The `pd` of a NEW and of its answer. */
import { ERROR_TABLE, type ErrorCode } from '../errors.ts';
import { checkDtype, countField, type Fields, field, optionalMap, show, textField } from './fields.ts';
import type { Fingerprint } from './fingerprint.ts';
import { MAX_TEXT, protocolError } from './limits.ts';
import type { PeerHello } from './messages.ts';
import { SEND_TYPES, type SendType } from './messages.ts';

const MAX_FEATURES = 32;

export function helloFields({ version, features, sendType, fingerprint }: PeerHello): Fields {
  const hello = { version, features, send_type: sendType };
  if (!fingerprint) return hello;
  const { digest, model, weights, dtype, blockSize, layers, heads, headDim } = fingerprint;
  return {
    ...hello,
    fingerprint: {
      digest,
      model,
      weights,
      dtype,
      block_size: blockSize,
      layers,
      heads,
      head_dim: headDim,
    },
  };
}

export function readHello(pd: Fields, what: string): PeerHello {
  const version = countField(pd, 'version', 1, what);
  const features = readFeatures(pd, what);
  const sendType = readSendType(pd, what);
  const hello = { version, features, sendType };
  const fingerprint = optionalMap(pd, 'fingerprint', what);
  return fingerprint ? { ...hello, fingerprint: readFingerprint(fingerprint, what) } : hello;
}

export function readFeatures(pd: Fields, what: string): readonly string[] {
  const features = field(pd, 'features');
  if (!Array.isArray(features) || !features.every((name) => typeof name === 'string')) {
    throw protocolError('bad_field', `${what}: features are ${show(features)}, not a list of strings`);
  }
  if (features.length > MAX_FEATURES || features.some((name: string) => name.length > 64)) {
    throw protocolError('limit', `${what}: more than ${MAX_FEATURES} features, or one longer than 64`);
  }
  return features as string[];
}

export function readSendType(pd: Fields, what: string): SendType {
  const name = field(pd, 'send_type');
  const sendType = SEND_TYPES.find((known) => known === name);
  if (sendType) return sendType;
  throw protocolError('bad_field', `${what}: send_type is ${show(name)}, not ${SEND_TYPES.join(', ')}`);
}

function readFingerprint(fields: Fields, what: string): Fingerprint {
  return {
    digest: textField(fields, 'digest', MAX_TEXT, what),
    model: textField(fields, 'model', MAX_TEXT, what),
    weights: textField(fields, 'weights', MAX_TEXT, what),
    dtype: checkDtype(field(fields, 'dtype'), what),
    blockSize: countField(fields, 'block_size', 1, what),
    layers: countField(fields, 'layers', 1, what),
    heads: countField(fields, 'heads', 1, what),
    headDim: countField(fields, 'head_dim', 1, what),
  };
}

export function readRefusal(pd: Fields): { code: ErrorCode; message: string } | undefined {
  const fields = optionalMap(pd, 'refused', 'answer to NEW');
  if (!fields) return undefined;
  const code = textField(fields, 'code', 64, 'answer to NEW');
  // A later version may have codes that this one does not know; the message says more anyway.
  const known = Object.hasOwn(ERROR_TABLE, code) ? (code as ErrorCode) : 'MESSAGE_INVALID';
  return { code: known, message: textField(fields, 'message', MAX_TEXT, 'answer to NEW') };
}
