/** What the page knows: what the proxy has told, and what follows from it. */

/** @import { UiInstance, UiMessage, UiProxy, UiRequest, UiStage } from '../src/proxy/ui-state.ts' */

/** @type {readonly (readonly [UiStage, string])[]} */
export const STAGES = [
  ['queue', 'Queue'],
  ['placement', 'Placement'],
  ['retry', 'Other pairs'],
  ['prefill', 'Prefill'],
  ['hand-over', 'Hand-over'],
  ['decode', 'Decode'],
];

/** How long an instance that has gone is still shown. */
const GONE_MS = 60_000;
/** Of what "the last minute" tells. */
const WINDOW_MS = 60_000;
/** Looks that are remembered of each instance, and between two of them. */
const MOST_SAMPLES = 90;
const SAMPLE_MS = 1_000;

/** @typedef {{ instance: UiInstance, goneAt: number | undefined, samples: number[] }} Known */
/** @typedef {{ producer: string, consumer: string, running: number, recent: number }} Link */

export class Model {
  /** @type {UiProxy | undefined} */
  proxy;
  /** @type {Map<string, Known>} */
  instances = new Map();
  /** The latest last. @type {Map<string, UiRequest>} */
  requests = new Map();
  /** The latest first. @type {string[]} */
  notices = [];
  /** Of the proxy's clock to this one's. */
  #offset = 0;
  #sampledAt = 0;
  #told = false;

  /** By the proxy's clock, milliseconds since 1970. */
  get now() {
    return Date.now() + this.#offset;
  }

  /** @param {'state' | 'change'} kind @param {UiMessage} message */
  apply(kind, { now, proxy, instances = [], gone = [], requests = [] }) {
    this.#offset = now - Date.now();
    if (proxy) {
      // Another process: what the one before remembered it does not.
      if (this.proxy && this.proxy.startedAt !== proxy.startedAt) this.requests.clear();
      this.proxy = proxy;
    }
    const told = new Set(instances.map(({ address }) => address));
    const left = kind === 'state' ? [...this.instances.keys()].filter((address) => !told.has(address)) : gone;
    for (const address of left) {
      const known = this.instances.get(address);
      if (!known || known.goneAt !== undefined) continue;
      known.goneAt = now;
      this.#note(now, known.instance, 'has gone');
    }
    // Those that were there before this page are no news.
    const news = kind === 'change' || this.#told;
    this.#told = true;
    for (const instance of instances) this.#take(now, instance, news);
    if (kind === 'state') this.requests.clear();
    for (const request of requests) this.requests.set(request.id, request);
    const most = this.proxy?.kept ?? 0;
    for (const id of this.requests.keys()) {
      if (this.requests.size <= most) break;
      this.requests.delete(id);
    }
  }

  /** @param {number} now @param {UiInstance} instance @param {boolean} news */
  #take(now, instance, news) {
    const known = this.instances.get(instance.address);
    const before = known?.goneAt === undefined ? known?.instance : undefined;
    if (!before) {
      if (news) this.#note(now, instance, known ? 'is back' : 'is here');
    } else if (before.draining !== instance.draining)
      this.#note(now, instance, instance.draining ? 'drains' : 'takes requests again');
    else if (before.breaker !== instance.breaker && before.breaker !== 'half-open')
      this.#note(now, instance, instance.breaker === 'closed' ? 'answers again' : 'fails: it is let alone');
    this.instances.set(instance.address, { instance, goneAt: undefined, samples: known?.samples ?? [] });
  }

  /** @param {number} now @param {UiInstance} instance @param {string} what */
  #note(now, { role, address }, what) {
    const time = new Date(now).toLocaleTimeString('en-GB');
    this.notices = [`${time} ${role} ${address} ${what}`, ...this.notices.slice(0, 4)];
  }

  /** To be called often: forgets what has gone long ago, and remembers how busy each instance is. */
  tick() {
    const { now } = this;
    for (const [address, { goneAt }] of this.instances)
      if (goneAt !== undefined && now - goneAt > GONE_MS) this.instances.delete(address);
    if (now - this.#sampledAt < SAMPLE_MS) return;
    this.#sampledAt = now;
    for (const known of this.instances.values()) {
      known.samples.push(known.goneAt === undefined ? known.instance.requests : 0);
      if (known.samples.length > MOST_SAMPLES) known.samples.shift();
    }
  }

  /** Between which instances requests go, or went within the last minute. @returns {Map<string, Link>} */
  links() {
    const { now } = this;
    /** @type {Map<string, Link>} */
    const links = new Map();
    for (const request of this.requests.values()) {
      const pair = request.attempts.at(-1);
      const running = request.status === 0;
      if (!pair || request.wire === 'none' || (!running && now - request.at > WINDOW_MS)) continue;
      const key = `${pair.producer} ${pair.consumer}`;
      const link = links.get(key) ?? {
        producer: pair.producer,
        consumer: pair.consumer,
        running: 0,
        recent: 0,
      };
      link.running += running ? 1 : 0;
      link.recent++;
      links.set(key, link);
    }
    return links;
  }

  /** Of the last minute. */
  figures() {
    const { now } = this;
    const all = [...this.requests.values()];
    const recent = all.filter((request) => now - request.at <= WINDOW_MS);
    // Where more came than are remembered, the minute is shorter.
    const full = this.proxy !== undefined && all.length >= this.proxy.kept && recent.length === all.length;
    const spanMs = full ? Math.max(1, now - (all[0]?.at ?? now)) : WINDOW_MS;
    const first = recent.flatMap((request) => firstToken(request) ?? []).sort((a, b) => a - b);
    return {
      perSecond: recent.length / (spanMs / 1_000),
      first50: percentile(first, 0.5),
      first95: percentile(first, 0.95),
      failed: recent.filter(failed).length,
      recent: recent.length,
    };
  }
}

/** @param {UiRequest} request */
export function failed({ status }) {
  return status >= 400;
}

/** Milliseconds to its first token, where that is known. @param {UiRequest} request */
function firstToken({ stages }) {
  return stages.find(([stage]) => stage === 'decode')?.[1];
}

/** Milliseconds it took, or has taken by now. @param {UiRequest} request @param {number} now */
export function took({ stages, at, status }, now) {
  const end = status === 0 ? undefined : stages.at(-1)?.[2];
  return end ?? Math.max(0, now - at);
}

/** @param {readonly number[]} sorted @param {number} share */
export function percentile(sorted, share) {
  return sorted[Math.min(sorted.length - 1, Math.floor(sorted.length * share))];
}

/** Its stages in milliseconds, one that goes on up to now. @param {UiRequest} request @param {number} now */
export function spans(request, now) {
  const end = took(request, now);
  return request.stages.map(([stage, from, to]) => ({
    stage,
    from,
    to: to ?? Math.max(from, end),
    open: to === null,
  }));
}
