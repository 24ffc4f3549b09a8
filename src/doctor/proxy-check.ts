/**
 * `--proxy URL`: the runbook's checklist on a running system (docs/operations.md). The proxy answers, both roles are listed, each
 * instance answers, they match, a completion goes to producer then consumer, and its id carries both addresses. It sends one short
 * completion and changes nothing else.
 */
import { withDeadline } from '../deferred.ts';
import { PdError } from '../errors.ts';
import { asDestination, formatHostPort, httpUrl, parseHostPort } from '../net/address.ts';
import { ask, fetchAll, ownKey } from '../net/http.ts';
import { knock } from '../net/knock.ts';
import { reasonOf } from '../net/resolve.ts';
import { plural } from '../observability/bytes.ts';
import { peerAddressOf } from '../wire/ids.ts';
import { type Finding, fail, info, ok, type Section, warn } from './finding.ts';
import { diagnose } from './scenarios.ts';
import { type Metrics, metricsOf, stateOf, workerFindings } from './worker-state.ts';

interface Instance {
  readonly role: 'producer' | 'consumer';
  readonly http_address: string;
  readonly zmq_address: string;
  /** Absent: an older proxy. */
  readonly tls?: boolean;
  readonly model: string | null;
  readonly fingerprint: string | null;
  readonly models?: readonly string[] | null;
  readonly age_seconds?: number;
}

/** A completion may have to wait in a busy system. */
const COMPLETION_FACTOR = 6;
const PROMPT = { prompt: 'Hello world', max_tokens: 10, temperature: 0 };

export async function proxySection(url: string, timeoutMs: number): Promise<Section> {
  const findings: Finding[] = [];
  const base = url.replace(/\/+$/, '');
  try {
    const instances = await listed(base, timeoutMs, findings);
    if (instances) await walk(base, instances, timeoutMs, findings);
  } catch (cause) {
    const { message } = PdError.from(cause);
    findings.push(fail(`the checklist was cut short: ${message}`, "look at the proxy's log, then try again"));
  }
  return { title: `System behind ${base}`, findings };
}

async function listed(base: string, timeoutMs: number, findings: Finding[]): Promise<Instance[] | undefined> {
  let body: { readonly status?: string; readonly instances?: readonly Instance[] };
  try {
    const response = await ask(`${base}/health`, timeoutMs);
    if (!response.ok) {
      const fix =
        "this is not a pd-proxy (vLLM's example proxy lists nothing), or not its HTTP port (10002 in the runbook)";
      findings.push(fail(`${base}/health answers ${response.status}`, fix));
      return undefined;
    }
    body = response.json() as typeof body;
  } catch (cause) {
    const why = reason(cause, timeoutMs);
    findings.push(
      fail(`${base}/health: ${why}`, 'start pd-proxy, or fix the host and HTTP port (10002 in the runbook)'),
    );
    return undefined;
  }
  if (!Array.isArray(body.instances)) {
    const fix = "give the proxy's HTTP port (10002 in the runbook); this looks like a worker";
    findings.push(fail(`${base}/health lists no instances`, fix));
    return undefined;
  }
  findings.push(
    body.status === 'draining'
      ? warn('the proxy answers but is stopping', 'start it again')
      : ok('the proxy answers'),
  );
  return [...body.instances];
}

async function walk(
  base: string,
  instances: Instance[],
  timeoutMs: number,
  findings: Finding[],
): Promise<void> {
  const of = (role: string) => instances.filter((instance) => instance.role === role);
  for (const role of ['producer', 'consumer'] as const) {
    if (of(role).length > 0) continue;
    findings.push(
      fail(
        `no ${role} is listed`,
        `start one: pd-worker --role ${role} --proxy HOST:30002; a running one logs its first ping, or that it cannot reach the proxy`,
      ),
    );
  }
  const names = instances.map(
    ({ role, http_address, zmq_address }) => `${role} ${http_address} (KV ${zmq_address})`,
  );
  if (names.length > 0) {
    findings.push(info(`${plural(names.length, 'instance')} listed: ${names.join(', ')}`));
  }
  findings.push(...(await Promise.all(instances.map((instance) => health(instance, timeoutMs)))));
  findings.push(...pairing(of('producer'), of('consumer')));
  if (findings.some(({ level }) => level === 'fail')) {
    findings.push(info('did not try a completion: it could not succeed'));
    return;
  }
  findings.push(...(await complete(base, instances, timeoutMs)));
}

