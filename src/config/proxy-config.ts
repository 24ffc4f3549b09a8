/** The configuration of a proxy: its options, one table for flags, environment, config file and what programs give in code. */

import type { HostPort } from '../net/address.ts';
import type { EtcdAddress } from '../net/etcd.ts';
import type { LogOptions } from '../observability/log-options.ts';
import { z } from '../zod.ts';
import { ACCESS_OPTIONS, type AccessConfig } from './access-options.ts';
import {
  checkInput,
  fieldsOf,
  logOptions,
  QUIET_LOG,
  shapeOf,
  type TableOf,
  TRACE_OPTIONS,
  withoutUndefined,
} from './fields.ts';
import {
  type Address,
  address,
  addressRange,
  duration,
  etcdAddress,
  integer,
  listOf,
  type NamedInstance,
  namedInstance,
  oneOf,
  port,
  text,
  toggle,
} from './kinds.ts';
import { defaultsOf, defineOptions, grouped, option, type ValuesOf } from './options.ts';

export const POLICIES = ['auto', 'round-robin', 'least-loaded', 'session', 'kv-aware'] as const;
/** How an instance is chosen for a request (docs/routing.md). `auto`: kv-aware among pd-workers, else round-robin. */
export type Policy = (typeof POLICIES)[number];

const UI_AUDIENCES = ['local', 'open', 'off'] as const;
/** `local`: clients on this machine; `open`: everyone; `off`: nobody, with keys too. */
export type UiAudience = (typeof UI_AUDIENCES)[number];

/** What the proxy shows to instances, and what they must show. Paths of files. */
export interface UpstreamAccess {
  /** The first of its keys that has not expired goes with every request, in place of the client's. */
  readonly keyFile?: string;
  /** Authorities of the instances' certificates (PEM). Given: an instance without TLS is not taken. Absent: those that Node trusts. */
  readonly ca?: string;
  /** The name that their certificates must carry. Absent: the host that each announces. */
  readonly tlsName?: string;
  /** A certificate for instances that ask for one, and its key (PEM). */
  readonly cert?: string;
  readonly key?: string;
}

export interface ProxyConfig {
  readonly http: HostPort;
  readonly discovery: HostPort;
  readonly access: AccessConfig;
  /** How instances are reached. Absent: over plain HTTP, with what the client shows. */
  readonly upstream?: UpstreamAccess;
  /** Addresses and CIDR ranges whose pings are taken. Absent: everyone's. */
  readonly allowInstances?: readonly string[];
  /** Instances that need not ping: asked again and again, and taken for as long as they answer. */
  readonly instances: readonly NamedInstance[];
  /** etcd, whose instances are taken too. */
  readonly registry?: EtcdAddress;
  /** An instance whose last ping is older than this is removed. */
  readonly instanceTimeoutMs: number;
  /** For the prefill request, headers to end of body. */
  readonly prefillTimeoutMs: number;
  /** Between two chunks of the decode instance's answer. */
  readonly decodeIdleTimeoutMs: number;
  /** Most requests in prefill at a producer for which the consumer is asked at the same time; 0: always in turn. */
  readonly overlap: number;
  readonly policy: Policy;
  /** For producers and for consumers, where it is another. */
  readonly prefillPolicy?: Policy;
  readonly decodePolicy?: Policy;
  /**
   * Directory of the checkpoint that the workers serve, for its tokenizer: weights need not be there. Workers with another one get text.
   * Absent: prompts are placed by their text.
   */
  readonly tokenizer?: string;
  /** Header that names the session of a request; without it the body's `user` does. Lower case. */
  readonly sessionHeader: string;
  /** A prompt of which at most so many tokens are not cached on its consumer goes to that alone; 0: none does. */
  readonly bypassTokens: number;
  /**
   * A prompt before which its producer would compute longer goes to its consumer alone, where that would have it sooner. 0: none does.
   */
  readonly bypassWaitMs: number;
  /** Requests under way at most; 0: any number. */
  readonly maxRunning: number;
  /** Prompt tokens of requests under way at most, about; 0: any number. */
  readonly maxRunningTokens: number;
  /** Requests that wait for their turn at most. */
  readonly maxQueued: number;
  /** For that turn to come. */
  readonly queueTimeoutMs: number;
  /** Between two looks at each instance's GET /health; 0: none. */
  readonly healthIntervalMs: number;
  readonly drainTimeoutMs: number;
  /** Processes that relay; with more than one, another that owns what they share. */
  readonly workers: number;
  /** GET /debug/state is answered, to clients on this machine. */
  readonly debugState: boolean;
  /** Who sees the page at /ui, where no keys are asked for; with keys, those who hold an admin key. */
  readonly ui: UiAudience;
  readonly log: LogOptions;
  /** Base URL of the OTLP receiver that gets traces. Absent: none are made. */
  readonly otlpEndpoint?: string;
}

