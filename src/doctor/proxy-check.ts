/**
 * `--proxy URL`: the runbook's checklist on a running system (docs/operations.md). The proxy answers, two servers show up, each answers,
 * they fit, a completion goes producer then consumer, and its id carries both addresses. One short completion is all that it adds.
 */
import { PdError } from '../errors.ts';
import { asDestination, formatHostPort, parseHostPort } from '../net/address.ts';
import { ask, fetchAll } from '../net/http.ts';
import { knock } from '../net/knock.ts';
import { reasonOf } from '../net/resolve.ts';
import { plural } from '../observability/bytes.ts';
import { peerAddressOf } from '../wire/ids.ts';
import { type Finding, fail, info, ok, type Section, warn } from './finding.ts';
import { type Metrics, metricsOf, rise } from './metrics.ts';
import { diagnose } from './scenarios.ts';
import { stateOf, workerFindings } from './worker-state.ts';

interface Instance {
  readonly role: 'producer' | 'consumer';
  readonly http_address: string;
  readonly zmq_address: string;
  readonly model: string | null;
  readonly fingerprint: string | null;
  readonly models?: readonly string[] | null;
  readonly age_seconds?: number;
}

/** A completion may wait for a busy system. */
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
    findings.push(
      fail(`the checklist broke off: ${message}`, 'look at the log of the proxy, then try again'),
    );
  }
  return { title: `System behind ${base}`, findings };
}

async function listed(base: string, timeoutMs: number, findings: Finding[]): Promise<Instance[] | undefined> {
  let body: { readonly status?: string; readonly instances?: readonly Instance[] };
  try {
    const response = await ask(`${base}/health`, timeoutMs);
    if (!response.ok) {
      const mend =
        "this is no pd-proxy (vLLM's example proxy lists nothing), or not its HTTP port: 10002 in the runbook";
      findings.push(fail(`${base}/health answers ${response.status}`, mend));
      return undefined;
    }
    body = response.json() as typeof body;
  } catch (cause) {
    const why = reason(cause, timeoutMs);
    findings.push(
      fail(`${base}/health: ${why}`, 'start pd-proxy, or correct host and HTTP port (10002 in the runbook)'),
    );
    return undefined;
  }
  if (!Array.isArray(body.instances)) {
    const mend = "name the proxy's HTTP port (10002 in the runbook); this looks like a worker";
    findings.push(fail(`${base}/health lists no instances`, mend));
    return undefined;
  }
  findings.push(
    body.status === 'draining'
      ? warn('the proxy answers, and is stopping', 'start it again')
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
        `no ${role} shows up`,
        `start one: pd-worker --role ${role} --proxy HOST:30002; one that runs logs its first ping, or that the proxy cannot be reached`,
      ),
    );
  }
  const names = instances.map(
    ({ role, http_address, zmq_address }) => `${role} ${http_address} (KV ${zmq_address})`,
  );
  if (names.length > 0) {
    const show = `${plural(names.length, 'instance')} ${names.length === 1 ? 'shows' : 'show'} up`;
    findings.push(info(`${show}: ${names.join(', ')}`));
  }
  findings.push(...(await Promise.all(instances.map((instance) => health(instance, timeoutMs)))));
  findings.push(...pairing(of('producer'), of('consumer')));
  if (findings.some(({ level }) => level === 'fail')) {
    findings.push(info('no completion was tried: it could not succeed'));
    return;
  }
  findings.push(...(await complete(base, instances, timeoutMs)));
}

async function health({ role, http_address }: Instance, timeoutMs: number): Promise<Finding> {
  const what = `${role} ${http_address}`;
  try {
    const { ok: healthy, status, text } = await ask(`${urlOf(http_address)}/health`, timeoutMs);
    if (healthy) return ok(`${what} answers /health`);
    const draining = text.includes('draining');
    const mend = draining ? 'it is stopping: start another' : 'look at its log; start it again';
    return fail(`${what} answers /health with ${status}`, mend);
  } catch (cause) {
    return fail(
      `${what} pings the proxy, and does not answer /health from here: ${reason(cause, timeoutMs)}`,
      'it tells others a wrong HTTP address (--http-announce-host), or hangs, or only this machine does not reach it',
    );
  }
}

/** What the proxy would pair. An instance without a fingerprint (vLLM) is taken on trust. */
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
  const mend = 'both ends need the same checkpoint, KV dtype and --block-size: restart one of them';
  if (good === 0) return [fail(`no producer fits a consumer: ${bad.join('; ')}`, mend)];
  if (bad.length > 0) return [warn(`these are never paired: ${bad.join('; ')}`, mend)];
  const unknown = [...producers, ...consumers].some(({ fingerprint }) => fingerprint === null);
  return [
    ok(unknown ? 'instances fit, as far as they say (vLLM says nothing of its model)' : 'fingerprints fit'),
  ];
}