async function health(instance: Instance, timeoutMs: number): Promise<Finding> {
  const { role, http_address, tls } = instance;
  const what = `${role} ${http_address}`;
  try {
    const { ok: healthy, status, text } = await ask(`${urlOf(instance)}/health`, timeoutMs);
    if (healthy) return ok(`${what} answers /health`);
    const draining = text.includes('draining');
    const fix = draining ? 'it is stopping: start another' : 'look at its log, then restart it';
    return fail(`${what} answers /health with ${status}`, fix);
  } catch (cause) {
    if (tls && isOfTls(cause)) {
      return info(
        `${what} speaks TLS, and cannot be asked from here: ${reasonOf(cause)}. NODE_EXTRA_CA_CERTS names the authority of its certificate; with --tls-client-ca it answers its proxy alone`,
      );
    }
    return fail(
      `${what} pings the proxy but does not answer /health from here: ${reason(cause, timeoutMs)}`,
      'it announces a wrong HTTP address (--http-announce-host), or hangs, or is unreachable from this machine only',
    );
  }
}

/** What the proxy would pair. An instance without a fingerprint (vLLM) is trusted to match. */
function pairing(producers: Instance[], consumers: Instance[]): Finding[] {
  if (producers.length === 0 || consumers.length === 0) return [];
  const label = ({ http_address, model, fingerprint }: Instance) =>
    `${http_address} (${model ?? 'unknown model'}, ${fingerprint?.slice(0, 12) ?? 'no fingerprint'})`;
  const bad: string[] = [];
  let good = 0;
  for (const producer of producers) {
    for (const consumer of consumers) {
      const [a, b] = [producer.fingerprint, consumer.fingerprint];
      if (a === null || b === null || a === b) good++;
      else bad.push(`${label(producer)} and ${label(consumer)}`);
    }
  }
  const fix = 'both ends need the same checkpoint, KV dtype and --block-size: restart one of them';
  if (good === 0) return [fail(`no producer matches a consumer: ${bad.join('; ')}`, fix)];
  if (bad.length > 0) return [warn(`these are never paired: ${bad.join('; ')}`, fix)];
  const unknown = [...producers, ...consumers].some(({ fingerprint }) => fingerprint === null);
  return [ok(unknown ? 'fingerprints match where there are any (vLLM sends none)' : 'fingerprints match')];
}

async function complete(base: string, instances: Instance[], timeoutMs: number): Promise<Finding[]> {
  const models = (await ask(`${base}/v1/models`, timeoutMs, ownKey())).json() as {
    data?: readonly { id: string }[];
  };
  const model = models.data?.[0]?.id ?? instances.flatMap(({ models: ids }) => ids ?? [])[0];
  if (model === undefined)
    return [fail('no instance serves a model', 'look at GET /v1/models of each worker')];
  const before = await allMetrics(instances, timeoutMs);
  const started = performance.now();
  const deadlineMs = timeoutMs * COMPLETION_FACTOR;
  const cancel = new AbortController();
  const request = { json: { model, ...PROMPT }, key: ownKey(), signal: cancel.signal };
  try {
    const response = await withDeadline(fetchAll(`${base}/v1/completions`, request), deadlineMs);
    // Asked before the request is cancelled: after that nothing waits any more.
    if (!response) {
      const what = `a completion: no answer within ${deadlineMs / 1_000} s`;
      return [fail(what, ASK_WORKERS), ...(await askWorkers(instances, timeoutMs))];
    }
    const { status, text } = response;
    if (status !== 200) {
      const { finding, ask: further } = diagnose(status, text);
      if (further === undefined) return [finding];
      const tell = further === 'workers' ? askWorkers : kvAddresses;
      return [finding, ...(await tell(instances, timeoutMs))];
    }
    const { id = '', choices } = JSON.parse(text) as { id?: string; choices?: readonly { text?: string }[] };
    const ms = Math.round(performance.now() - started);
    const answered = ok(`a completion by ${model} in ${ms} ms: ${JSON.stringify(choices?.[0]?.text ?? '')}`);
    const alone = await computedAlone(base, id, timeoutMs);
    if (alone !== undefined) return [answered, alone];
    const after = await allMetrics(instances, timeoutMs);
    const moving = moved(id, instances, before, after);
    return [
      answered,
      ...idFindings(id, instances),
      moving,
      ...(moving.level === 'fail' ? await askWorkers(instances, timeoutMs) : []),
    ];
  } catch (cause) {
    return [
      fail(`a completion: ${reasonOf(cause)}`, ASK_WORKERS),
      ...(await askWorkers(instances, timeoutMs)),
    ];
  } finally {
    cancel.abort();
  }
}

const ASK_WORKERS =
  'pd-doctor --worker with the HTTP address of each worker says what waits, and for which peer (--debug-state)';

/** What the workers themselves report as wrong; nothing from those that refuse to answer from here (`--debug-state`). */
async function askWorkers(instances: Instance[], timeoutMs: number): Promise<Finding[]> {
  const asked = await Promise.all(
    instances.map(async (instance) => {
      const { role, http_address } = instance;
      const state = await stateOf(urlOf(instance), timeoutMs);
      if ('level' in state) return [];
      const findings = workerFindings(state, new Map()).filter(({ level }) => level === 'fail');
      return findings.map((finding) => ({ ...finding, what: `${role} ${http_address}: ${finding.what}` }));
    }),
  );
  return asked.flat();
}