/** A new option is a row here and its field above. */
export const PROXY_OPTIONS = defineOptions({
  host: option({ field: false, kind: text('address'), help: 'address to listen on', default: '0.0.0.0' }),
  port: option({ field: false, kind: port(), help: 'HTTP port for clients', default: 10_002 }),
  discoveryHost: option({
    field: false,
    kind: text('address'),
    help: 'address to listen on for pings',
    defaultText: 'that of --host',
  }),
  discoveryPort: option({
    field: false,
    kind: port(),
    help: 'port that instances ping (ZeroMQ)',
    default: 30_002,
  }),
  allowInstances: option({
    kind: listOf(addressRange()),
    help: 'whose pings are taken: addresses, or ranges such as 10.0.0.0/8',
    defaultText: "everyone's",
  }),
  ...ACCESS_OPTIONS,
  ...grouped('Instances', {
    instances: option({
      kind: listOf(namedInstance()),
      help:
        'instances that need not ping: HOST:PORT of the HTTP server of a pd-worker (of a name, all its addresses), or of a vLLM worker ' +
        'producer=HOST:PORT/KV_HOST:KV_PORT or consumer=...; https:// before HOST for TLS',
      default: [],
      defaultText: 'those that ping',
    }),
    registry: option({
      kind: etcdAddress(),
      help: 'etcd in which instances register: etcd://host:2379/prefix',
      defaultText: 'none',
    }),
    workerKeyFile: option({
      field: 'upstream.keyFile',
      kind: text('file'),
      help: "key to show to instances, in the form of --api-key-file; a client's own key never reaches them",
      defaultText: 'none',
    }),
    workerCa: option({
      field: 'upstream.ca',
      kind: text('file'),
      help: 'authorities of their certificates (PEM); with it only instances with TLS are taken',
      defaultText: 'those that Node trusts',
    }),
    workerTlsName: option({
      field: 'upstream.tlsName',
      kind: text('name'),
      help: 'name that their certificates must carry',
      defaultText: 'the host that each announces',
    }),
    workerTlsCert: option({
      field: 'upstream.cert',
      kind: text('file'),
      help: 'certificate for instances that ask for one (PEM)',
    }),
    workerTlsKey: option({ field: 'upstream.key', kind: text('file'), help: 'its private key (PEM)' }),
  }),
  instanceTimeout: option({
    field: 'instanceTimeoutMs',
    kind: duration(10),
    help: 'an instance whose last ping, or answer, is older is removed',
    default: 10_000,
  }),
  prefillTimeout: option({
    field: 'prefillTimeoutMs',
    kind: duration(1),
    help: "for the producer's whole answer",
    default: 600_000,
  }),
  decodeIdleTimeout: option({
    field: 'decodeIdleTimeoutMs',
    kind: duration(1),
    help: "to the first part of the consumer's answer, and from one part to the next",
    default: 600_000,
  }),
  overlap: option({
    kind: integer(0, 1_024),
    help: 'the consumer is asked at once while the producer has at most so many requests of this proxy; 0: always in turn',
    default: 4,
  }),
  ...grouped('Routing', {
    policy: option({
      kind: oneOf(POLICIES),
      help: 'how instances are chosen; auto: kv-aware among pd-workers, round-robin where there is a vLLM worker',
      default: 'auto',
    }),
    prefillPolicy: option({
      kind: oneOf(POLICIES),
      help: 'how producers are chosen',
      defaultText: 'as --policy',
    }),
    decodePolicy: option({
      kind: oneOf(POLICIES),
      help: 'how consumers are chosen',
      defaultText: 'as --policy',
    }),
    tokenizer: option({
      kind: text('dir'),
      help: 'checkpoint directory whose tokenizer the workers use: prompts are placed by their token ids, which is exact',
      defaultText: 'prompts are placed by their text',
    }),
    sessionHeader: option({
      kind: text('name'),
      help: "header that names a request's session for the policy `session`; without it the body's `user` does",
      default: 'x-session-id',
    }),
    bypassTokens: option({
      kind: integer(0, 2 ** 20),
      help: 'a prompt of which at most so many tokens are not cached on its consumer goes to that alone; 0: none does',
      default: 0,
    }),
    bypassWait: option({
      field: 'bypassWaitMs',
      kind: duration(0),
      help: 'a prompt that would wait longer at its producer goes to its consumer alone, where that has it sooner; 0: none does',
      default: 0,
    }),
  }),
  ...grouped('Limits', {
    maxRunning: option({
      kind: integer(0, 2 ** 20),
      help: 'most requests under way; 0: any number',
      default: 0,
    }),
    maxRunningTokens: option({
      kind: integer(0, 2 ** 40),
      help: 'most prompt tokens of requests under way, about; 0: any number',
      default: 0,
    }),
    maxQueued: option({
      kind: integer(0, 2 ** 20),
      help: 'most requests that wait for their turn; others are answered 429',
      default: 256,
    }),
    queueTimeout: option({
      field: 'queueTimeoutMs',
      kind: duration(1),
      help: 'for that turn to come; then 429',
      default: 30_000,
    }),
  }),
  healthInterval: option({
    field: 'healthIntervalMs',
    kind: duration(0),
    help: "between two looks at each instance's GET /health; 0: none",
    default: 5_000,
  }),
  drainTimeout: option({
    field: 'drainTimeoutMs',
    kind: duration(0),
    help: 'after SIGTERM, for requests under way',
    default: 30_000,
  }),
  workers: option({
    kind: integer(1, 64),
    help: 'processes that relay, for more requests than one core can; with more than one, another places requests for all of them',
    default: 1,
  }),
  debugState: option({
    kind: toggle(),
    help: 'answer GET /debug/state to clients on this machine',
    default: false,
  }),
  ui: option({
    kind: oneOf(UI_AUDIENCES),
    help: 'the page at /ui: for clients on this machine (with --api-key-file, for admin keys from anywhere), for everyone, or not at all',
    default: 'local',
  }),
  ...logOptions('log.'),
  ...TRACE_OPTIONS,
  config: option({ field: false, kind: text('file'), help: 'JSON file with any of these options' }),
}) satisfies TableOf<ProxyConfig>;

