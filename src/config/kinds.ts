/**
 * Kinds of option values: how each is written on a command line, in the environment and in a JSON file, how a program gives it, and
 * what is allowed. What people write may be text or a JSON value alike, so that `"8082"` and `8082` mean the same everywhere.
 */

import { formatHostPort, type HostPort, parseHostPort } from '../net/address.ts';
import { AllowList } from '../net/allow-list.ts';
import { type EtcdAddress, parseEtcdAddress } from '../net/etcd.ts';
import { z } from '../zod.ts';

export interface Kind<T> {
  /** As people write it: text, number, boolean or list in; the validated value out. */
  readonly schema: z.ZodType<T>;
  /** As a program gives it, in the unit of the configuration. Absent: as people write it. */
  readonly value?: z.ZodType<T>;
  /** Completes "expected ...". */
  readonly allowed: string;
  /** Placeholder in --help; absent for a switch, which takes no argument. */
  readonly argument?: string;
  /** May be given more than once, and takes several values; separated by commas in the environment. */
  readonly list?: true;
  /** As --help writes a default. */
  render(value: T): string;
}

const scalar = z.union([z.string(), z.number(), z.boolean()]).transform((value) => String(value).trim());

/** A longer timer than this fires at once in Node. */
const MAX_MS = 2 ** 31 - 1;

/** A kind whose values `value` checks, wherever they come from; `parse` makes one of text, undefined or NaN where it cannot. */
function parsed<T>(
  argument: string,
  allowed: string,
  value: z.ZodType<T>,
  parse: (text: string) => unknown,
  render: (value: T) => string = String,
): Kind<T> {
  const schema = scalar.transform((text, context): T => {
    const result = value.safeParse(parse(text));
    if (result.success) return result.data;
    context.addIssue({ code: 'custom', message: `expected ${allowed}` });
    return z.NEVER;
  });
  return { schema, value, allowed, argument, render };
}

/** Undefined where it throws. */
function attempt<T>(parse: () => T): T | undefined {
  try {
    return parse();
  } catch {
    return undefined;
  }
}

const itself = (text: string): string => text;
const numberOf = (text: string): number => (text === '' ? Number.NaN : Number(text));

export function text(argument = 'text', allowed = 'some text'): Kind<string> {
  return parsed(argument, allowed, z.string().min(1), itself);
}

/** Text, or JSON as a config file may hold it in place: rendered back to text. */
export function json(): Kind<string> {
  const schema = z.union([z.string(), z.record(z.string(), z.unknown()).transform((o) => JSON.stringify(o))]);
  return { schema, allowed: 'a JSON object', argument: 'json', render: String };
}

export function integer(min: number, max: number, argument = 'n'): Kind<number> {
  return parsed(argument, `a whole number from ${min} to ${max}`, z.int().min(min).max(max), numberOf);
}

export function real(min: number, max: number, argument = 'x'): Kind<number> {
  return parsed(argument, `a number from ${min} to ${max}`, z.number().min(min).max(max), numberOf);
}

const GIB = 2 ** 30;

/** Bytes, written in units of 2^30. */
export function gibibytes(max: number): Kind<number> {
  const value = z
    .int()
    .min(0)
    .max(max * GIB);
  const parse = (text: string) => Math.round(numberOf(text) * GIB);
  return parsed('GB', `a number from 0 to ${max}`, value, parse, (bytes) => String(bytes / GIB));
}

/** 0 lets the system choose. */
export function port(): Kind<number> {
  return { ...integer(0, 65_535, 'port'), allowed: 'a port from 0 to 65535 (0: any free one)' };
}

/** `HOST:PORT`, brackets round an IPv6 address, or its parts. Port 0 lets the system choose where it is bound. */
export type Address = string | HostPort;

