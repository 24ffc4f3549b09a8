/** The instances, and what goes between them. */
import { byId, compact, count, duration, h, plural, setText } from './dom.js';

/** @import { UiInstance } from '../src/proxy/ui-state.ts' */
/** @import { Known, Link, Model } from './model.js' */

const SVG = 'http://www.w3.org/2000/svg';
const SPARK = { width: 84, height: 16 };

/**
 * In a word, and how serious that is.
 * @param {Known} known
 * @param {number} now
 * @returns {[string, 'ok' | 'warn' | 'bad' | 'gone']}
 */
export function stateOf({ instance, goneAt }, now) {
  if (goneAt !== undefined) return [`gone for ${duration(Math.max(0, now - goneAt))}`, 'gone'];
  if (instance.breaker === 'open') return ['breaker open', 'bad'];
  if (instance.refused) return ['refuses', 'bad'];
  if (instance.silentSeconds > 0) return [`silent for ${instance.silentSeconds} s`, 'warn'];
  if (instance.breaker === 'half-open') return ['breaker half-open', 'warn'];
  if (instance.draining) return ['drains', 'warn'];
  return [instance.requests > 0 ? 'busy' : 'idle', 'ok'];
}

export class Fleet {
  #model;
  #onSelect;
  /** @type {Map<string, Card>} */
  #cards = new Map();
  /** @type {Map<string, SVGPathElement>} */
  #paths = new Map();

