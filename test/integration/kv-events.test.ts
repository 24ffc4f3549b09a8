/** What a worker's publisher of KV events says to readers of other makes, and to our proxy's, over real sockets. */
import { type ChildProcess, spawn } from 'node:child_process';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';
import { encode } from '@msgpack/msgpack';
import { afterEach, describe, expect, test, vi } from 'vitest';
import { Dealer, Publisher, Router } from 'zeromq';
import { type BlockHash, extendHashes, keyOf } from '../../src/kv/block-hash.ts';
import type { HostPort } from '../../src/net/address.ts';
import { createLogger } from '../../src/observability/log.ts';
import { KvFeeds } from '../../src/proxy/kv-feeds.ts';
import { PrefixIndex } from '../../src/proxy/prefix-index.ts';
import { InstanceRegistry } from '../../src/proxy/registry.ts';
import type { CacheChange } from '../../src/scheduler/types.ts';
import {
  type BlockKey,
  decodeSnapshot,
  encodeKvEvents,
  encodeSequence,
  encodeSnapshot,
} from '../../src/wire/kv-events.ts';
import { KvEventPublisher, type KvEventsOptions } from '../../src/worker/kv-events.ts';
import { pythonWith } from '../../support/python-peer.ts';
import { keptPort } from '../support/transfer.ts';

const SCRIPT = fileURLToPath(new URL('../../support/peers/kv_events.py', import.meta.url));
const LOG = createLogger({ level: 'silent', format: 'json' }, 'test');
const python = pythonWith('msgpack, zmq');

const closing: (() => unknown)[] = [];
afterEach(async () => {
  for (const close of closing.splice(0).reverse()) await close();
});

async function publisher(options: Partial<KvEventsOptions> = {}): Promise<KvEventPublisher> {
  const opened = await KvEventPublisher.open({
    bind: { host: '127.0.0.1', port: 0 },
    model: 'demo',
    blockSize: 4,
    form: 'map',
    medium: 'GPU',
    log: LOG,
    ...options,
  });
  closing.push(() => opened.close());
  opened.announce('127.0.0.1:8081');
  return opened;
}

/** The blocks of a prompt, as a scheduler would say that they are cached. */
function prompt(first: number, blocks: number): { hashes: BlockHash[]; stored: CacheChange } {
  const tokens = Int32Array.from({ length: blocks * 4 }, (_, i) => first + i);
  const hashes: BlockHash[] = [];
  extendHashes(hashes, tokens, 4);
  return { hashes, stored: { type: 'stored', hashes, tokens } };
}