/** An address as a program gives it. */
export const address: z.ZodType<HostPort, Address> = z
  .union([z.string(), z.strictObject({ host: z.string().min(1), port: z.int().min(0).max(65_535) })], {
    error: 'expected HOST:PORT or { host, port }',
  })
  .transform((given, context): HostPort => {
    if (typeof given !== 'string') return given;
    const parsed = attempt(() => parseHostPort(given));
    if (parsed) return parsed;
    const message = `${JSON.stringify(given)} is not HOST:PORT (an IPv6 address in brackets: [::1]:14579)`;
    context.addIssue({ code: 'custom', message });
    return z.NEVER;
  });

export function hostPort(): Kind<HostPort> {
  const allowed = 'HOST:PORT, with brackets round an IPv6 address';
  return parsed('host:port', allowed, address, itself, ({ host, port }) => `${host}:${port}`);
}

export function webUrl(): Kind<string> {
  const allowed = 'a URL such as http://localhost:4318';
  const value = z.string().refine((given) => /^https?:\/\/./.test(given) && URL.canParse(given), {
    error: `expected ${allowed}`,
  });
  return parsed('url', allowed, value, itself);
}

/** etcd, and the prefix of its keys. */
export function etcdAddress(): Kind<EtcdAddress> {
  const value = z.custom<EtcdAddress>(
    (given) => typeof given === 'object' && given !== null && 'endpoints' in given,
  );
  const parse = (text: string) => attempt(() => parseEtcdAddress(text));
  const allowed =
    'etcd://HOST:2379, further hosts after commas, a prefix after /, USER:PASSWORD@ before; etcds:// for TLS';
  return parsed(
    'url',
    allowed,
    value,
    parse,
    ({ endpoints }) => `etcd://${endpoints.map(formatHostPort).join(',')}`,
  );
}

/** An instance that a proxy is told of, and need not wait for. */
export interface NamedInstance {
  /** Of its HTTP server. A name stands for all its addresses. */
  readonly http: HostPort;
  readonly tls: boolean;
  /** Of a server that is not ours: what it cannot be asked. Absent: a pd-worker, which says it itself. */
  readonly told?: { readonly role: 'producer' | 'consumer'; readonly kv: HostPort };
}

export function namedInstance(): Kind<NamedInstance> {
  const endpoint = z.strictObject({ host: z.string().min(1), port: z.int().min(1).max(65_535) });
  const told = z.strictObject({ role: z.enum(['producer', 'consumer']), kv: endpoint });
  const value = z.strictObject({ http: endpoint, tls: z.boolean(), told: told.exactOptional() });
  const parse = (text: string): NamedInstance | undefined => {
    const [, role, scheme, http, kv] =
      /^(?:(producer|consumer)=)?(https?:\/\/)?([^/=]+)(?:\/([^/=]+))?$/.exec(text) ?? [];
    if (http === undefined || (role === undefined) !== (kv === undefined)) return undefined;
    return attempt(() => {
      const named = { http: parseHostPort(http), tls: scheme === 'https://' };
      if (kv === undefined) return named;
      return { ...named, told: { role: role as 'producer' | 'consumer', kv: parseHostPort(kv) } };
    });
  };
  const allowed =
    'HOST:PORT of a pd-worker, or producer=HOST:PORT/KV_HOST:KV_PORT or consumer=... of a vLLM worker';
  return parsed('instance', allowed, value, parse, ({ http }) => formatHostPort(http));
}

/** An IP address or CIDR range, kept as text. */
export function addressRange(): Kind<string> {
  const range = z.string().refine(isRange, { error: 'expected an IP address or a range such as 10.0.0.0/8' });
  return parsed('cidr', 'an IP address or a range such as 10.0.0.0/8 or fd00::/8', range, itself);
}

function isRange(text: string): boolean {
  return text.trim() !== '' && attempt(() => AllowList.parse([text])) !== undefined;
}