export function toProxyConfig(values: ValuesOf<typeof PROXY_OPTIONS>): ProxyConfig {
  return {
    ...fieldsOf(PROXY_OPTIONS, values),
    http: { host: values.host, port: values.port },
    discovery: { host: values.discoveryHost ?? values.host, port: values.discoveryPort },
  };
}

/** `ProxyConfig` with every field optional. */
export interface ProxyConfigInput
  extends Partial<Omit<ProxyConfig, 'http' | 'discovery' | 'access' | 'upstream' | 'log'>> {
  /** Where clients connect. `127.0.0.1:0`: this machine only, any free port. */
  readonly http?: Address;
  /** Where instances ping. `127.0.0.1:0`. */
  readonly discovery?: Address;
  readonly access?: Partial<AccessConfig>;
  readonly upstream?: UpstreamAccess;
  readonly log?: Partial<LogOptions>;
}

const LOOPBACK = { host: '127.0.0.1', port: 0 };

const INPUT = z.strictObject({
  ...shapeOf(PROXY_OPTIONS, ''),
  http: address.default(LOOPBACK),
  discovery: address.default(LOOPBACK),
  access: z.strictObject(shapeOf(PROXY_OPTIONS, 'access.')).default({}),
  upstream: z.strictObject(shapeOf(PROXY_OPTIONS, 'upstream.')).optional(),
  log: z.strictObject(shapeOf(PROXY_OPTIONS, 'log.')).default({}),
} satisfies Record<keyof ProxyConfigInput, z.ZodType>);

/**
 * A complete proxy configuration from a few fields. Defaults are those of `pd-proxy --help`, but for what it binds (loopback, any free
 * port: `PdProxy.httpAddress` and `discoveryAddress` tell) and for the log (warnings alone). Throws CONFIG_INVALID that names the field.
 */
export function proxyConfig(input: ProxyConfigInput = {}): ProxyConfig {
  const { access, upstream, log, ...given } = checkInput(INPUT, input, 'proxy configuration');
  const defaults = toProxyConfig(defaultsOf(PROXY_OPTIONS));
  return {
    ...defaults,
    ...given,
    access: { ...defaults.access, ...withoutUndefined(access) },
    ...(upstream && { upstream: withoutUndefined(upstream) }),
    log: { ...QUIET_LOG, ...withoutUndefined(log) },
  };
}
