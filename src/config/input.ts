/** Checks of what programs give in code: the fields of the configuration types, most of them left out. */
import { z } from 'zod';
import { PdError } from '../errors.ts';
import { type HostPort, isUnspecified, parseHostPort } from '../net/address.ts';
import { AllowList } from '../net/allow-list.ts';
import { localAddress } from '../net/local.ts';
import type { LogOptions, TransferLimits, TransferTimeouts } from '../transfer/types.ts';

/** `HOST:PORT`, brackets round an IPv6 address, or its parts. Port 0 lets the system choose where it is bound. */
export type Address = string | HostPort;

/** A longer timer than this fires at once in Node. */
const MAX_MS = 2 ** 31 - 1;

export const address = z
  .union([z.string(), z.strictObject({ host: z.string().min(1), port: z.int().min(0).max(65_535) })], {
    error: 'expected HOST:PORT or { host, port }',
  })
  .transform((given, context): HostPort => {
    if (typeof given !== 'string') return given;
    try {
      return parseHostPort(given);
    } catch {
      context.addIssue({
        code: 'custom',
        message: `${JSON.stringify(given)} is not HOST:PORT (an IPv6 address in brackets: [::1]:14579)`,
      });
      return z.NEVER;
    }
  });

export const device = z
  .string()
  .regex(/^(host|cuda(:\d{1,3})?)$/, 'expected host or cuda:N')
  .transform((name) => (name === 'cuda' ? 'cuda:0' : name));

/** IP addresses and CIDR ranges. */
export const ranges = z.array(
  z
    .string()
    .refine((text) => isRange(text), { error: 'expected an IP address or a range such as 10.0.0.0/8' }),
);

export const name = z.string().min(1);
export const bytes = z.int().min(0);
export const count = z.int().min(1);
export const milliseconds = z.number().min(0).max(MAX_MS);

/** A deadline of 0 would end every wait before it began. */
const deadline = z.number().min(1).max(MAX_MS);

const timeouts: Record<keyof TransferTimeouts, z.ZodOptional<typeof deadline>> = {
  connect: deadline.optional(),
  answer: deadline.optional(),
  pairInit: deadline.optional(),
  transfer: deadline.optional(),
  load: deadline.optional(),
  orphan: deadline.optional(),
};
export const transferTimeouts = z.strictObject(timeouts);

const limits: Record<keyof TransferLimits, z.ZodOptional<typeof count>> = {
  maxTensorBytes: count.optional(),
  maxTensors: count.optional(),
  maxQueuePerPeer: count.optional(),
  maxPeers: count.optional(),
};
export const transferLimits = z.strictObject(limits);

export const logOptions = z.strictObject({
  level: z.enum(['trace', 'debug', 'info', 'warn', 'error', 'silent']).optional(),
  format: z.enum(['auto', 'pretty', 'json']).optional(),
});

/** For a program that has its own log: what it should not miss, and nothing else. */
export const QUIET_LOG: LogOptions = { level: 'warn', format: 'auto' };

/** What others are told for a host that is bound: for every interface this machine's address, or PD_HOST_IP; else what is bound. */
export function hostForOthers(bound: string): string {
  return isUnspecified(bound) ? localAddress(bound.includes(':') ? 6 : 4) : bound;
}

function isRange(text: string): boolean {
  try {
    AllowList.parse([text]);
    return text.trim() !== '';
  } catch {
    return false;
  }
}

/** The checked fields, those left out or undefined not among them. Throws CONFIG_INVALID that names `what` and the field. */
export function checkInput<T>(schema: z.ZodType<T>, input: unknown, what: string): Defined<T> {
  const result = schema.safeParse(input);
  if (result.success) return withoutUndefined(result.data);
  const issues = result.error.issues.map(({ path, message }) =>
    path.length === 0 ? message : `${path.join('.')}: ${message}`,
  );
  throw new PdError('CONFIG_INVALID', `${what}: ${issues.join('; ')}`);
}

/** Fields that may be undefined become fields that may be absent. */
export type Defined<T> = {
  [K in keyof T as undefined extends T[K] ? never : K]: T[K];
} & { [K in keyof T as undefined extends T[K] ? K : never]?: Exclude<T[K], undefined> };

/** For spreading over defaults, which an undefined field would hide. */
export function withoutUndefined<T>(fields: T): Defined<T> {
  return Object.fromEntries(
    Object.entries(fields as object).filter(([, value]) => value !== undefined),
  ) as Defined<T>;
}
