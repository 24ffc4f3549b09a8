/**
 * `--worker URL`: what a running worker reports about its waits (GET /debug/state, /metrics), and which of the runbook's hang scenarios
 * that is. It asks nothing of any other process, so it works on a system that hangs.
 */
import { ask, ownKey } from '../net/http.ts';
import { reasonOf } from '../net/resolve.ts';
import { plural } from '../observability/bytes.ts';
import type { FailureKind, FailureState } from '../transfer/failures.ts';
import type { PathState } from '../transfer/native/hand-over-api.ts';
import type { PairState, TransferState } from '../transfer/types.ts';
import type { CoreState } from '../worker/core-messages.ts';
import { type Finding, fail, info, ok, type Section, warn } from './finding.ts';
import {
  type Diagnosis,
  idsDiffer,
  NO_ROOM,
  PAIR_INIT,
  scenarioOf,
  transfer,
  unreached,
} from './scenarios.ts';

/** Samples of a /metrics page: `name{labels}` -> value, without the label model_name. */
export type Metrics = ReadonlyMap<string, number>;

/** The answer to GET /debug/state. */
export interface WorkerState {
  readonly role: string;
  readonly requests: number;
  readonly core: CoreState;
}

/** A step that takes longer than this is reported. */
const SLOW_MS = 2_000;
const NEARLY_FULL = 0.95;
/** A failure older than this that was not retried since is information only. */
const LONG_AGO_MS = 600_000;
const MOST_WAITS = 8;

export async function workerSection(url: string, timeoutMs: number): Promise<Section> {
  const base = url.replace(/\/+$/, '');
  const title = `Worker ${base}`;
  const state = await stateOf(base, timeoutMs, ownKey());
  if ('level' in state) return { title, findings: [state] };
  return { title, findings: workerFindings(state, await metricsOf(`${base}/metrics`, timeoutMs)) };
}

/** Empty if the page cannot be read. */
export async function metricsOf(url: string, timeoutMs: number): Promise<Metrics> {
  return await ask(url, timeoutMs).then(
    ({ text }) => parseMetrics(text),
    () => new Map(),
  );
}

export function parseMetrics(page: string): Metrics {
  const metrics = new Map<string, number>();
  for (const line of page.split('\n')) {
    const match = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)$/.exec(line);
    if (!match) continue;
    const labels = (match[2] ?? '').replace(/model_name="[^"]*",?/, '').replace(/,$/, '');
    metrics.set(labels === '' ? match[1]! : `${match[1]}{${labels}}`, Number(match[3]));
  }
  return metrics;
}

/** What a worker reports about itself, or why it reports nothing. */
export async function stateOf(base: string, timeoutMs: number, key?: string): Promise<WorkerState | Finding> {
  try {
    const response = await ask(`${base}/debug/state`, timeoutMs, key);
    if (!response.ok) return refused(response.status);
    const state = response.json() as WorkerState;
    const { core } = state;
    if (typeof core !== 'object') {
      return fail('GET /debug/state is not answered by a pd-worker', "give a worker's HTTP port");
    }
    const { transfer } = core;
    return transfer ? { ...state, core: { ...core, transfer: { ...ADDED_LATER, ...transfer } } } : state;
  } catch (cause) {
    const fix =
      'fix the host and HTTP port (8081 and 8083 in the runbook); restart a worker that hangs altogether';
    return fail(`GET /debug/state: ${reasonOf(cause)}`, fix);
  }
}

/** Fields that an older worker does not send. */
const ADDED_LATER = { kvKey: 'transfer', failures: [] } satisfies Partial<TransferState>;

/** Pure. One `fail` for each wait that will end at its deadline unless something changes. */
export function workerFindings({ role, requests, core }: WorkerState, metrics: Metrics): Finding[] {
  const { running, waiting, loading, blocks, transfer } = core;
  const findings: Finding[] = [
    info(
      `${role}: ${plural(requests, 'request')} in flight, ${running} running, ${waiting} waiting, ${loading} loading; ` +
        `${blocks.used} of ${blocks.total} blocks used`,
    ),
  ];
  for (const wrong of core.integrity ?? [])
    findings.push(fail(`integrity check: ${wrong}`, 'this is a bug: please report it'));
  if (!transfer) return [...findings, info('no transfer engine: this worker does prefill and decode itself')];
  findings.push(...memoryFindings(role, transfer, metrics));
  findings.push(...nativeFindings(core.handOver));
  const explained = new Set<PairState | FailureState>();
  for (const wait of transfer.waiting.slice(0, MOST_WAITS))
    findings.push(waitFinding(wait, transfer, explained));
  if (transfer.waiting.length > MOST_WAITS) {
    findings.push(info(`${transfer.waiting.length - MOST_WAITS} more wait for KV`));
  }
  for (const pair of transfer.pairs) if (!explained.has(pair)) findings.push(...pairFindings(pair));
  findings.push(...failureFindings(transfer.failures.filter((failure) => !explained.has(failure))));
  if (!findings.some(({ level }) => level === 'fail')) findings.push(calm(transfer.waiting));
  return findings;
}

