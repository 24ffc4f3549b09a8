/** Watchers of the page at /ui that read too slowly, or have watched for long. What they are told otherwise: test/integration/proxy/ui.test.ts. */
import { EventEmitter } from 'node:events';
import { setImmediate as turn } from 'node:timers/promises';
import { pino } from 'pino';
import { expect, test } from 'vitest';
import { proxyConfig } from '../../../src/config/proxy-config.ts';
import { UI_EVENTS_ROUTE, Ui } from '../../../src/proxy/ui.ts';
import { withStoppedClock } from '../../support/stopped-clock.ts';

/** As much of a ServerResponse as is used. It never closes by itself, as where nobody reads. */
class Watcher extends EventEmitter {
  writableLength = 0;
  readonly told: string[] = [];
  /** How it was ended. */
  over: 'end' | 'destroy' | undefined;

  writeHead(): void {}

  write(text: string): void {
    if (this.over === 'end') throw new Error('write after end');
    this.told.push(text);
  }

  end(): void {
    this.over = 'end';
  }

  destroy(): void {
    this.over = 'destroy';
    this.emit('close');
  }
}

/** Something changes at every look. */
function start() {
  let running = 0;
  const snapshot = () => ({
    proxy: {
      ...{ status: 'ok' as const, version: '1', startedAt: 0, queued: 0, paired: false, kept: 1 },
      running: running++,
    },
    instances: [],
    requests: [],
  });
  const ui = new Ui({ config: proxyConfig({}), log: pino({ level: 'silent' }), keyed: true, snapshot });
  let watch: (request: object, reply: object) => Promise<unknown> = async () => {};
  const get = (path: string, ...given: [typeof watch] | [object, typeof watch]) => {
    if (path === UI_EVENTS_ROUTE) watch = given[given.length - 1] as typeof watch;
  };
  ui.attach({ get } as unknown as Parameters<Ui['attach']>[0]);
  return {
    ui,
    watch: async (raw: Watcher) => {
      await watch({ headers: {} }, { raw, hijack: () => {} });
      await turn();
    },
  };
}

test('one that does not read is dropped once it is 4 MiB behind, and holds up no other', async () => {
  await withStoppedClock(async ({ passes }) => {
    const { ui, watch } = start();
    const [slow, other] = [new Watcher(), new Watcher()];
    await watch(slow);
    await watch(other);
    const tick = async () => {
      passes(250);
      await turn();
    };
    slow.writableLength = 4 * 1024 * 1024;
    await tick();
    expect(slow.over).toBeUndefined();
    slow.writableLength++;
    const before = other.told.length;
    await tick();
    await tick();
    expect([slow.over, other.over, other.told.length - before]).toEqual(['destroy', undefined, 2]);
    await ui.close();
    expect(other.over).toBe('end');
  });
});

test('after five minutes one is to come again, is told nothing more though it has not closed yet, and is cut off then', async () => {
  await withStoppedClock(async ({ passes }) => {
    const { ui, watch } = start();
    const [one, later] = [new Watcher(), new Watcher()];
    await watch(one);
    passes(299_000);
    await turn();
    expect(one.over).toBeUndefined();
    await watch(later);
    passes(1_000);
    await turn();
    expect([one.over, later.over]).toEqual(['end', undefined]);
    const [told, before] = [one.told.length, later.told.length];
    passes(250);
    await turn();
    expect([one.told.length, later.told.length]).toEqual([told, before + 1]);
    passes(10_000);
    expect([one.over, later.over]).toEqual(['destroy', undefined]);
    await ui.close();
  });
});