/** A subscription takes effect a moment after the connection: says something until it is heard. */
async function untilHeard(one: KvEventPublisher, heard: () => boolean): Promise<void> {
  while (!heard()) {
    one.publish([{ type: 'removed', hash: prompt(9_000, 1).hashes[0]! }]);
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
}

interface Line {
  readonly topic?: string;
  readonly sequence?: number;
  readonly replay?: boolean;
  readonly end?: number;
  readonly events?: readonly unknown[];
}

describe.skipIf(python === undefined)('a subscriber in Python', () => {
  function subscriber({ ports }: KvEventPublisher) {
    const at = (port: number) => `tcp://127.0.0.1:${port}`;
    const child: ChildProcess = spawn(python!, ['-B', SCRIPT, at(ports.publish), at(ports.replay)], {
      stdio: ['pipe', 'pipe', 'inherit'],
    });
    closing.push(() => child.kill('SIGKILL'));
    const lines: Line[] = [];
    let wake = () => {};
    createInterface({ input: child.stdout! }).on('line', (line) => {
      lines.push(JSON.parse(line) as Line);
      wake();
    });
    const said = async (fits: (line: Line) => boolean): Promise<Line> => {
      for (;;) {
        const line = lines.find(fits);
        if (line) return line;
        await new Promise<void>((resolve) => {
          wake = resolve;
        });
      }
    };
    return { lines, said, tell: (line: string) => child.stdin!.write(`${line}\n`) };
  }

  test.each(['map', 'positional'] as const)(
    'reads the %s form by vLLM’s topic, and replays',
    async (form) => {
      const one = await publisher({ form });
      const reader = subscriber(one);
      await untilHeard(one, () => reader.lines.length > 0);
      const { hashes, stored } = prompt(100, 3);
      one.publish([stored, { type: 'removed', hash: hashes[2]! }]);
      const isIt = ({ events = [] }: Line) => events.length === 2;
      const line = await reader.said(isIt);
      expect(line.topic).toBe('kv@127.0.0.1:8081@demo');
      const [first, second] = line.events!;
      const fields =
        form === 'map'
          ? (first as Record<string, unknown>)
          : Object.fromEntries(
              [
                'type',
                'block_hashes',
                'parent_block_hash',
                'token_ids',
                'block_size',
                'lora_id',
                'medium',
              ].map((name, at) => [name, (first as unknown[])[at]]),
            );
      expect(fields).toMatchObject({
        type: 'BlockStored',
        parent_block_hash: null,
        token_ids: Array.from({ length: 12 }, (_, i) => 100 + i),
        block_size: 4,
        medium: 'GPU',
      });
      expect(fields['block_hashes']).toHaveLength(3);
      expect(JSON.stringify(second)).toContain('BlockRemoved');

      reader.tell(`replay ${line.sequence}`);
      await reader.said(({ end }) => end === -1);
      expect(reader.lines.filter(({ replay }) => replay)).toEqual([
        expect.objectContaining({ sequence: line.sequence, events: line.events }),
      ]);
    },
  );
});

test('a snapshot is all that is cached, and as of which batch', async () => {
  const one = await publisher();
  const kept = prompt(0, 2);
  const gone = prompt(500, 1);
  one.publish([kept.stored, gone.stored]);
  one.publish([{ type: 'removed', hash: gone.hashes[0]! }]);
  const asking = new Dealer({ linger: 0 });
  closing.push(() => asking.close());
  asking.connect(`tcp://127.0.0.1:${one.ports.snapshot}`);
  await asking.send(['', 'junk that is no question', 'more']);
  const [, header, keys] = await asking.receive();
  expect(decodeSnapshot(header!, keys!)).toEqual({ sequence: 1, blockSize: 4, keys: kept.hashes.map(keyOf) });
});

describe('our own reader', () => {
  function follow(one: KvEventPublisher) {
    const registry = new InstanceRegistry(60_000);
    const [added] = registry.announce({
      role: 'producer',
      httpAddress: '127.0.0.1:8081',
      zmqAddress: '127.0.0.1:8082',
      events: one.ports,
    })!;
    const known = new Set<BlockKey>();
    const lost: string[] = [];
    const blocks = {
      replace: (keys: readonly BlockKey[]) => {
        known.clear();
        for (const key of keys) known.add(key);
      },
      insert: (keys: readonly BlockKey[]) => {
        for (const key of keys) known.add(key);
      },
      remove: (keys: readonly BlockKey[]) => {
        for (const key of keys) known.delete(key);
      },
    };
    const feeds = new KvFeeds(
      LOG,
      () => blocks,
      (reason) => lost.push(reason),
    );
    closing.push(() => feeds.close());
    feeds.add(added!.instance);
    return { known, lost, feeds, address: added!.instance.httpAddress };
  }

  test('knows what was cached before it came, and what came and went since', async () => {
    const one = await publisher();
    const early = prompt(0, 2);
    one.publish([early.stored]);
    const { known, lost, feeds, address } = follow(one);
    const late = prompt(700, 3);
    one.publish([late.stored, { type: 'removed', hash: early.hashes[1]! }]);
    const expected = [early.hashes[0]!, ...late.hashes].map(keyOf).sort();
    await untilHeard(one, () => feeds.blockSizeOf(address) === 4 && known.size === expected.length);
    expect([...known].sort()).toEqual(expected);
    expect(lost.filter((reason) => reason !== 'gap')).toEqual([]);
  });

  test('finds a worker again that has begun anew on its ports, with nothing cached', async () => {
    const bind = { host: '127.0.0.1', port: await keptPort() };
    const first = await publisher({ bind });
    first.publish([prompt(0, 2).stored]);
    const { known, feeds, address } = follow(first);
    await untilHeard(first, () => feeds.blockSizeOf(address) === 4 && known.size === 2);
    await first.close();
    const second = await reopened(bind);
    const after = prompt(300, 1);
    second.publish([after.stored]);
    await untilHeard(second, () => known.has(keyOf(after.hashes[0]!)) && known.size === 1);
  });
});

describe('a publisher that means harm', () => {
  async function hostile() {
    const events = new Publisher({ linger: 0, sendHighWaterMark: 0 });
    const snapshots = new Router({ linger: 0 });
    closing.push(
      () => events.close(),
      () => snapshots.close(),
    );
    for (const socket of [events, snapshots]) await socket.bind('tcp://127.0.0.1:*');
    const portOf = ({ lastEndpoint }: Publisher | Router) => Number(lastEndpoint!.split(':').at(-1));
    const registry = new InstanceRegistry(60_000);
    const ports = { publish: portOf(events), replay: 1, snapshot: portOf(snapshots) };
    const ping = { role: 'producer', httpAddress: '127.0.0.1:8081', zmqAddress: '127.0.0.1:8082' } as const;
    const [added] = registry.announce({ ...ping, events: ports })!;
    const lost: string[] = [];
    const index = new PrefixIndex(1_000);
    const blocks = {
      replace: (keys: readonly BlockKey[]) => {
        index.forget('it');
        index.insert('it', keys, 100);
      },
      insert: (keys: readonly BlockKey[]) => index.insert('it', keys, 100),
      remove: (keys: readonly BlockKey[]) => index.remove('it', keys),
    };
    const feeds = new KvFeeds(
      LOG,
      () => blocks,
      (reason) => lost.push(reason),
    );
    closing.push(() => feeds.close());
    feeds.add(added!.instance);
    let sequence = 0;
    const batch = (body: Uint8Array) => events.send(['kv@x@y', encodeSequence(sequence++), body]);
    /** It takes a moment until anybody hears. */
    const untilRead = async () => {
      while (!lost.includes('invalid')) {
        await batch(Buffer.from('junk'));
        await new Promise((resolve) => setTimeout(resolve, 20));
      }
    };
    const stored = (from: number, count: number) => {
      const keys = Array.from({ length: count }, (_, i) => String(from + i).padStart(8) as BlockKey);
      const tokens = new Array<number>(count * 16).fill(1);
      return encodeKvEvents(
        { time: 0, events: [{ type: 'stored', keys, tokens, blockSize: 16 }] },
        'map',
        'GPU',
      );
    };
    return { snapshots, lost, index, feeds, batch, stored, untilRead, address: ping.httpAddress };
  }

  test('junk, bombs and snapshots that lie are told and forgotten; what it claims to have is bounded', async () => {
    const { snapshots, lost, index, batch, stored, untilRead } = await hostile();
    await untilRead();
    const seen = lost.length;
    // Arrays of arrays, each of which says that it has four billion elements; one nested deeper than any stack.
    await batch(Buffer.from('dd00000002cb0000000000000000ddffffffff', 'hex'));
    await batch(Buffer.from('91'.repeat(100_000), 'hex'));
    while (lost.length < seen + 2) await new Promise((resolve) => setTimeout(resolve, 5));

    const [identity] = await snapshots.receive();
    const answer = (header: Uint8Array, keys: Uint8Array) => snapshots.send([identity!, '', header, keys]);
    const before = lost.length;
    await answer(encode({ version: 1, sequence: -1, block_size: 16, count: 2 ** 40 }), Buffer.alloc(8));
    while (lost.length === before) await new Promise((resolve) => setTimeout(resolve, 5));
    const keys = Array.from({ length: 5_000 }, (_, i) => String(i).padStart(8) as BlockKey);
    const [header, bytes] = encodeSnapshot({ sequence: 2 ** 40, blockSize: 16, keys });
    await answer(header, bytes);
    while (index.size === 0) await new Promise((resolve) => setTimeout(resolve, 5));
    // The limit, and an eighth of it to spare.
    expect(index.size).toBe(100 - Math.floor(100 / 8));
    const then = lost.length;
    await batch(stored(10_000, 3_000));
    await batch(Buffer.from('junk again'));
    while (lost.length === then) await new Promise((resolve) => setTimeout(resolve, 5));
    expect(index.size).toBeLessThanOrEqual(100);
  });

  test('a snapshot that was not asked for is not taken', async () => {
    const { snapshots, lost, index } = await hostile();
    const [identity] = await snapshots.receive();
    const answer = (keys: readonly string[]) =>
      snapshots.send([
        identity!,
        '',
        ...encodeSnapshot({ sequence: 2 ** 40, blockSize: 16, keys: keys as BlockKey[] }),
      ]);
    await answer(['12345678']);
    while (index.size === 0) await new Promise((resolve) => setTimeout(resolve, 5));
    await answer([]);
    const before = lost.length;
    await snapshots.send([identity!, 'no snapshot']);
    while (lost.length === before) await new Promise((resolve) => setTimeout(resolve, 5));
    expect(index.size).toBe(1);
    // One second lasts until it has said too much.
    vi.useFakeTimers({ toFake: ['performance'] });
    closing.push(() => vi.useRealTimers());
    for (let i = 0; i < 9; i++)
      await snapshots.send([identity!, '', Buffer.alloc(1), Buffer.alloc(8 * 2 ** 20)]);
    while (!lost.includes('flood')) await new Promise((resolve) => setTimeout(resolve, 5));
  });

  test('more than 64 MiB in a second are not read any more', async () => {
    const { snapshots, lost, feeds, batch, stored, untilRead, address } = await hostile();
    const answer = encodeSnapshot({ sequence: -1, blockSize: 16, keys: [] });
    void (async () => {
      for await (const [identity] of snapshots) await snapshots.send([identity!, '', ...answer]);
      // The test may end while it sends.
    })().catch(() => {});
    await untilRead();
    while (feeds.blockSizeOf(address) === undefined) await new Promise((resolve) => setTimeout(resolve, 5));
    const much = stored(0, 60_000);
    // One second lasts until all of it has been read.
    vi.useFakeTimers({ toFake: ['performance'] });
    closing.push(() => vi.useRealTimers());
    for (let sent = 0; sent <= 64 * 2 ** 20; sent += much.length) await batch(much);
    while (!lost.includes('flood')) await new Promise((resolve) => setTimeout(resolve, 5));
    expect(feeds.blockSizeOf(address)).toBeUndefined();
  });
});

/** libzmq gives ports back a moment after their sockets are closed. */
async function reopened(bind: HostPort): Promise<KvEventPublisher> {
  for (;;) {
    try {
      return await publisher({ bind });
    } catch {
      await new Promise((resolve) => setTimeout(resolve, 20));
    }
  }
}