/** Whether each end can be reached, from here, at the KV address that it announces. */
async function kvAddresses(instances: Instance[], timeoutMs: number): Promise<Finding[]> {
  return await Promise.all(
    instances.map(async ({ role, http_address, zmq_address }) => {
      const port = await knock(parseHostPort(zmq_address), timeoutMs);
      const what = `${role} ${http_address} announces the KV address ${zmq_address}`;
      if (port === 'answers') return info(`${what}: reachable from here`);
      return warn(
        `${what}: from here it ${port === 'refuses' ? 'refuses connections' : 'does not answer'}`,
        'if it is wrong, fix --kv-announce-host, --kv-host, --kv-port or PD_HOST_IP of that worker',
      );
    }),
  );
}

/** That the proxy asked its consumer alone, as its receipt says; undefined where it did not, or keeps none. */
async function computedAlone(base: string, id: string, timeoutMs: number): Promise<Finding | undefined> {
  if (peerAddressOf(id, 'prefill')) return undefined;
  const receipt = await ask(`${base}/v1/requests/${encodeURIComponent(id)}/route`, timeoutMs, ownKey());
  if (!receipt.ok) return undefined;
  const { attempts } = receipt.json() as {
    readonly attempts?: readonly {
      readonly alone: boolean;
      readonly consumer: { readonly http_address: string };
    }[];
  };
  const last = attempts?.at(-1);
  if (!last?.alone) return undefined;
  const { http_address } = last.consumer;
  return info(
    `consumer ${http_address} computed it alone (--bypass-tokens or --bypass-wait of the proxy): this says nothing of the producer, and whether KV moves`,
  );
}

function idFindings(id: string, instances: Instance[]): Finding[] {
  const parts = (['prefill', 'decode'] as const).map((side) => {
    const address = peerAddressOf(id, side);
    const role = side === 'prefill' ? 'producer' : 'consumer';
    const text = address && formatHostPort(address);
    return { role, text, known: instances.some((i) => i.role === role && i.zmq_address === text) };
  });
  if (parts.every(({ known }) => known)) {
    return [
      ok(
        `it went to producer ${parts[0]!.text}, then consumer ${parts[1]!.text}: the response id carries both`,
      ),
    ];
  }
  const missing = parts.filter(({ known }) => !known).map(({ role }) => role);
  return [
    fail(
      `the response id ${id} does not carry the KV address of a listed ${missing.join(' or ')}`,
      'the proxy must send its id as X-Request-Id and the servers must keep it: is anything else between them?',
    ),
  ];
}

/** Whether the consumer loaded the prompt's KV or computed it. Other requests may run too: counters rise by at least this one. */
function moved(
  id: string,
  instances: Instance[],
  before: ReadonlyMap<string, Metrics>,
  after: ReadonlyMap<string, Metrics>,
): Finding {
  const decode = peerAddressOf(id, 'decode');
  const consumer = instances.find(({ zmq_address }) => decode && zmq_address === formatHostPort(decode));
  const [old, now] = [before, after].map((all) => consumer && all.get(consumer.http_address));
  if (!consumer || !old || !now?.has('pd_kv_received_bytes_total')) {
    return info(
      'cannot tell whether KV moved: the consumer does not export the metrics of a pd-worker (vLLM), or not to here',
    );
  }
  const rise = (name: string) => (now.get(name) ?? 0) - (old.get(name) ?? 0);
  const bytes = rise('pd_kv_received_bytes_total').toLocaleString('en');
  if (rise('pd_kv_loads_total{result="ok"}') > 0)
    return ok(`its KV moved: ${bytes} bytes came from the producer`);
  return fail(
    'its KV did not move: the consumer computed the prompt itself, so prefill was paid for twice',
    `${ASK_WORKERS}; --kv-load-failure fail makes it an error; the log of consumer ${consumer.http_address} and of the producer for this id`,
  );
}

async function allMetrics(instances: Instance[], timeoutMs: number): Promise<ReadonlyMap<string, Metrics>> {
  const entries = instances.map(async (instance) => {
    return [instance.http_address, await metricsOf(`${urlOf(instance)}/metrics`, timeoutMs)] as const;
  });
  return new Map(await Promise.all(entries));
}

function urlOf({ http_address, tls }: Instance): string {
  return httpUrl(asDestination(parseHostPort(http_address)), tls);
}

/** Something answers there, but no connection comes about: a certificate that is not trusted here, or one of ours that is missing. */
function isOfTls(cause: unknown): boolean {
  const { code = '' } = cause as NodeJS.ErrnoException;
  return code === 'ECONNRESET' || /CERT|VERIFY|SSL/.test(code);
}

function reason(cause: unknown, timeoutMs: number): string {
  const timedOut = cause instanceof Error && cause.name === 'TimeoutError';
  return timedOut ? `no answer within ${timeoutMs / 1_000} s` : reasonOf(cause);
}
