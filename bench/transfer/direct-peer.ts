/** One process of a check of direct writes: does as its parent says, with the product's own parts. */
import { randomBytes } from 'node:crypto';
import { closeSync } from 'node:fs';
import { createCudaDevice } from '../../src/device/cuda.ts';
import { hostMemory, hostView } from '../../src/device/memory.ts';
import { attentionLayerName } from '../../src/device/paged-cache.ts';
import { EventPoller } from '../../src/device/poller.ts';
import { PdError, unreachable } from '../../src/errors.ts';
import { runBytes, runOffset, runsPerBlock } from '../../src/kv/layout.ts';

import { DirectEndpoint, type DirectLink } from '../../src/transport/direct/endpoint.ts';
import { createWhenFree, ExportedCache, processesWith } from '../../src/transport/direct/exported-cache.ts';
import { CacheMapping } from '../../src/transport/direct/mapping.ts';
import { OwnerPage, PAGE_BYTES, SLOTS, WriterPage } from '../../src/transport/direct/page.ts';
import { type BlockTables, type DirectWriter, DirectWriters } from '../../src/transport/direct/writer.ts';
import type { CacheCheck, DirectAnswer, DirectCommand } from './direct-rig.ts';

const [index = '0', folder = ''] = process.argv.slice(2);
const device = await createCudaDevice(Number(index));
const stream = device.createStream();
const poller = new EventPoller();
const nonce = randomBytes(8).toString('hex');
/** And how many bytes more than there are it is told of. */
const admitted = new Map<string, number>();

/** Memory is mapped in steps of this. */
const MAPPED_STEP = 2 * 2 ** 20;

let cache: ExportedCache | undefined;
/** As owner: the page that the last admitted process writes into. */
let page: OwnerPage | undefined;
let freeSlots: number[] = [];
const links = new Set<DirectLink>();
/** As writer. */
let mapping: CacheMapping | undefined;
let writer: DirectWriter | undefined;
let writers: DirectWriters | undefined;
let link: DirectLink | undefined;
let tables: BlockTables | undefined;
let unmappedAfterMs = -1;
/** As owner, for a writer that is killed. */
let endedAt = 0n;

const endpoint = await DirectEndpoint.listen({
  folder,
  nonce,
  admit: (from) => {
    const more = admitted.get(from);
    if (more === undefined || !cache) return undefined;
    const made = OwnerPage.create();
    page = new OwnerPage(made.ref);
    freeSlots = Array.from({ length: SLOTS }, (_, i) => SLOTS - i);
    // sent before this turn of the loop is over
    setImmediate(() => closeSync(made.descriptor));
    const mapped = Math.ceil(cache.claims.bytes / MAPPED_STEP) * MAPPED_STEP;
    const claims = more > 0 ? { ...cache.claims, bytes: mapped + more } : cache.claims;
    return { offer: { claims, cache: cache.descriptor, page: made.descriptor } };
  },
  onLink: (linked) => {
    links.add(linked);
    void linked.ended.then(() => {
      endedAt = process.hrtime.bigint();
      links.delete(linked);
    });
  },
});

const POOL = 8 * 2 ** 20;
const pool = Buffer.alloc(POOL + 2 ** 20);
{
  const words = new Uint32Array(pool.buffer, pool.byteOffset, pool.length / 4);
  let x = 0x9e3779b9;
  for (let i = 0; i < words.length; i++) {
    x ^= x << 13;
    x ^= x >>> 17;
    x ^= x << 5;
    words[i] = x;
  }
}

/** What a run is filled with. */
function content(seed: number, layer: number, block: number, run: number, bytes: number): Buffer {
  const at = (seed * 1_299_709 + layer * 15_485_863 + block * 32_452_843 + run * 49_979_687) % POOL;
  return pool.subarray(at, at + bytes);
}

async function drained(): Promise<void> {
  const event = stream.record();
  await poller.wait(event, 60_000, 'check');
  event.dispose();
}

async function fill(seed: number): Promise<void> {
  for (const [layer, { cache: paged }] of cache!.layers.entries()) {
    const { layout, memory } = paged;
    const host = hostMemory(memory.bytes);
    const bytes = runBytes(layout);
    for (let block = 0; block < layout.numBlocks; block++) {
      for (let run = 0; run < runsPerBlock(layout); run++) {
        hostView(host).set(
          content(seed, layer, block, run, bytes),
          runOffset(layout, layout.numBlocks, block, run),
        );
      }
    }
    device.copy(memory, host, stream);
  }
  await drained();
}