/** How KV comes from each producer and why, and how fast it gets to each consumer by `direct`. */
function nativeFindings(handOver: CoreState['handOver']): Finding[] {
  const producers = handOver?.producers ?? [];
  const ways = producers.map(({ peer, transport, fallback }) => {
    const why = fallback ? `, not direct: ${fallback.why}` : '';
    return info(`KV from ${peer} is handed over natively, by ${transport ?? 'a way not yet found'}${why}`);
  });
  // an older worker tells no mappings
  const paths = (handOver?.mappings ?? []).flatMap(({ peer, path }) =>
    path ? [pathFinding(peer, path)] : [],
  );
  return [...ways, ...paths];
}

function pathFinding(peer: string, path: PathState): Finding {
  const what = `direct writes to ${peer}`;
  if (path.state === 'waiting') return info(`${what}: not measured yet`);
  if (path.state === 'not measured') return info(`${what}: not measured, ${path.why}`);
  const { bytesPerSecond, expectedBytesPerSecond: expected, latencySeconds, link } = path;
  const gb = (rate: number) => `${(rate / 1e9).toFixed(0)} GB/s`;
  const should = expected === undefined ? '' : ` of about ${gb(expected)}`;
  const text = `${what}: ${gb(bytesPerSecond)}${should} over ${link}, ${(latencySeconds * 1_000).toFixed(3)} ms for a block`;
  if (expected === undefined || bytesPerSecond >= expected / 2) return ok(text);
  return warn(
    text,
    'less than half: `nvidia-smi nvlink -s` and `nvidia-smi topo -m`; a busy GPU at its start explains it too',
  );
}

/** No wait is a failure yet. This end cannot know whether the peer is computing or stopped. */
function calm(waiting: readonly Wait[]): Finding {
  if (waiting.length === 0) return ok('nothing waits longer than it should');
  const near = waiting.some(({ sinceMs, deadlineMs }) => sinceMs > deadlineMs / 2);
  const ask = [...new Set(waiting.map(({ peer }) => `\`pd-doctor --peer ${peer}\``))].join(', ');
  return info(`${near ? '' : 'no deadline is near; '}${ask} shows whether the peer still answers`);
}

type Wait = TransferState['waiting'][number];

function waitFinding(wait: Wait, transfer: TransferState, explained: Set<PairState | FailureState>): Finding {
  const { requestId, tensorId, peer, sinceMs, deadlineMs, nearMisses, prefilling } = wait;
  const finding = (text: string, fix: string) =>
    // KV may be slow on a busy system
    sinceMs > Math.min(SLOW_MS, deadlineMs / 2) ? fail(text, fix) : info(text);
  const what = `${requestId} has waited ${seconds(sinceMs)} of ${seconds(deadlineMs)} for ${tensorId} from ${peer}`;
  const pairs = transfer.pairs.filter((pair) => pair.peer === peer);
  if (prefilling) return info(`${what}; its prompt may still be computed there`);
  const stuck = pairs.find((pair) => pair.state === 'opening' || pair.state === 'connecting');
  const open = pairs.find((pair) => pair.state === 'open');
  const differ = idsDiffer(transfer.kvKey, open?.native);
  if (nearMisses.length > 0) {
    return finding(`${what}; what came instead: ${nearMisses.join(', ')}`, differ.fix);
  }
  if (stuck) {
    explained.add(stuck);
    return finding(
      `${what}; the pair has been ${stuck.state} for ${seconds(stuck.sinceMs)}`,
      (stuck.state === 'opening' ? PAIR_INIT : unreached(peer)).fix,
    );
  }
  if (!open) {
    const none =
      transfer.sendType === 'GET' ? 'there is no pair with it' : 'it has not opened a pair with this worker';
    const broke = transfer.failures.find((one) => one.kind === 'pair' && one.peer === peer && !one.recovered);
    const why = broke && scenarioOf(broke.error);
    if (broke && why) {
      explained.add(broke);
      return finding(
        `${what}; ${none}, the last one failed ${seconds(broke.agoMs)} ago: ${broke.error.message}`,
        why.fix,
      );
    }
    // In PUT it is the producer that must reach this end.
    return finding(`${what}; ${none}`, unreached(transfer.sendType === 'GET' ? peer : transfer.address).fix);
  }
  explained.add(open);
  // In GET a tensor that was asked for and is not there yet counts as outstanding too.
  const asked = transfer.sendType === 'GET' && open.queued === 0;
  if (open.outstanding + open.queued > 0 && !asked) {
    const amount = `${open.outstanding} operations in flight and ${open.queued} queued`;
    return finding(`${what}; the pair is open with ${amount}`, STUCK.fix);
  }
  return finding(
    `${what}; the pair is open${asked ? '' : ' and idle'}, and nothing under a similar id is ${asked ? 'there' : 'here'}`,
    `the producer has not sent it: pd-doctor --worker with its HTTP address; otherwise ${differ.fix}`,
  );
}