  /** @param {Model} model @param {(address: string) => void} onSelect */
  constructor(model, onSelect) {
    this.#model = model;
    this.#onSelect = onSelect;
    new ResizeObserver(() => this.#drawLinks()).observe(byId('fleet'));
  }

  /** @param {string | undefined} selected address */
  render(selected) {
    const { instances, now } = this.#model;
    for (const [address, card] of this.#cards) {
      if (instances.has(address)) continue;
      card.item.remove();
      this.#cards.delete(address);
    }
    for (const role of /** @type {const} */ (['producer', 'consumer'])) {
      const list = byId(`${role}s`);
      const known = [...instances.values()].filter(({ instance }) => instance.role === role);
      known.sort((a, b) => a.instance.address.localeCompare(b.instance.address, 'en', { numeric: true }));
      known.forEach((one, index) => {
        const { address } = one.instance;
        let card = this.#cards.get(address);
        if (!card) {
          card = new Card(address, () => this.#onSelect(address));
          this.#cards.set(address, card);
        }
        if (list.children[index] !== card.item) list.insertBefore(card.item, list.children[index] ?? null);
        card.render(one, now, address === selected);
      });
    }
    byId('no-fleet').hidden = instances.size > 0 || this.#model.proxy === undefined;
    byId('fleet').hidden = instances.size === 0;
    setText(byId('notices'), this.#model.notices[0] ?? '');
    this.#drawLinks();
  }

  #drawLinks() {
    const svg = byId('links');
    const box = svg.getBoundingClientRect();
    if (box.width === 0) return;
    const links = this.#model.links();
    for (const [key, path] of this.#paths) {
      if (links.has(key)) continue;
      path.remove();
      this.#paths.delete(key);
    }
    for (const [key, link] of links) {
      const [from, to] = [this.#cards.get(link.producer), this.#cards.get(link.consumer)];
      if (!from || !to) continue;
      let path = this.#paths.get(key);
      if (!path) {
        path = document.createElementNS(SVG, 'path');
        this.#paths.set(key, path);
        svg.append(path);
      }
      const [a, b] = [from.item.getBoundingClientRect(), to.item.getBoundingClientRect()];
      const [x1, y1] = [a.right - box.left, a.top + a.height / 2 - box.top];
      const [x2, y2] = [b.left - box.left, b.top + b.height / 2 - box.top];
      const bend = (x2 - x1) / 2;
      path.setAttribute('d', `M${x1} ${y1} C${x1 + bend} ${y1} ${x2 - bend} ${y2} ${x2} ${y2}`);
      path.setAttribute('stroke-width', String(Math.min(6, 1 + Math.log2(1 + link.recent) / 2)));
      path.classList.toggle('running', link.running > 0);
    }
    const busy = [...links.values()].map(linkText).join('; ');
    svg.setAttribute('aria-label', busy || 'No requests between instances');
  }
}

/** @param {Link} link */
export function linkText({ producer, consumer, running, recent }) {
  return `${producer} to ${consumer}: ${count(running)} under way, ${count(recent)} in the last minute`;
}

class Card {
  #address = h('span', { class: 'address' });
  #state = h('span', { class: 'state' });
  #load = h('span', { class: 'load' });
  #kv = h('span', { class: 'kv' });
  #fill = h('span', { class: 'fill' });
  #meter = h('span', { class: 'meter', 'aria-hidden': 'true' }, this.#fill);
  #cached = h('span', { class: 'cached' });
  #spark = document.createElementNS(SVG, 'polyline');
  #button;
  item;

  /** @param {string} address @param {() => void} onSelect */
  constructor(address, onSelect) {
    const spark = document.createElementNS(SVG, 'svg');
    spark.setAttribute('class', 'spark');
    spark.setAttribute('viewBox', `0 0 ${SPARK.width} ${SPARK.height}`);
    spark.setAttribute('aria-hidden', 'true');
    const what = document.createElementNS(SVG, 'title');
    what.textContent = 'Requests there, in the last 90 s';
    spark.append(what, this.#spark);
    this.#address.textContent = address;
    const dot = h('span', { class: 'dot' });
    const name = h('span', { class: 'name' }, dot, this.#address, this.#state);
    const facts = h(
      'span',
      { class: 'facts' },
      this.#load,
      h('span', { class: 'kv-cell' }, this.#meter, this.#kv),
      this.#cached,
    );
    this.#button = h('button', { type: 'button', class: 'card', onclick: onSelect }, name, facts, spark);
    this.item = h('li', {}, this.#button);
  }

  /** @param {Known} known @param {number} now @param {boolean} selected */
  render(known, now, selected) {
    const { instance, samples } = known;
    const [state, grade] = stateOf(known, now);
    this.#button.dataset.grade = grade;
    this.#button.setAttribute('aria-pressed', String(selected));
    setText(this.#state, state);
    const load = loadText(instance);
    setText(this.#load, load);
    if (this.#load.title !== load) this.#load.title = load;
    const { kvUse, cachedBlocks } = instance;
    this.#meter.hidden = kvUse === null;
    setText(this.#kv, kvUse === null ? 'KV unknown' : `KV ${Math.round(kvUse * 100)} %`);
    this.#fill.style.width = `${(kvUse ?? 0) * 100}%`;
    this.#fill.classList.toggle('full', (kvUse ?? 0) > 0.9);
    setText(this.#cached, cachedBlocks === null ? '' : `${compact(cachedBlocks)} cached`);
    const most = Math.max(4, ...samples);
    const step = SPARK.width / 89;
    const start = SPARK.width - (samples.length - 1) * step;
    const points = samples.map((value, index) => {
      const y = SPARK.height - 1 - (value / most) * (SPARK.height - 2);
      return `${(start + index * step).toFixed(1)},${y.toFixed(1)}`;
    });
    const ground = SPARK.height;
    const [from, to] = [`${start.toFixed(1)},${ground}`, `${SPARK.width},${ground}`];
    this.#spark.setAttribute('points', samples.length < 2 ? '' : [from, ...points, to].join(' '));
  }
}

/** @param {UiInstance} instance */
function loadText({ requests, queuedTokens }) {
  const tokens = queuedTokens > 0 ? `, ${compact(queuedTokens)} tokens` : '';
  return `${plural(requests, 'request')}${tokens}`;
}