async function check({ seed, from, source, target }: CacheCheck): Promise<Partial<DirectAnswer>> {
  const sourceOf = new Map(target.map((block, i) => [block, source[i]!]));
  let [runs, wrong, first] = [0, 0, ''];
  for (const [layer, { cache: paged }] of cache!.layers.entries()) {
    const { layout, memory } = paged;
    const host = hostMemory(memory.bytes);
    device.copy(host, memory, stream);
    await drained();
    const view = hostView(host);
    const bytes = runBytes(layout);
    for (let block = 0; block < layout.numBlocks; block++) {
      const written = sourceOf.get(block);
      for (let run = 0; run < runsPerBlock(layout); run++, runs++) {
        const offset = runOffset(layout, layout.numBlocks, block, run);
        const expected =
          written === undefined
            ? content(seed, layer, block, run, bytes)
            : content(from, layer, written, run, bytes);
        if (Buffer.compare(view.subarray(offset, offset + bytes), expected) === 0) continue;
        first ||= `layer ${layer}, block ${block}, run ${run}, ${written === undefined ? 'not' : ''} written`;
        wrong++;
      }
    }
  }
  return { runs, wrong, first };
}

async function disconnect(): Promise<void> {
  tables?.release();
  tables = undefined;
  await mapping?.close(writer ? [writer] : []);
  link?.close();
  writer = undefined;
  mapping = undefined;
  link = undefined;
}

async function connect(path: string, to: string): Promise<Partial<DirectAnswer>> {
  await disconnect();
  unmappedAfterMs = -1;
  const connected = await endpoint.connect({ path, nonce: to });
  link = connected;
  const start = performance.now();
  writers ??= new DirectWriters(device, cache!.layers);
  mapping = CacheMapping.open(device, connected.offer!, writers.claims, 'the owner');
  const milliseconds = performance.now() - start;
  writer = await writers.open(mapping.cache);
  connected.tell({ mapped: true });
  const [opened, by] = [mapping, writer];
  // what the integrator does when the other process is dead
  void connected.ended.then(async () => {
    const since = performance.now();
    new WriterPage(opened.cache.page).revokeAll();
    await opened.close([by]);
    unmappedAfterMs = performance.now() - since;
    if (mapping === opened) [mapping, writer, tables] = [undefined, undefined, undefined];
  });
  return { milliseconds, image: writers.kernelImage };
}

/** A launch that takes long, on this process's own memory. */
async function unmapBesideKernel(repeat: number): Promise<Partial<DirectAnswer>> {
  const local = new ExportedCache(
    device,
    cache!.layers[0]!.cache.layout,
    cache!.layers.map(({ name }) => name),
  );
  const made = OwnerPage.create();
  const owner = new OwnerPage(made.ref);
  closeSync(made.descriptor);
  const pageOnDevice = device.runtime.hostRegister(made.ref.address, PAGE_BYTES, 'a page');
  const { memory } = local.layers[0]!.cache;
  if (memory.kind !== 'cuda') throw new PdError('INTERNAL', 'a cache elsewhere');
  const by = await writers!.open({
    pointer: memory.pointer,
    claims: local.claims,
    page: made.ref,
    pageOnDevice,
  });
  const slot = 1;
  owner.grant(slot, 1);
  const all = Int32Array.from({ length: local.claims.blocks }, (_, i) => i);
  const lists = by.tables(all, all)!;
  const start = performance.now();
  for (let i = 0; i < repeat; i++)
    by.write(lists, { first: 0, count: local.layers.length }, { seq: 1, slot, ctas: 1 });
  const unmapping = performance.now();
  await mapping!.close([writer!]);
  const milliseconds = performance.now() - unmapping;
  await by.close(60_000);
  const kernels = performance.now() - start;
  local.dispose();
  [mapping, writer, tables] = [undefined, undefined, undefined];
  return { milliseconds, gpu: BigInt(Math.round(kernels * 1e6)) };
}

