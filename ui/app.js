/** The page of a proxy: what it is told (stream.js), kept (model.js) and shown. */
import { Details, swatch } from './details.js';
import { byId, count, duration, h, setText } from './dom.js';
import { Fleet } from './fleet.js';
import { Model, STAGES } from './model.js';
import { Requests } from './requests.js';
import { Stream } from './stream.js';

/** @import { Selection } from './details.js' */

/** Between two looks at the clock, for bars that grow. */
const DRAW_MS = 250;
const CALM_DRAW_MS = 1_000;
const calm = matchMedia('(prefers-reduced-motion: reduce)');

const model = new Model();
/** @type {Selection} */
let selection;
let paused = false;
/** Something has come that is not drawn yet. */
let due = false;

const fleet = new Fleet(model, (address) => select({ kind: 'instance', address }));
const requests = new Requests(model, (id, focus) => {
  select({ kind: 'request', id });
  if (focus) details.focus();
});
const details = new Details(
  model,
  select,
  () => stream.headers,
  () => draw(true),
);

const stream = new Stream({
  told(kind, message) {
    model.apply(kind, message);
    due = true;
    requestAnimationFrame(() => {
      if (due) draw();
    });
  },
  status(state, text) {
    const status = byId('status');
    status.dataset.state = state === 'live' && model.proxy?.status === 'draining' ? 'lost' : state;
    setText(byId('status-text'), state === 'key' ? 'Key needed' : text);
    document.body.classList.toggle('stale', state !== 'live');
    byId('key-form').hidden = state !== 'key';
    if (state !== 'key') return;
    if (text !== '') setText(byId('key-note'), text);
    byId('key').focus();
  },
});

/** @param {Selection} next */
function select(next) {
  const before = selection;
  const same = next?.kind === 'instance' && before?.kind === 'instance' && next.address === before.address;
  selection = same ? undefined : next;
  if (selection?.kind === 'instance') requests.instance = selection.address;
  else if (same || (next === undefined && before?.kind === 'instance')) requests.instance = undefined;
  draw(true);
}

/** @param {boolean} [chosen] somebody has chosen something: that is drawn, paused or not */
function draw(chosen = false) {
  due = false;
  if (document.hidden) return;
  drawFigures();
  fleet.render(selection?.kind === 'instance' ? selection.address : undefined);
  const only = byId('only');
  only.hidden = requests.instance === undefined;
  setText(only, `with ${requests.instance} ✕`);
  if (paused && !chosen) return;
  requests.render(selection?.kind === 'request' ? selection.id : undefined);
  details.render(selection);
}

function drawFigures() {
  const { proxy } = model;
  if (!proxy) return;
  const { perSecond, first50, first95, failed, recent } = model.figures();
  setText(
    byId('about'),
    `${location.host} · version ${proxy.version} · up ${duration(model.now - proxy.startedAt)}`,
  );
  const ms = (/** @type {number | undefined} */ value) => (value === undefined ? '–' : duration(value));
  /** @type {[string, string, string?][]} */
  const figures = [
    ['Under way', count(proxy.running)],
    ['Queued', count(proxy.queued), proxy.queued > 0 ? 'warn' : ''],
    ['Requests per s', perSecond.toFixed(perSecond < 10 ? 2 : 0)],
    ['First token p50', ms(first50)],
    ['First token p95', ms(first95)],
    ['Failed', recent === 0 ? '–' : `${count(failed)} of ${count(recent)}`, failed > 0 ? 'bad' : ''],
  ];
  const list = byId('figures');
  figures.forEach(([name, value, grade = ''], index) => {
    const item = list.children[index] ?? list.appendChild(h('div', {}, h('dt', {}, name), h('dd')));
    const [, shown] = item.children;
    if (!shown) return;
    setText(shown, value);
    shown.className = grade;
  });
}

byId('legend').append(...STAGES.map(([stage, name]) => h('li', {}, swatch(stage), name)));
byId('key-form').addEventListener('submit', (event) => {
  event.preventDefault();
  const input = /** @type {HTMLInputElement} */ (byId('key'));
  stream.useKey(input.value.trim());
  input.value = '';
});
byId('filter').addEventListener('change', ({ target }) => {
  requests.filter = /** @type {HTMLSelectElement} */ (target).value;
  draw(true);
});
byId('scale').addEventListener('change', ({ target }) => {
  requests.each = /** @type {HTMLSelectElement} */ (target).value === 'each';
  draw(true);
});
byId('only').addEventListener('click', () => select(undefined));
byId('pause').addEventListener('click', () => {
  paused = !paused;
  byId('pause').setAttribute('aria-pressed', String(paused));
  setText(byId('pause'), paused ? 'Go on' : 'Pause');
  draw(!paused);
});
document.addEventListener('keydown', ({ key }) => {
  if (key !== 'Escape' || selection === undefined) return;
  const back = selection.kind === 'request' && byId('details').contains(document.activeElement);
  select(undefined);
  if (back) requests.focus();
});
document.addEventListener('visibilitychange', () => draw());

const { theme } = document.documentElement.dataset;
for (const input of byId('theme').querySelectorAll('input')) {
  input.checked = input.value === theme;
  input.addEventListener('change', () => {
    document.documentElement.dataset.theme = input.value;
    localStorage.setItem('pd-theme', input.value);
  });
}

function onTick() {
  model.tick();
  draw();
  setTimeout(onTick, calm.matches ? CALM_DRAW_MS : DRAW_MS);
}
onTick();
void stream.run();
