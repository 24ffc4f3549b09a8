/**
 * The events of the proxy, for as long as the page is there. Read by fetch, not by EventSource, which can neither show a key nor say why it
 * was turned away.
 */

/** @import { UiMessage } from '../src/proxy/ui-state.ts' */

/**
 * @typedef {object} Listener
 * @property {(kind: 'state' | 'change', message: UiMessage) => void} told
 * @property {(state: 'live' | 'lost' | 'refused' | 'key', text: string) => void} status `key`: it wants another key
 */

const KEY = 'pd-admin-key';
const SHORTEST_MS = 500;
const LONGEST_MS = 5_000;
/** The proxy says something every ten seconds. */
const SILENT_MS = 25_000;

export class Stream {
  #listener;
  #pauseMs = SHORTEST_MS;
  #wake = () => {};

  /** @param {Listener} listener */
  constructor(listener) {
    this.#listener = listener;
  }

  /** The key that was given in this tab. @returns {string | null} */
  get key() {
    return sessionStorage.getItem(KEY);
  }

  /** @param {string} key for this tab; at once */
  useKey(key) {
    sessionStorage.setItem(KEY, key);
    this.#wake();
  }

  /** What to show of a request to this proxy. @returns {Record<string, string>} */
  get headers() {
    return this.key === null ? {} : { authorization: `Bearer ${this.key}` };
  }

  /** Never ends. */
  async run() {
    for (;;) {
      let wait = true;
      try {
        wait = await this.#follow();
      } catch {
        this.#listener.status('lost', 'Not connected: trying again');
      }
      await this.#pause(wait ? this.#pauseMs : undefined);
      this.#pauseMs = Math.min(LONGEST_MS, this.#pauseMs * 2);
    }
  }

  /** False: to try again is of no use before there is another key. @returns {Promise<boolean>} */
  async #follow() {
    const abort = new AbortController();
    let timer = setTimeout(() => abort.abort(), SILENT_MS);
    try {
      const response = await fetch('ui/events', {
        headers: this.headers,
        signal: abort.signal,
        cache: 'no-store',
      });
      if (!response.ok || !response.body) return await this.#turnedAway(response);
      const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
      let text = '';
      for (;;) {
        const { done, value } = await reader.read();
        if (done) break;
        clearTimeout(timer);
        timer = setTimeout(() => abort.abort(), SILENT_MS);
        const parts = (text + value).split('\n\n');
        text = parts.pop() ?? '';
        for (const part of parts) this.#read(part);
      }
      // It has ended as it should: the proxy stops, or wants to see the key again.
      return true;
    } finally {
      clearTimeout(timer);
      abort.abort();
    }
  }

  /** @param {string} event */
  #read(event) {
    const match = /^event: (state|change)\ndata: (.*)$/.exec(event);
    if (!match) return;
    this.#pauseMs = SHORTEST_MS;
    this.#listener.status('live', 'Live');
    this.#listener.told(/** @type {'state' | 'change'} */ (match[1]), JSON.parse(match[2] ?? ''));
  }

  /** @param {Response} response */
  async #turnedAway(response) {
    const { status } = response;
    const body = await response.json().catch(() => undefined);
    const why = String(body?.error?.message ?? `HTTP ${status}`);
    if (status === 401 || status === 403) {
      const first = this.key === null;
      sessionStorage.removeItem(KEY);
      this.#listener.status('key', first ? '' : why);
      return false;
    }
    this.#listener.status(status === 503 ? 'lost' : 'refused', why);
    return true;
  }

  /** @param {number | undefined} ms undefined: until there is a key */
  #pause(ms) {
    return new Promise((resolve) => {
      const timer = ms === undefined ? undefined : setTimeout(resolve, ms);
      this.#wake = () => {
        clearTimeout(timer);
        resolve(undefined);
      };
    });
  }
}