async function run(command: DirectCommand): Promise<Partial<DirectAnswer>> {
  switch (command.do) {
    case 'cache': {
      await disconnect();
      cache?.dispose();
      writers = undefined;
      const names = Array.from({ length: command.layers }, (_, i) => attentionLayerName(i));
      const make = () => new ExportedCache(device, command.layout, names);
      let waited = '';
      cache = command.whenFree
        ? await createWhenFree(device, make, {
            // on stand-ins GPUs are no devices of the system
            holders: () => processesWith(/^\/dev\/nvidia\d+$|^\/memfd:pd-standin-gpu/),
            onWait: (why) => {
              waited = why;
              process.send?.('waits');
            },
          })
        : make();
      return { waited };
    }
    case 'admit':
      admitted.set(command.nonce, command.more ?? 0);
      return {};
    case 'connect':
      return connect(command.path, command.nonce);
    case 'disconnect':
      await disconnect();
      return {};
    case 'fill':
      await fill(command.seed);
      return {};
    case 'grant': {
      const slot = freeSlots.pop();
      if (slot === undefined) return {};
      page!.grant(slot, command.seq);
      return { slot };
    }
    case 'revoke':
      page!.revoke(command.slot);
      return {};
    case 'give':
      page!.revoke(command.slot);
      freeSlots.push(command.slot);
      return {};
    case 'tables':
      tables?.release();
      tables = writer!.tables(Int32Array.from(command.source), Int32Array.from(command.target));
      if (!tables) throw new PdError('INTERNAL', 'no room for tables');
      return {};
    case 'write': {
      const { seq, slot, each, ctas, repeat = 1, stop } = command;
      let { mark } = command;
      if (stop) process.kill(process.pid, 'SIGSTOP');
      const layers = cache!.layers.length;
      // awake, as a core thread is
      for (const since = performance.now(); performance.now() - since < 0.5; );
      const at = process.hrtime.bigint();
      for (let i = 0; i < repeat; i++) {
        for (let first = 0; first < layers; first += each, mark++) {
          writer!.write(tables!, { first, count: Math.min(each, layers - first) }, { seq, slot, mark, ctas });
        }
      }
      if (command.drain) {
        const event = writer!.record();
        await poller.wait(event, 60_000, 'writes');
        event.dispose();
      }
      return { at, mark: mark - 1 };
    }
    case 'watch': {
      const { slot, seq, mark } = command;
      const deadline = performance.now() + 20_000;
      for (let flag = page!.flag(slot, seq); ; flag = page!.flag(slot, seq)) {
        if (flag && flag.mark >= mark) {
          const at = process.hrtime.bigint();
          const checked = command.check && (await check(command.check));
          return { at, gpu: flag.ended - flag.began, mark: flag.mark, ...checked };
        }
        if (performance.now() > deadline)
          throw new PdError('KV_LOAD_TIMEOUT', `no flag ${mark}, ${flag?.mark}`);
      }
    }
    case 'check':
      return check(command);
    case 'last-flag': {
      // until there has been no new flag for a while
      const { slot, seq } = command;
      let mark = page!.flag(slot, seq)?.mark ?? 0;
      let flagChangedAt = process.hrtime.bigint();
      for (let now = flagChangedAt; now - flagChangedAt < 300_000_000n; now = process.hrtime.bigint()) {
        const seen = page!.flag(slot, seq)?.mark ?? 0;
        if (seen !== mark) flagChangedAt = now;
        mark = seen;
        await new Promise((resolve) => setImmediate(resolve));
      }
      return { mark, milliseconds: Number(flagChangedAt - endedAt) / 1e6 };
    }
    case 'unmap-beside-kernel':
      return unmapBesideKernel(command.repeat);
    case 'unmap-under-writes':
      await mapping!.close([]);
      return {};
    case 'state': {
      const { free } = device.runtime.memoryInfo();
      return { free, mapped: mapping !== undefined, unmappedAfterMs, connected: links.size };
    }
    default:
      return unreachable(command, 'command');
  }
}

process.on('message', ({ id, command }: { id: number; command: DirectCommand }) => {
  void run(command).then(
    (answer) => process.send?.({ id, ...answer }),
    (error) => {
      const { code, message } = PdError.from(error);
      process.send?.({ id, error: message, code });
    },
  );
});
process.once('disconnect', () => process.exit(0));
process.send?.({ path: endpoint.path, nonce });