function pairFindings({ peer, direction, state, queued, outstanding, sinceMs }: PairState): Finding[] {
  const what = `pair with ${peer} (${direction}): ${state} for ${seconds(sinceMs)}, ${queued} queued, ${outstanding} outstanding`;
  switch (state) {
    case 'connecting':
      return [sinceMs > SLOW_MS ? fail(what, unreached(peer).fix) : info(what)];
    case 'opening':
      return [sinceMs > SLOW_MS ? fail(what, PAIR_INIT.fix) : info(what)];
    case 'over':
      return [queued > 0 ? fail(what, unreached(peer).fix) : info(what)];
    // open, or what another version calls its pairs
    default:
      return [info(what)];
  }
}

const FAILED: Readonly<Record<FailureKind, (peer: string) => string>> = {
  load: (peer) => `KV from ${peer} did not arrive`,
  send: (peer) => `KV for ${peer} could not be sent`,
  refused: (peer) => `KV from ${peer} was refused here`,
  pair: (peer) => `a pair with ${peer} could not be opened or broke`,
};

/** What failed and has not succeeded since: the newest for each peer and scenario. */
function failureFindings(failures: TransferState['failures']): Finding[] {
  const seen = new Set<string>();
  return failures.flatMap(({ kind, peer, error, count, agoMs, recovered }: FailureState): Finding[] => {
    const found: Diagnosis | undefined = scenarioOf(error);
    const key = `${peer} ${found?.scenario ?? error.code}`;
    if (recovered || seen.has(key)) return [];
    seen.add(key);
    const times = count > 1 ? `, ${count} times` : '';
    const what = `${FAILED[kind](peer)}${times}, last ${seconds(agoMs)} ago: ${error.code}: ${error.message}`;
    return [agoMs > LONG_AGO_MS ? info(what) : fail(what, found?.fix ?? 'look at the logs of both ends')];
  });
}

function memoryFindings(
  role: string,
  { buffer, pool, tensors, sendType }: TransferState,
  metrics: Metrics,
): Finding[] {
  const refused = metrics.get('pd_kv_refused_total') ?? 0;
  const what =
    `buffer ${buffer.usedBytes} of ${buffer.thresholdBytes} bytes, pool ${pool.usedBytes} of ${pool.limitBytes}, ` +
    `${tensors} tensors held, ${refused} announcements refused so far`;
  const full =
    buffer.usedBytes >= NEARLY_FULL * buffer.thresholdBytes &&
    pool.usedBytes >= NEARLY_FULL * pool.limitBytes;
  // In GET the producer keeps KV in the same memory.
  const holds = role === 'consumer' || sendType === 'GET';
  if (holds && buffer.thresholdBytes + pool.limitBytes === 0) {
    return [fail(`${what}: no memory is configured for received KV`, NO_ROOM.fix)];
  }
  if (full && tensors > 0) return [fail(what, NO_ROOM.fix)];
  return [
    refused > 0 ? warn(what, 'raise --kv-buffer-size or --mem-pool-size-gb, or lower the load') : info(what),
  ];
}

const STUCK = transfer(
  'look for this tensor in the logs of both ends, and at pd_kv_buffer_used_bytes of the consumer',
);

function refused(status: number): Finding {
  const what = `GET /debug/state answers ${status}`;
  if (status === 403)
    return fail(what, 'ask from the machine it runs on, or start it with --debug-state-remote');
  if (status === 404) return fail(what, 'start the worker with --debug-state (and ask from its own machine)');
  return fail(what, 'its core thread does not answer: look at its log, then restart it');
}

function seconds(ms: number): string {
  return `${(ms / 1_000).toFixed(1)} s`;
}
