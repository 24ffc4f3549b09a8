/** What is shown of the request or the instance that was chosen; else where the time goes. */
import { byId, clock, count, duration, h, plural } from './dom.js';
import { linkText, stateOf } from './fleet.js';
import { percentile, STAGES, spans, took } from './model.js';
import { drawBar, promptText, resultText } from './requests.js';

/** @import { UiRequest } from '../src/proxy/ui-state.ts' */
/** @import { Known, Model } from './model.js' */
/** @typedef {{ kind: 'request', id: string } | { kind: 'instance', address: string } | undefined} Selection */

/** @typedef {{ id: string, route: Route | undefined }} Asked */
/**
 * Of `GET /v1/requests/ID/route`, what is shown here (docs/routing.md, "Receipts").
 * @typedef {object} Route
 * @property {{ tokens: number, counted: boolean }} prompt
 * @property {{ producer: Place, consumer: Place, alone: boolean }[]} attempts
 */
/**
 * @typedef {object} Place
 * @property {string} http_address
 * @property {string | null} policy
 * @property {number} considered
 * @property {number} cached_tokens
 * @property {{ http_address: string, cost_ms: number | null }[]} candidates
 * @property {{ prompts?: { transport?: string, wire?: string, kv_bytes?: number }[] } | null} worker
 */

export class Details {
  #model;
  #select;
  #panel = byId('details');
  #shown = '';
  /** @type {Asked | undefined} */
  #asked;
  #headers;
  #onAnswer;

  /**
   * @param {Model} model
   * @param {(selection: Selection) => void} select
   * @param {() => Record<string, string>} headers of what is asked of the proxy
   * @param {() => void} onAnswer there is more to show
   */
  constructor(model, select, headers, onAnswer) {
    this.#model = model;
    this.#select = select;
    this.#headers = headers;
    this.#onAnswer = onAnswer;
  }

  /** @param {Selection} selection */
  render(selection) {
    const { now } = this.#model;
    const request = selection?.kind === 'request' ? this.#model.requests.get(selection.id) : undefined;
    const known = selection?.kind === 'instance' ? this.#model.instances.get(selection.address) : undefined;
    this.#panel.classList.toggle('chosen', selection !== undefined);
    const content = request
      ? this.#ofRequest(request, now)
      : known
        ? this.#ofInstance(known, now)
        : this.#ofAll(selection, now);
    // What has not changed is not written again: focus, and what somebody has marked, stay.
    const key = content.map((node) => node.outerHTML).join('');
    if (key === this.#shown) return;
    this.#shown = key;
    const focused = this.#panel.contains(document.activeElement)
      ? document.activeElement?.getAttribute('data-key')
      : null;
    this.#panel.replaceChildren(...content);
    if (focused)
      /** @type {HTMLElement | null} */ (
        this.#panel.querySelector(`[data-key="${CSS.escape(focused)}"]`)
      )?.focus();
  }

  focus() {
    this.#panel.focus();
  }

  /** @param {string} title @param {string} [subtitle] */
  #head(title, subtitle) {
    const close = h(
      'button',
      {
        type: 'button',
        class: 'quiet',
        'data-key': 'close',
        'aria-label': 'Close details',
        onclick: () => this.#select(undefined),
      },
      '✕',
    );
    return h(
      'div',
      { class: 'head' },
      h('h2', {}, title),
      ...(subtitle ? [h('p', { class: 'dim' }, subtitle)] : []),
      close,
    );
  }