async function complete(base: string, instances: Instance[], timeoutMs: number): Promise<Finding[]> {
  const models = (await ask(`${base}/v1/models`, timeoutMs)).json() as {
    data?: readonly { id: string }[];
  };
  const model = models.data?.[0]?.id ?? instances.flatMap(({ models: ids }) => ids ?? [])[0];
  if (model === undefined)
    return [fail('no instance serves a model', 'look at GET /v1/models of each worker')];
  const before = await allMetrics(instances, timeoutMs);
  const started = performance.now();
  const answer = post(`${base}/v1/completions`, { model, ...PROMPT });
  let timer: NodeJS.Timeout | undefined;
  const late = new Promise<'late'>((resolve) => {
    timer = setTimeout(() => resolve('late'), timeoutMs * COMPLETION_FACTOR);
  });
  try {
    const response = await Promise.race([answer.whole, late]);
    // Before it is given up, because then nobody waits any more.
    if (response === 'late') {
      const what = `a completion: no answer within ${(timeoutMs * COMPLETION_FACTOR) / 1_000} s`;
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
    const after = await allMetrics(instances, timeoutMs);
    const moving = moved(id, instances, before, after);
    return [
      ok(`a completion by ${model} in ${ms} ms: ${JSON.stringify(choices?.[0]?.text ?? '')}`),
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
    clearTimeout(timer);
    answer.giveUp();
  }
}

const ASK_WORKERS =
  'pd-doctor --worker with the HTTP address of each worker says what waits, and for which peer (--debug-state)';

function post(
  url: string,
  body: object,
): { readonly whole: Promise<{ readonly status: number; readonly text: string }>; giveUp(): void } {
  const gone = new AbortController();
  const whole = fetchAll(url, { json: body, signal: gone.signal });
  whole.catch(() => {}); // given up: nobody asks any more
  return { whole, giveUp: () => gone.abort() };
}

/** What is wrong by what the workers themselves know; nothing of those that may not be asked from here (`--debug-state`). */
async function askWorkers(instances: Instance[], timeoutMs: number): Promise<Finding[]> {
  const asked = await Promise.all(
    instances.map(async ({ role, http_address }) => {
      const state = await stateOf(urlOf(http_address), timeoutMs);
      if ('level' in state) return [];
      const findings = workerFindings(state, new Map()).filter(({ level }) => level === 'fail');
      return findings.map((finding) => ({ ...finding, what: `${role} ${http_address}: ${finding.what}` }));
    }),
  );
  return asked.flat();
}

/** Whether each end is reached, from here, at the KV address that it tells others. */
async function kvAddresses(instances: Instance[], timeoutMs: number): Promise<Finding[]> {
  const tried = await Promise.all(
    instances.map(async ({ role, http_address, zmq_address }) => {
      const port = await knock(parseHostPort(zmq_address), timeoutMs);
      const what = `${role} ${http_address} tells others the KV address ${zmq_address}`;
      if (port === 'answers') return info(`${what}: reached from here`);
      return warn(
        `${what}: from here it ${port === 'refuses' ? 'refuses connections' : 'does not answer'}`,
        'if it is wrong, correct --kv-announce-host, --kv-host, --kv-port or PD_HOST_IP of that worker',
      );
    }),
  );
  return tried;
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
      ok(`it went producer ${parts[0]!.text}, then consumer ${parts[1]!.text}: the response id carries both`),
    ];
  }
  const missing = parts.filter(({ known }) => !known).map(({ role }) => role);
  return [
    fail(
      `the response id ${id} carries no KV address of a listed ${missing.join(' or ')}`,
      'the proxy must send its id as X-Request-Id and the servers must keep it: is something between them?',
    ),
  ];
}

/** Whether the consumer loaded the prompt's KV, or computed it itself. Other requests may run beside: counters rise at least so much. */
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
    return info('whether KV moved cannot be told: the consumer has no metrics of ours (vLLM)');
  }
  const loads = rise(old, now, 'pd_kv_loads_total{result="ok"}');
  const bytes = rise(old, now, 'pd_kv_received_bytes_total');
  if (loads > 0) return ok(`its KV moved: ${bytes.toLocaleString('en')} bytes came from the producer`);
  return fail(
    'its KV did not move: the consumer computed the prompt itself, so the text came at twice the cost',
    `${ASK_WORKERS}; --kv-load-failure fail makes it an error; the log of consumer ${consumer.http_address} and of the producer for this id`,
  );
}

async function allMetrics(instances: Instance[], timeoutMs: number): Promise<ReadonlyMap<string, Metrics>> {
  const entries = instances.map(async ({ http_address }) => {
    return [http_address, await metricsOf(`${urlOf(http_address)}/metrics`, timeoutMs)] as const;
  });
  return new Map(await Promise.all(entries));
}

const urlOf = (address: string) => `http://${formatHostPort(asDestination(parseHostPort(address)))}`;

function reason(cause: unknown, timeoutMs: number): string {
  const timedOut = cause instanceof Error && cause.name === 'TimeoutError';
  return timedOut ? `no answer within ${timeoutMs / 1_000} s` : reasonOf(cause);
}
