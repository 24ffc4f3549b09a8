/**
 * Options as fields of a configuration: where each value lies in it, and how the same fields are checked when a program gives them.
 *
 *   kvKey: option({ field: 'transfer.kvKey', kind: oneOf(KV_KEYS), ... })
 *     fieldsOf(table, values).transfer.kvKey      z.strictObject(shapeOf(table, 'transfer.'))
 */

import { PdError } from '../errors.ts';
import { LOG_FORMATS, LOG_LEVELS, type LogOptions } from '../observability/log-options.ts';
import type { z } from '../zod.ts';
import { type Kind, oneOf, webUrl } from './kinds.ts';
import {
  grouped,
  type OptionLayer,
  type OptionSpec,
  type OptionTable,
  option,
  type ValuesOf,
} from './options.ts';

type Leaf = string | number | boolean | readonly unknown[];

/** `log`, `log.level`: every field of a configuration, however deep. */
export type FieldPath<C> = {
  [K in keyof C & string]: NonNullable<C[K]> extends Leaf ? K : K | `${K}.${FieldPath<NonNullable<C[K]>>}`;
}[keyof C & string];

type FieldAt<C, P> = P extends `${infer K}.${infer Rest}`
  ? K extends keyof C
    ? FieldAt<NonNullable<C[K]>, Rest>
    : never
  : P extends keyof C
    ? NonNullable<C[P]>
    : never;

/** A table whose fields are those of a configuration `C`, each of a kind that gives what the field takes. */
export type TableOf<C> = Readonly<
  Record<
    string,
    | { [P in FieldPath<C>]: OptionSpec<FieldAt<C, P>> & { readonly field: P } }[FieldPath<C>]
    | (OptionSpec<unknown> & { readonly field: false })
  >
>;

type Nested<P extends string, V> = P extends `${infer K}.${infer Rest}`
  ? { readonly [k in K]: Nested<Rest, V> }
  : { readonly [k in P]: V };
type NestedIfGiven<P extends string, V> = P extends `${infer K}.${infer Rest}`
  ? { readonly [k in K]: NestedIfGiven<Rest, V> }
  : { readonly [k in P]?: V };

type FieldOf<S> = S extends { readonly field: infer P extends string; readonly kind: Kind<infer V> }
  ? S extends { readonly default: unknown }
    ? Nested<P, V>
    : NestedIfGiven<P, V>
  : never;

type Both<U> = (U extends unknown ? (one: U) => void : never) extends (all: infer All) => void ? All : never;

/** What the values of a table make of a configuration: the fields that options give, those without a value left out. */
export type FieldsOf<T extends OptionTable> = Both<FieldOf<T[keyof T]>>;

/** Puts each value where its option says. */
export function fieldsOf<T extends OptionTable>(table: T, values: ValuesOf<T>): FieldsOf<T> {
  const fields: Record<string, unknown> = {};
  for (const [name, { field }] of Object.entries(table)) {
    const value = values[name];
    if (!field || value === undefined) continue;
    const path = field.split('.');
    const last = path.pop() ?? field;
    let at = fields;
    for (const key of path) {
      at[key] ??= {};
      at = at[key] as Record<string, unknown>;
    }
    at[last] = value;
  }
  return fields as FieldsOf<T>;
}

type NameUnder<P extends string, S> = S extends { readonly field: `${P}${infer Name}` }
  ? Name extends `${string}.${string}`
    ? never
    : Name
  : never;

/** The fields right under a prefix, each of which may be left out. */
export type ShapeOf<T extends OptionTable, P extends string> = {
  [K in keyof T as NameUnder<P, T[K]>]: T[K] extends { readonly kind: Kind<infer V> }
    ? z.ZodOptional<z.ZodType<V>>
    : never;
};

/** Checks of the fields right under `prefix` ('' or such as `transfer.`), as a program gives them. */
export function shapeOf<T extends OptionTable, const P extends string>(table: T, prefix: P): ShapeOf<T, P> {
  const shape: Record<string, z.ZodType> = {};
  for (const { field, kind } of Object.values(table)) {
    const name = field !== false && field?.startsWith(prefix) ? field.slice(prefix.length) : undefined;
    if (name !== undefined && !name.includes('.')) shape[name] = (kind.value ?? kind.schema).optional();
  }
  return shape as ShapeOf<T, P>;
}

/** How a program logs, where `at` is the path of its LogOptions: `log.`. */
export const logOptions = <At extends string>(at: At) =>
  grouped('Log', {
    logLevel: option({
      field: `${at}level` as const,
      kind: oneOf(LOG_LEVELS),
      help: 'least severe level that is logged',
      default: 'info',
      defaultText: 'VLLM_LOGGING_LEVEL, or info',
    }),
    logFormat: option({
      field: `${at}format` as const,
      kind: oneOf(LOG_FORMATS),
      help: 'pretty for people, json for collectors, auto by whether stdout is a terminal',
      default: 'auto',
    }),
  });

export const TRACE_OPTIONS = grouped('Traces', {
  otlpEndpoint: option({
    kind: webUrl(),
    help: 'OpenTelemetry receiver of OTLP over HTTP, whose /v1/traces gets a trace of each request as JSON',
    defaultText: 'OTEL_EXPORTER_OTLP_ENDPOINT, or none',
  }),
});

/** What OpenTelemetry's own variable says, where no option of ours does. */
export function otelLayer(env: Readonly<Record<string, string | undefined>>): OptionLayer[] {
  const name = 'OTEL_EXPORTER_OTLP_ENDPOINT';
  const value = env[name];
  return value ? [{ values: { otlpEndpoint: { value, label: `${name} (environment)` } } }] : [];
}

/** For a program that has its own log: what it should not miss, and nothing else. */
export const QUIET_LOG: LogOptions = { level: 'warn', format: 'auto' };

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