  /** @param {UiRequest} request @param {number} now */
  #ofRequest(request, now) {
    const { attempts, id } = request;
    const bar = h('div', { class: 'bar tall', role: 'img' });
    drawBar(bar, request, undefined, now);
    const total = Math.max(0.001, took(request, now));
    const rows = spans(request, now).map(({ stage, from, to, open }) =>
      h(
        'tr',
        {},
        h('th', { scope: 'row' }, swatch(stage), nameOf(stage)),
        h('td', { class: 'num' }, duration(from)),
        h('td', { class: 'num' }, open ? `${duration(to - from)} …` : duration(to - from)),
        h('td', { class: 'num dim' }, `${Math.round(((to - from) / total) * 100)} %`),
      ),
    );
    const pair = attempts.at(-1);
    const failures = attempts.filter(({ failure }) => failure !== null);
    return [
      this.#head('Request', resultText(request)),
      h('p', { class: 'mono id' }, id),
      bar,
      table(['Stage', 'From', 'Took', 'Share'], rows),
      facts([
        ['Came', clock(request.at)],
        ['Took', duration(took(request, now))],
        ['Route', request.route],
        ['Model', request.model ?? '–'],
        ['Prompt', `${promptText(request)} tokens`],
        ...(pair && request.wire !== 'none'
          ? [/** @type {const} */ (['Producer', this.#link(pair.producer)])]
          : []),
        ...(pair ? [/** @type {const} */ (['Consumer', this.#link(pair.consumer)])] : []),
        [
          'Hand-over',
          { native: 'native', frozen: "vLLM's wire", none: 'none: its consumer computed the prompt' }[
            request.wire
          ],
        ],
        ['Both asked', request.overlapped ? 'at once' : 'in turn'],
        ...(attempts.length > 1 ? [/** @type {const} */ (['Attempts', count(attempts.length)])] : []),
      ]),
      ...failures.map(({ failure }) => h('p', { class: 'failure' }, failure ?? '')),
      ...this.#why(request),
    ];
  }

  /** Why that pair, and what moved: asked of the proxy once it has ended. @param {UiRequest} request @returns {HTMLElement[]} */
  #why({ id, status }) {
    if (status === 0) return [];
    if (this.#asked?.id !== id) {
      /** @type {Asked} */
      const asked = { id, route: undefined };
      this.#asked = asked;
      void this.#ask(id).then((route) => {
        asked.route = route;
        this.#onAnswer();
      });
    }
    const attempt = this.#asked.route?.attempts.at(-1);
    if (!attempt) return [];
    const { producer, consumer, alone } = attempt;
    const places = alone ? [consumer] : [producer, consumer];
    const reasons = places.map((place) => {
      const role = place === producer ? 'Producer' : 'Consumer';
      return /** @type {const} */ ([
        role,
        `${place.policy ?? 'not told'}, of ${plural(place.considered, 'instance')}${costOf(place)}`,
      ]);
    });
    const prompts = consumer.worker?.prompts ?? [];
    const moved = prompts.flatMap(({ transport, wire, kv_bytes: bytes }) =>
      transport && bytes ? [`${byteText(bytes)} by ${transport}, ${wire ?? ''} wire`] : [],
    );
    const cached = places.map(
      (place) => `${count(place.cached_tokens)} at the ${place === producer ? 'producer' : 'consumer'}`,
    );
    return [
      h('h3', {}, 'Why this pair'),
      facts([
        ...reasons,
        [
          'Thought cached',
          `${cached.join(', ')} of ${promptText({ promptTokens: this.#asked.route?.prompt.tokens ?? 0, tokensKnown: this.#asked.route?.prompt.counted ?? false })} tokens`,
        ],
        ...moved.map((text) => /** @type {const} */ (['KV moved', text])),
      ]),
    ];
  }

  /** @param {string} id @returns {Promise<Route | undefined>} */
  async #ask(id) {
    try {
      const response = await fetch(`v1/requests/${id}/route`, { headers: this.#headers() });
      return response.ok ? await response.json() : undefined;
    } catch {
      return undefined; // what is known without it is shown
    }
  }

  /** @param {Known} known @param {number} now */
  #ofInstance(known, now) {
    const { instance } = known;
    const links = [...this.#model.links().values()].filter(
      ({ producer, consumer }) => producer === instance.address || consumer === instance.address,
    );
    const { kvUse, kvBlocks, cachedBlocks } = instance;
    const used = kvUse === null ? 'not told' : `${Math.round(kvUse * 1_000) / 10} % in use`;
    return [
      this.#head(instance.role === 'producer' ? 'Producer' : 'Consumer', stateOf(known, now)[0]),
      h('p', { class: 'mono id' }, instance.address),
      facts([
        ['Requests', plural(instance.requests, 'request')],
        ['To compute', plural(instance.queuedTokens, 'prompt token')],
        ['KV cache', kvBlocks === null ? used : `${used} of ${plural(kvBlocks, 'block')}`],
        ['Cached', cachedBlocks === null ? 'not told' : plural(cachedBlocks, 'block')],
        ['Breaker', instance.breaker],
        ['Draining', instance.draining ? 'yes' : 'no'],
        ['Last ping', instance.silentSeconds > 0 ? `${instance.silentSeconds} s ago` : 'in time'],
        ['KV address', h('span', { class: 'mono' }, instance.kvAddress)],
        ['Wire', instance.native ? 'native' : "vLLM's"],
        ['Send type', instance.sendType ?? 'not told'],
        ['TLS', instance.tls ? 'yes' : 'no'],
        ['Model', instance.model ?? 'not told'],
        ['Served as', instance.models?.join(', ') ?? 'not known yet'],
      ]),
      h('h3', {}, 'Links'),
      links.length === 0
        ? h('p', { class: 'dim' }, 'None in the last minute.')
        : h('ul', { class: 'plain' }, ...links.map((link) => h('li', {}, linkText(link)))),
    ];
  }

  /** @param {Selection} selection @param {number} now */
  #ofAll(selection, now) {
    const done = [...this.#model.requests.values()].filter(({ status }) => status >= 200 && status < 300);
    const rows = STAGES.flatMap(([stage, name]) => {
      const all = done.flatMap((request) => {
        const took = spans(request, now).filter((span) => span.stage === stage);
        return took.length === 0 ? [] : [took.reduce((sum, { from, to }) => sum + to - from, 0)];
      });
      if (all.length === 0) return [];
      all.sort((a, b) => a - b);
      const cells = [0.5, 0.95].map((share) =>
        h('td', { class: 'num' }, duration(percentile(all, share) ?? 0)),
      );
      return [
        h(
          'tr',
          {},
          h('th', { scope: 'row' }, swatch(stage), name),
          ...cells,
          h('td', { class: 'num dim' }, count(all.length)),
        ),
      ];
    });
    const gone = selection && h('p', { class: 'dim' }, 'What was chosen is remembered no more.');
    return [
      ...(selection
        ? [this.#head('Details')]
        : [h('div', { class: 'head' }, h('h2', {}, 'Where the time goes'))]),
      ...(gone ? [gone] : []),
      rows.length === 0
        ? h('p', { class: 'dim' }, 'Once requests have ended, this is how long each of their stages took.')
        : table(['Stage', 'p50', 'p95', 'Requests'], rows),
      h('p', { class: 'dim hint' }, 'Choose a request or an instance to see more of it.'),
    ];
  }

  /** @param {string} address */
  #link(address) {
    if (!this.#model.instances.has(address)) return h('span', { class: 'mono' }, address);
    const onclick = () => this.#select({ kind: 'instance', address });
    return h('button', { type: 'button', class: 'link mono', 'data-key': address, onclick }, address);
  }
}

/** @param {string} stage */
function nameOf(stage) {
  return STAGES.find(([one]) => one === stage)?.[1] ?? stage;
}

/** @param {string} stage */
export function swatch(stage) {
  return h('span', { class: 'swatch', 'data-stage': stage });
}

/** @param {readonly string[]} names @param {readonly Node[]} rows */
function table(names, rows) {
  const heads = names.map((name, index) => h('th', { scope: 'col', class: index === 0 ? '' : 'num' }, name));
  return h('table', { class: 'stages' }, h('thead', {}, h('tr', {}, ...heads)), h('tbody', {}, ...rows));
}

/** @param {readonly (readonly [string, Node | string])[]} pairs */
function facts(pairs) {
  return h(
    'dl',
    { class: 'facts' },
    ...pairs.map(([name, value]) => h('div', {}, h('dt', {}, name), h('dd', {}, value))),
  );
}

/** What it was thought to cost there. @param {Place} place */
function costOf({ http_address: address, candidates }) {
  const cost = candidates.find((one) => one.http_address === address)?.cost_ms;
  return cost === null || cost === undefined ? '' : `; about ${duration(cost)}`;
}

/** @param {number} bytes */
function byteText(bytes) {
  const power = Math.min(3, Math.floor(Math.log10(Math.max(1, bytes)) / 3));
  return `${Number((bytes / 1_000 ** power).toPrecision(3))} ${['B', 'kB', 'MB', 'GB'][power]}`;
}