/** A device, or `auto`: what this machine has decides. A program names one. */
export function deviceOrAuto(): Kind<string> {
  const named = device();
  const auto = scalar.pipe(z.literal('auto'));
  return { ...named, schema: z.union([auto, named.schema]), allowed: `auto, ${named.allowed}` };
}

/** `host`, or `cuda:N`; `cuda` alone is the first. */
export function device(): Kind<string> {
  const value = z
    .string()
    .regex(/^(host|cuda(:\d{1,3})?)$/, 'expected host or cuda:N')
    .transform((name) => (name === 'host' ? name : `cuda:${Number(name.slice(5))}`));
  return parsed('device', 'host, cuda or cuda:N', value, itself);
}

export function oneOf<const T extends readonly string[]>(values: T): Kind<T[number]> {
  return parsed(values.join('|'), `one of ${values.join(', ')}`, z.enum(values), itself);
}

/** A switch: `--name` and `--no-name`; true/false, 1/0, yes/no, on/off elsewhere. */
export function toggle(): Kind<boolean> {
  const { argument: _, ...kind } = parsed('', 'true or false', z.boolean(), (value) => {
    if (/^(true|1|yes|on)$/i.test(value)) return true;
    return /^(false|0|no|off)$/i.test(value) ? false : undefined;
  });
  return kind;
}

const BYTE_UNITS: Record<string, number> = {
  '': 1,
  B: 1,
  KB: 1e3,
  MB: 1e6,
  GB: 1e9,
  TB: 1e12,
  KIB: 2 ** 10,
  MIB: 2 ** 20,
  GIB: 2 ** 30,
  TIB: 2 ** 40,
};

/** Bytes: `1e9`, `512MiB`, `2GB`. */
export function bytes(min = 0): Kind<number> {
  return parsed(
    'bytes',
    `bytes, such as 1e9, 512MiB or 2GB, at least ${min}`,
    z.int().min(min),
    (value) => {
      const match = /^(\d+(?:\.\d+)?(?:e\+?\d+)?)\s*([kmgt]?i?b?)$/i.exec(value);
      const unit = BYTE_UNITS[(match?.[2] ?? '?').toUpperCase()];
      return Math.round(Number(match?.[1]) * (unit ?? Number.NaN));
    },
    (size) => {
      const whole = Object.entries(BYTE_UNITS).filter(([, unit]) => unit > 1 && size % unit === 0);
      const [name, unit] = whole.sort(([, a], [, b]) => b - a)[0] ?? ['B', 1];
      return size === 0 ? '0' : `${size / unit}${name.replace('I', 'i')}`;
    },
  );
}

const TIME_UNITS: Record<string, number> = { '': 1_000, ms: 1, s: 1_000, m: 60_000, h: 3_600_000 };

/** Milliseconds. Written in seconds: `60`, `60s`, `500ms`, `2m`, `1h`. */
export function duration(minMs = 0): Kind<number> {
  return parsed(
    'time',
    `seconds, such as 60, 60s, 500ms or 2m, at least ${minMs / 1000}`,
    z.number().min(minMs).max(MAX_MS),
    (value) => {
      const match = /^(\d+(?:\.\d+)?)\s*(ms|s|m|h|)$/i.exec(value);
      return Number(match?.[1]) * (TIME_UNITS[(match?.[2] ?? '?').toLowerCase()] ?? Number.NaN);
    },
    (ms) => (ms % 1_000 === 0 ? `${ms / 1_000}s` : `${ms}ms`),
  );
}

/** Several of a kind; a program gives `min` at least. */
export function listOf<T>(kind: Kind<T>, min = 0): Kind<readonly T[]> {
  return {
    schema: z.union([z.array(kind.schema), kind.schema.transform((value) => [value])]),
    value: z.array(kind.value ?? kind.schema).min(min),
    allowed: kind.allowed,
    ...(kind.argument === undefined ? {} : { argument: kind.argument }),
    list: true,
    render: (values) => values.map((value) => kind.render(value)).join(', '),
  };
}
