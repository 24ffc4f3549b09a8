/** The requests, the latest first, each as a bar that is cut by stage. */
import { byId, clock, count, duration, h, setText } from './dom.js';
import { failed, STAGES, spans, took } from './model.js';

/** @import { UiRequest } from '../src/proxy/ui-state.ts' */
/** @import { Model } from './model.js' */

const MOST_ROWS = 200;
/** Of what is shown, so many are not cut off by a shared scale. */
const FITTING = 0.95;
/** Nor are those under way, up to so many times the scale of the others. */
const MOST_STRETCHED = 4;
const STAGE_NAMES = new Map(STAGES);

export class Requests {
  #model;
  #onSelect;
  #body = byId('rows');
  /** @type {Map<string, Row>} */
  #rows = new Map();
  /** That was chosen last. @type {string | undefined} */
  #current;
  filter = 'all';
  /** Address of the instance whose requests are shown. @type {string | undefined} */
  instance;
  each = false;

  /** @param {Model} model @param {(id: string, focus: boolean) => void} onSelect */
  constructor(model, onSelect) {
    this.#model = model;
    this.#onSelect = onSelect;
    this.#body.addEventListener('keydown', (event) => this.#onKey(event));
  }

  /** @param {string | undefined} selected id */
  render(selected) {
    const { now } = this.#model;
    const shown = this.#shown();
    const scaleMs = this.#scale(shown, now);
    const names = shortNames([...this.#model.instances.keys()]);
    const ids = new Set(shown.map(({ id }) => id));
    for (const [id, row] of this.#rows) {
      if (ids.has(id)) continue;
      row.element.remove();
      this.#rows.delete(id);
    }
    // Where nothing was chosen, Tab comes to the latest.
    const current = this.#current !== undefined && ids.has(this.#current) ? this.#current : shown[0]?.id;
    shown.forEach((request, index) => {
      const { id } = request;
      let row = this.#rows.get(id);
      if (!row) {
        row = new Row(id, () => this.#choose(id, false));
        this.#rows.set(id, row);
      }
      if (this.#body.children[index] !== row.element)
        this.#body.insertBefore(row.element, this.#body.children[index] ?? null);
      row.render(request, this.each ? undefined : scaleMs, names, now);
      row.mark(id === selected, id === current);
    });
    this.#axis(this.each ? undefined : scaleMs);
    const none = byId('no-requests');
    none.hidden = shown.length > 0;
    setText(none, this.#model.requests.size > 0 ? 'No request is like that.' : 'No requests yet.');
  }

  #shown() {
    const shown = [];
    for (const request of [...this.#model.requests.values()].reverse()) {
      if (shown.length === MOST_ROWS) break;
      if (this.filter === 'running' && request.status !== 0) continue;
      if (this.filter === 'failed' && !failed(request)) continue;
      const { instance } = this;
      const there = request.attempts.some(
        ({ producer, consumer }) => producer === instance || consumer === instance,
      );
      if (instance !== undefined && !there) continue;
      shown.push(request);
    }
    return shown;
  }

  /** @param {readonly UiRequest[]} shown @param {number} now */
  #scale(shown, now) {
    const all = shown.map((request) => took(request, now)).sort((a, b) => a - b);
    const most = all[Math.min(all.length - 1, Math.floor(all.length * FITTING))] ?? 100;
    const running = shown.filter(({ status }) => status === 0).map((request) => took(request, now));
    return niceCeiling(Math.max(most, Math.min(most * MOST_STRETCHED, Math.max(0, ...running))));
  }

  /** @param {number | undefined} scaleMs */
  #axis(scaleMs) {
    const axis = byId('axis');
    const key = String(scaleMs);
    if (axis.dataset.scale === key) return;
    axis.dataset.scale = key;
    const marks = scaleMs === undefined ? [] : [0, 0.25, 0.5, 0.75, 1];
    axis.replaceChildren(
      ...marks.map((share) => {
        const mark = h(
          'span',
          { class: 'mark' },
          share === 0 ? '0' : duration((scaleMs ?? 0) * share).replace(/\.0+(?= )/, ''),
        );
        mark.style.left = `${share * 100}%`;
        return mark;
      }),
    );
  }

  /** @param {string} id @param {boolean} focus on what is shown of it */
  #choose(id, focus) {
    this.#current = id;
    this.#onSelect(id, focus);
  }

  /** On that which was chosen last. */
  focus() {
    if (this.#current !== undefined) this.#rows.get(this.#current)?.element.focus();
  }

  /** @param {KeyboardEvent} event */
  #onKey(event) {
    const rows = [...this.#body.children];
    const at = rows.indexOf(/** @type {Element} */ (document.activeElement));
    if (at < 0) return;
    const last = rows.length - 1;
    /** @type {Record<string, number>} */
    const to = { ArrowDown: at + 1, ArrowUp: at - 1, PageDown: at + 10, PageUp: at - 10, Home: 0, End: last };
    const next = to[event.key];
    const row = /** @type {HTMLElement} */ (rows[Math.min(last, Math.max(0, next ?? at))]);
    const id = row.dataset.id ?? '';
    if (next !== undefined) {
      row.focus();
      this.#choose(id, false);
    } else if (event.key === 'Enter' || event.key === ' ') this.#choose(id, true);
    else return;
    event.preventDefault();
  }
}

class Row {
  #time = h('td', { class: 'c-time num' });
  #id = h('td', { class: 'c-id mono' });
  #pair = h('td', { class: 'c-pair mono' });
  #tokens = h('td', { class: 'c-tokens num' });
  #bar = h('div', { class: 'bar', role: 'img' });
  #total = h('td', { class: 'c-total num' });
  #status = h('td', { class: 'c-status' });
  /** What it was drawn from. @type {unknown[]} */
  #drawn = [];
  element;

  /** @param {string} id @param {() => void} onSelect */
  constructor(id, onSelect) {
    const bar = h('td', { class: 'c-bar' }, this.#bar);
    const cells = [this.#time, this.#id, this.#pair, this.#tokens, bar, this.#total, this.#status];
    this.element = h('tr', { 'data-id': id, tabindex: '-1', onclick: onSelect }, ...cells);
  }

  /** @param {boolean} selected @param {boolean} current */
  mark(selected, current) {
    this.element.setAttribute('aria-selected', String(selected));
    this.element.tabIndex = current ? 0 : -1;
  }

  /** @param {UiRequest} request @param {number | undefined} scaleMs @param {Map<string, string>} names @param {number} now */
  render(request, scaleMs, names, now) {
    const running = request.status === 0;
    const drawn = [request, scaleMs, names.size, running && now];
    if (drawn.every((value, index) => value === this.#drawn[index])) return;
    this.#drawn = drawn;
    const pair = request.attempts.at(-1);
    const name = (/** @type {string} */ address) => names.get(address) ?? address;
    setText(this.#time, clock(request.at));
    setText(this.#id, request.id.slice(0, 8));
    const alone = request.wire === 'none';
    setText(this.#pair, pair ? `${alone ? '' : `${name(pair.producer)} → `}${name(pair.consumer)}` : '');
    this.#pair.title = pair ? `${alone ? '' : `${pair.producer} → `}${pair.consumer}` : '';
    setText(this.#tokens, promptText(request));
    setText(this.#total, duration(took(request, now)));
    setText(this.#status, resultText(request));
    this.element.dataset.result = running ? 'running' : failed(request) ? 'failed' : 'ok';
    drawBar(this.#bar, request, scaleMs, now);
  }
}

/**
 * @param {HTMLElement} bar
 * @param {UiRequest} request
 * @param {number | undefined} scaleMs undefined: as long as it took
 * @param {number} now
 */
export function drawBar(bar, request, scaleMs, now) {
  const cut = spans(request, now);
  const end = Math.max(1, took(request, now));
  const scale = scaleMs ?? end;
  const text = cut
    .map(({ stage, from, to }) => `${STAGE_NAMES.get(stage)} ${duration(to - from)}`)
    .join(', ');
  if (bar.getAttribute('aria-label') !== text) bar.setAttribute('aria-label', text);
  bar.classList.toggle('over', end > scale * 1.001);
  while (bar.children.length > cut.length) bar.lastChild?.remove();
  cut.forEach(({ stage, from, to, open }, index) => {
    const piece = /** @type {HTMLElement} */ (bar.children[index] ?? bar.appendChild(h('span')));
    piece.className = open ? 'piece open' : 'piece';
    piece.dataset.stage = stage;
    piece.style.left = `${(from / scale) * 100}%`;
    piece.style.width = `${((to - from) / scale) * 100}%`;
  });
}

/** @param {Pick<UiRequest, 'promptTokens' | 'tokensKnown'>} request */
export function promptText({ promptTokens, tokensKnown }) {
  return `${tokensKnown ? '' : '~'}${count(promptTokens)}`;
}

/** @param {UiRequest} request */
export function resultText({ status, code }) {
  if (status === 0) return 'under way';
  if (status === 499) return 'client left';
  return code === null ? String(status) : `${status} ${code}`;
}

/** Addresses without what all have in common: the host or the port, or how hosts begin. @param {readonly string[]} addresses @returns {Map<string, string>} */
function shortNames(addresses) {
  const cut = (/** @type {string} */ address) => address.lastIndexOf(':');
  const hosts = new Set(addresses.map((address) => address.slice(0, cut(address))));
  const ports = new Set(addresses.map((address) => address.slice(cut(address))));
  const common = commonStart([...hosts]);
  return new Map(
    addresses.map((address) => {
      if (hosts.size === 1) return [address, address.slice(cut(address))];
      const name = ports.size === 1 ? address.slice(0, cut(address)) : address;
      return [address, common > 3 ? `…${name.slice(common)}` : name];
    }),
  );
}

/** Up to where all begin alike, in whole parts of a name. @param {readonly string[]} hosts */
function commonStart([first = '', ...others]) {
  let end = 0;
  while (end < first.length && others.every((other) => other[end] === first[end])) end++;
  return Math.max(first.lastIndexOf('.', end - 1), first.lastIndexOf('-', end - 1)) + 1;
}

/** 1, 2, 4 or 8 times a power of ten, or the next. @param {number} ms */
function niceCeiling(ms) {
  const power = 10 ** Math.floor(Math.log10(Math.max(1, ms)));
  return power * ([1, 2, 4, 8].find((step) => step * power >= ms) ?? 10);
}
