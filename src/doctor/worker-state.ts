/**
 * `--worker URL`: what a running worker says of its waits (GET /debug/state), and which of the runbook's hang scenarios that is. Nothing
 * is asked of anybody else, so that it can be tried on a system that hangs.
 */
import { PdError } from '../errors.ts';
import type { PairState, TransferState } from '../transfer/types.ts';
import type { CoreState } from '../worker/messages.ts';
import { type Finding, fail, info, ok, type Section, warn } from './finding.ts';
import { type Metrics, metricsOf } from './metrics.ts';
import { SCENARIOS } from './scenarios.ts';

/** The answer of GET /debug/state. */
export interface WorkerState {
  readonly role: string;
  readonly requests: number;
  readonly core: CoreState;
}

/** A step that takes longer than this is worth a word; milliseconds. */
const SLOW_MS = 2_000;
const NEARLY_FULL = 0.95;
const MOST_WAITS = 8;

export async function workerSection(url: string, timeoutMs: number): Promise<Section> {
  const base = url.replace(/\/+$/, '');
  const title = `Worker ${base}`;
  let state: WorkerState;
  try {
    const response = await fetch(`${base}/debug/state`, { signal: AbortSignal.timeout(timeoutMs) });
    if (!response.ok) return { title, findings: [refused(response.status)] };
    state = (await response.json()) as WorkerState;
  } catch (cause) {
    const { message } = PdError.from((cause as Error).cause ?? cause);
    const mend =
      'correct host and HTTP port (8081 and 8083 in the runbook); a worker that hangs whole: restart it';
    return { title, findings: [fail(`GET /debug/state: ${message}`, mend)] };
  }
  if (typeof state.core !== 'object') {
    return {
      title,
      findings: [fail('GET /debug/state is not a worker of ours', "name a worker's HTTP port")],
    };
  }
  return { title, findings: workerFindings(state, await metricsOf(`${base}/metrics`, timeoutMs)) };
}

/** Pure. One `fail` for each wait that will end at its deadline unless something changes. */
export function workerFindings({ role, requests, core }: WorkerState, metrics: Metrics): Finding[] {
  const { running, waiting, loading, blocks, transfer } = core;
  const findings: Finding[] = [
    info(
      `${role}: ${requests} requests under way, ${running} running, ${waiting} waiting, ${loading} loading; ` +
        `${blocks.used} of ${blocks.total} blocks used`,
    ),
  ];
  for (const wrong of core.integrity)
    findings.push(fail(`the books are wrong: ${wrong}`, 'a defect: please report it'));
  if (!transfer) return [...findings, info('no transfer engine: this worker serves undivided')];
  findings.push(...memoryFindings(transfer, metrics));
  const explained = new Set<PairState>();
  for (const wait of transfer.waiting.slice(0, MOST_WAITS))
    findings.push(waitFinding(wait, transfer, explained));
  if (transfer.waiting.length > MOST_WAITS) {
    findings.push(info(`${transfer.waiting.length - MOST_WAITS} more requests wait for KV`));
  }
  for (const pair of transfer.pairs) if (!explained.has(pair)) findings.push(...pairFindings(pair));
  if (!findings.some(({ level }) => level === 'fail'))
    findings.push(ok('nothing waits longer than it should'));
  return findings;
}

type Wait = TransferState['waiting'][number];

function waitFinding(wait: Wait, transfer: TransferState, explained: Set<PairState>): Finding {
  const { requestId, tensorId, peer, sinceMs, deadlineMs, nearMisses, prefilling } = wait;
  const told = (text: string, mend: string) =>
    // KV takes its time on a busy system
    sinceMs > Math.min(SLOW_MS, deadlineMs / 2) ? fail(text, mend) : info(text);
  const what = `${requestId} waits for ${tensorId} from ${peer} since ${seconds(sinceMs)} of ${seconds(deadlineMs)}`;
  const pairs = transfer.pairs.filter((pair) => pair.peer === peer);
  if (prefilling) return info(`${what}; its prompt may still be computed there`);
  const stuck = pairs.find((pair) => pair.state === 'opening' || pair.state === 'connecting');
  if (nearMisses.length > 0) {
    return told(`${what}; here is instead: ${nearMisses.join(', ')}`, scenario(4));
  }
  if (stuck) {
    explained.add(stuck);
    return told(
      `${what}; the pair is ${stuck.state} since ${seconds(stuck.sinceMs)}`,
      scenario(stuck.state === 'opening' ? 1 : 2),
    );
  }
  const open = pairs.find((pair) => pair.state === 'open');
  if (!open) {
    const none = transfer.sendType === 'GET' ? 'no pair with it' : 'it has opened no pair with this worker';
    return told(`${what}; ${none}`, scenario(2));
  }
  explained.add(open);
  // In GET what is asked for and not there yet is outstanding too.
  const asked = transfer.sendType === 'GET' && open.queued === 0;
  if (open.outstanding + open.queued > 0 && !asked) {
    const amount = `${open.outstanding} operations under way and ${open.queued} queued`;
    return told(`${what}; the pair is open with ${amount}`, scenario(3));
  }
  return told(
    `${what}; the pair is open${asked ? '' : ' and idle'}, nothing of a similar id is ${asked ? 'there' : 'here'}`,
    `the producer has not sent it: pd-doctor --worker with its HTTP address; else ${scenario(4)}`,
  );
}

function pairFindings({ peer, direction, state, queued, outstanding, sinceMs }: PairState): Finding[] {
  const what = `pair with ${peer} (${direction}): ${state} since ${seconds(sinceMs)}, ${queued} queued, ${outstanding} outstanding`;
  switch (state) {
    case 'connecting':
      return [sinceMs > SLOW_MS ? fail(what, scenario(2)) : info(what)];
    case 'opening':
      return [sinceMs > SLOW_MS ? fail(what, scenario(1)) : info(what)];
    case 'over':
      return [queued > 0 ? fail(what, scenario(2)) : info(what)];
    case 'open':
    case 'closing':
      return [info(what)];
  }
}

function memoryFindings({ buffer, pool, tensors }: TransferState, metrics: Metrics): Finding[] {
  const refused = metrics.get('pd_kv_refused_total') ?? 0;
  const what =
    `buffer ${buffer.usedBytes} of ${buffer.thresholdBytes} bytes, pool ${pool.usedBytes} of ${pool.limitBytes}, ` +
    `${tensors} tensors held, ${refused} announcements refused so far`;
  const full =
    buffer.usedBytes >= NEARLY_FULL * buffer.thresholdBytes &&
    pool.usedBytes >= NEARLY_FULL * pool.limitBytes;
  if (full && tensors > 0) return [fail(what, scenario(3))];
  return [
    refused > 0 ? warn(what, 'raise --kv-buffer-size or --mem-pool-size-gb, or lower the load') : info(what),
  ];
}

function scenario(number: 1 | 2 | 3 | 4): string {
  return `hang scenario ${number} of the runbook, ${SCENARIOS[number - 1]!.text}`;
}

function refused(status: number): Finding {
  const what = `GET /debug/state answers ${status}`;
  if (status === 403)
    return fail(what, 'ask from the machine it runs on, or start it with --debug-state-remote');
  if (status === 404) return fail(what, 'start the worker with --debug-state (and ask from its own machine)');
  return fail(what, 'its core does not answer: look at its log; restart it');
}

function seconds(ms: number): string {
  return `${(ms / 1_000).toFixed(1)} s`;
}
