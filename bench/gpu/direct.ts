/**
 * Direct writes on real GPUs, two processes with the product's own parts: on one GPU, or on two where there are two.
 *
 *   node dist/bench/gpu/direct.js [correct|grant|faults|times ...]        PD_RESULTS=FILE takes the rows as JSON
 *
 * `correct`: every block poisoned and the poison drained, another source each round, the whole cache read back as soon as the flag is seen.
 * `grant`: launches that come when their grant is gone. `faults`: kill -9 of either end and of both in mid-write, unmapping beside a kernel, claims
 * that the memory does not hold. `times`: from the launch to the flag in the other process, median of 15.
 */
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { loadLibcuda } from '../../ffi/libcuda.ts';
import { loadCudart } from '../../ffi/libcudart.ts';
import type { LayoutFamily, PagedLayout } from '../../src/kv/layout.ts';
import type { Dtype } from '../../src/wire/dtype.ts';
import { type BlockPairs, type DirectAnswer, DirectPeer, pair } from '../transfer/direct-rig.ts';

const wanted = new Set(process.argv.slice(2));
const wants = (name: string) => wanted.size === 0 || wanted.has(name);
const small = process.env['PD_SMALL'] === '1';
const MIB = 2 ** 20;
const folder = mkdtempSync(join(tmpdir(), 'pd-direct-'));
const rows: { part: string; name: string; value: string; ok: boolean }[] = [];
let part = '';
let failures = 0;

function row(name: string, value: string, ok = true): void {
  if (!ok) failures++;
  rows.push({ part, name, value, ok });
  console.log(`${ok ? '  ' : 'X '}${name.padEnd(64)} ${value}`);
}
const ms = (value: number) => `${value.toFixed(value < 10 ? 3 : 1)} ms`;
const random = (below: number) => Math.floor(Math.random() * below);
const pause = (milliseconds: number) => new Promise((resolve) => setTimeout(resolve, milliseconds));

function layout(numBlocks: number, rest: Partial<PagedLayout> = {}): PagedLayout {
  return { family: 'kv-first', numBlocks, blockSize: 16, heads: 8, headDim: 128, dtype: 'bfloat16', ...rest };
}
function shuffled(count: number, of: number): number[] {
  const all = Array.from({ length: of }, (_, i) => i);
  for (let i = 0; i < count; i++) {
    const j = i + random(of - i);
    [all[i], all[j]] = [all[j]!, all[i]!];
  }
  return all.slice(0, count);
}
function blocks(count: number, source: number, target: number): BlockPairs {
  return { source: shuffled(count, source), target: shuffled(count, target) };
}

const runtime = loadCudart();
const gpus = runtime.deviceCount();
const OWNER_GPU = gpus > 1 ? 1 : 0;
const peers = new Set<DirectPeer>();
let seq = 0;

async function start(device: number): Promise<DirectPeer> {
  const peer = new DirectPeer(device, folder);
  peers.add(peer);
  await peer.ready;
  return peer;
}
async function both(theirs: PagedLayout, layers: number, ours = theirs) {
  const [writer, owner] = await Promise.all([start(0), start(OWNER_GPU)]);
  await shape({ writer, owner }, theirs, layers, ours);
  return { writer, owner };
}
interface Ends {
  readonly writer: DirectPeer;
  readonly owner: DirectPeer;
}
async function shape(
  { writer, owner }: Ends,
  theirs: PagedLayout,
  layers: number,
  ours = theirs,
): Promise<DirectAnswer> {
  await writer.ask({ do: 'disconnect' });
  await Promise.all([
    writer.ask({ do: 'cache', layout: ours, layers }),
    owner.ask({ do: 'cache', layout: theirs, layers }),
  ]);
  return pair(writer, owner);
}

async function correct(): Promise<void> {
  part = 'correct';
  const ends = await both(layout(64), 4);
  const { writer, owner } = ends;
  const families: LayoutFamily[] = ['kv-first', 'blocks-first', 'mla'];
  const dtypes: Dtype[] = ['bfloat16', 'float16', 'float8_e4m3fn', 'float32'] as Dtype[];
  let [runs, wrong, cases, rounds] = [0, 0, 0, 0];
  let image = '';
  for (let i = 0; i < (small ? 6 : 30); i++) {
    const family = families[i % 3]!;
    const rest = {
      family,
      blockSize: [1, 7, 16, 32, 64][random(5)]!,
      heads: family === 'mla' ? 1 : [1, 2, 8][random(3)]!,
      headDim: family === 'mla' ? [576, 513][random(2)]! : [64, 80, 128, 3][random(4)]!,
      dtype: dtypes[random(4)]!,
    };
    const layers = 1 + random(6);
    const [theirs, ours] = [layout(8 + random(200), rest), layout(8 + random(200), rest)];
    // K first at one end and blocks first at the other is no difference to a write
    const other =
      family !== 'mla' && i % 4 === 0 ? { ...ours, family: families[1 - (i % 3)] ?? family } : ours;
    image = (await shape(ends, theirs, layers, other)).image ?? image;
    cases++;
    for (let round = 0; round < 3; round++, rounds++) {
      const poison = 1_000 + 2 * rounds;
      await Promise.all([
        owner.ask({ do: 'fill', seed: poison }),
        writer.ask({ do: 'fill', seed: poison + 1 }),
      ]);
      const count = 1 + random(Math.min(theirs.numBlocks, ours.numBlocks));
      const chosen = blocks(count, other.numBlocks, theirs.numBlocks);
      const { slot } = await owner.ask({ do: 'grant', seq: ++seq });
      await writer.ask({ do: 'tables', ...chosen });
      const each = round === 0 ? 1 : layers;
      const watching = owner.try({
        do: 'watch',
        seq,
        slot: slot!,
        mark: Math.ceil(layers / each),
        check: { seed: poison, from: poison + 1, ...chosen },
      });
      await writer.ask({
        do: 'write',
        seq,
        slot: slot!,
        mark: 1,
        each,
        ctas: [1, 4, 16, 64, 132][random(5)]!,
      });
      const seen = await watching;
      runs += seen.runs ?? 0;
      wrong += seen.wrong ?? 0;
      if (seen.error || seen.wrong)
        row(JSON.stringify({ rest, layers, count }), seen.error ?? seen.first ?? '', false);
      await owner.ask({ do: 'give', slot: slot! });
    }
  }
  row(
    `random layouts (${image})`,
    `${cases} layouts, ${rounds} rounds, ${runs} runs compared, ${wrong} wrong`,
    wrong === 0 && runs > 0,
  );

  // the same at size, read back as soon as the flag is seen
  const [big, layers] = small ? [layout(64), 4] : [layout(256), 16];
  await shape(ends, big, layers);
  [runs, wrong] = [0, 0];
  const times = small ? 2 : 12;
  for (let round = 0; round < times; round++) {
    const poison = 5_000 + 2 * round;
    await Promise.all([
      owner.ask({ do: 'fill', seed: poison }),
      writer.ask({ do: 'fill', seed: poison + 1 }),
    ]);
    const chosen = blocks(big.numBlocks - 16, big.numBlocks, big.numBlocks);
    const { slot } = await owner.ask({ do: 'grant', seq: ++seq });
    await writer.ask({ do: 'tables', ...chosen });
    const each = round % 2 === 0 ? layers : 1;
    const check = { seed: poison, from: poison + 1, ...chosen };
    const watching = owner.try({ do: 'watch', seq, slot: slot!, mark: layers / each, check });
    await writer.ask({ do: 'write', seq, slot: slot!, mark: 1, each, ctas: 64 });
    const seen = await watching;
    runs += seen.runs ?? 0;
    wrong += seen.wrong ?? (seen.error ? 1 : 0);
    await owner.ask({ do: 'give', slot: slot! });
  }
  row(
    `${(layers * big.numBlocks) / 16} MiB, read back at once`,
    `${times} rounds, ${runs} runs compared, ${wrong} wrong`,
    wrong === 0 && runs > 0,
  );
}

async function grant(): Promise<void> {
  part = 'grant';
  const { writer, owner } = await both(layout(64), 4);
  const chosen = blocks(40, 64, 64);
  const nothing = { source: [], target: [] };
  const untouched = async (name: string, poison: number, slot: number, revoked: number) => {
    const { wrong, runs } = await owner.ask({ do: 'check', seed: poison, from: 0, ...nothing });
    const flag = await owner.ask({ do: 'last-flag', seq: revoked, slot });
    row(
      name,
      `${wrong} of ${runs} runs changed, flag ${flag.mark === 0 ? 'not set' : flag.mark}`,
      wrong === 0 && flag.mark === 0,
    );
  };
  await writer.ask({ do: 'fill', seed: 1 });
  await writer.ask({ do: 'tables', ...chosen });

  await owner.ask({ do: 'fill', seed: 2 });
  const old = ++seq;
  let { slot } = await owner.ask({ do: 'grant', seq: old });
  await owner.ask({ do: 'give', slot: slot! });
  ({ slot } = await owner.ask({ do: 'grant', seq: ++seq }));
  await writer.ask({ do: 'write', seq: old, slot: slot!, mark: 1, each: 4, ctas: 16, drain: true });
  await untouched("a launch for a seq whose slot is another one's", 2, slot!, old);

  for (let round = 0; round < (small ? 1 : 5); round++) {
    const poison = 10 + round;
    await owner.ask({ do: 'fill', seed: poison });
    const stopped = seq;
    const writing = writer.ask({
      do: 'write',
      seq: stopped,
      slot: slot!,
      mark: 1,
      each: 1,
      ctas: 16,
      drain: true,
      stop: true,
    });
    await writer.stopped();
    await owner.ask({ do: 'give', slot: slot! });
    const again = await owner.ask({ do: 'grant', seq: ++seq });
    const before = slot!;
    slot = again.slot!;
    writer.process.kill('SIGCONT');
    await writing;
    await untouched(
      `SIGSTOP before the launch, granted to another, SIGCONT (${round + 1})`,
      poison,
      before,
      stopped,
    );
  }

  // launches that wait in the stream behind a long one while the grant goes
  await owner.ask({ do: 'fill', seed: 30 });
  const last = seq;
  await writer.ask({
    do: 'write',
    seq: last,
    slot: slot!,
    mark: 1,
    each: 4,
    ctas: 1,
    repeat: small ? 3 : 400,
  });
  await owner.ask({ do: 'watch', seq: last, slot: slot!, mark: 1 });
  await owner.ask({ do: 'revoke', slot: slot! });
  const { mark: revokedAt } = await owner.ask({ do: 'last-flag', seq: last, slot: slot! });
  await writer.ask({ do: 'write', seq: last, slot: slot!, mark: 1_000, each: 4, ctas: 1, drain: true });
  await owner.ask({ do: 'fill', seed: 31 });
  await pause(50);
  const { wrong } = await owner.ask({ do: 'check', seed: 31, from: 0, ...nothing });
  row(
    'revoked while 400 launches wait in the stream',
    `flags stopped at ${revokedAt}, ${wrong} runs changed afterwards`,
    wrong === 0 && (revokedAt ?? 0) < 400,
  );
}

async function faults(): Promise<void> {
  part = 'faults';
  const [theirs, layers] = small ? [layout(64), 4] : [layout(1_024), 16];
  const all = {
    source: shuffled(theirs.numBlocks, theirs.numBlocks),
    target: shuffled(theirs.numBlocks, theirs.numBlocks),
  };
  const { writer, owner } = await both(theirs, layers);
  const mib = (layers * theirs.numBlocks) / 16;
  const launches = small ? 20 : 3_000;

  // the owner dies while a long queue of writes is under way
  let { slot } = await owner.ask({ do: 'grant', seq: ++seq });
  await writer.ask({ do: 'tables', ...all });
  const busy = (await writer.ask({ do: 'state' })).free!;
  const writing = writer.try({
    do: 'write',
    seq,
    slot: slot!,
    mark: 1,
    each: layers,
    ctas: 8,
    repeat: small ? 20 : 60,
    drain: true,
  });
  await owner.ask({ do: 'watch', seq, slot: slot!, mark: 1 });
  await owner.kill();
  peers.delete(owner);
  const wrote = await writing;
  let state = await writer.ask({ do: 'state' });
  for (let i = 0; i < 200 && state.mapped; i++) {
    await pause(10);
    state = await writer.ask({ do: 'state' });
  }
  row(
    `owner killed (-9) in mid-write of ${mib} MiB`,
    `writes ${wrote.error ?? 'went on without an error'}, unmapped ${ms(state.unmappedAfterMs ?? -1)} after the end, ${((state.free! - busy) / MIB).toFixed(0)} MiB free again`,
    !state.mapped && wrote.error === undefined,
  );

  // and its successor is written into
  const next = await start(OWNER_GPU);
  await next.ask({ do: 'cache', layout: theirs, layers });
  const mapped = await pair(writer, next);
  row(`its successor's ${mib} MiB mapped, page registered`, ms(mapped.milliseconds!));
  ({ slot } = await next.ask({ do: 'grant', seq: ++seq }));
  await writer.ask({ do: 'tables', ...all });
  await Promise.all([
    next.ask({ do: 'watch', seq, slot: slot!, mark: 1 }),
    writer.ask({ do: 'write', seq, slot: slot!, mark: 1, each: layers, ctas: 64 }),
  ]);
  row('its successor is written into', 'flag seen');

  // both ends die while a long queue of writes is under way: a bystander on that GPU, and who takes the memory next, find what they had
  const bystander = await start(OWNER_GPU);
  await bystander.ask({ do: 'cache', layout: layout(64), layers: 4 });
  await bystander.ask({ do: 'fill', seed: 40 });
  const [lastWriter, lastOwner] = await Promise.all([start(0), start(OWNER_GPU)]);
  await shape({ writer: lastWriter, owner: lastOwner }, theirs, layers);
  ({ slot } = await lastOwner.ask({ do: 'grant', seq: ++seq }));
  await lastWriter.ask({ do: 'tables', ...all });
  void lastWriter.try({
    do: 'write',
    seq,
    slot: slot!,
    mark: 1,
    each: 1,
    ctas: 8,
    repeat: small ? 20 : 60,
    drain: true,
  });
  await lastOwner.ask({ do: 'watch', seq, slot: slot!, mark: 1 });
  for (const peer of [lastWriter, lastOwner]) peer.process.kill('SIGKILL');
  await Promise.all([lastWriter.exit, lastOwner.exit]);
  const heir = await start(OWNER_GPU);
  for (const peer of [lastWriter, lastOwner]) peers.delete(peer);
  await heir.ask({ do: 'cache', layout: theirs, layers, whenFree: true });
  await heir.ask({ do: 'fill', seed: 41 });
  await pause(50);
  const nothing = { source: [], target: [] };
  const changed = await Promise.all([
    bystander.ask({ do: 'check', seed: 40, from: 0, ...nothing }),
    heir.ask({ do: 'check', seed: 41, from: 0, ...nothing }),
  ]);
  const [wrong, runs] = [changed[0].wrong! + changed[1].wrong!, changed[0].runs! + changed[1].runs!];
  row(
    `both ends killed (-9) in mid-write of ${mib} MiB`,
    `${wrong} of ${runs} runs of a bystander and of the memory's next owner changed`,
    wrong === 0,
  );
  for (const peer of [bystander, heir]) {
    peers.delete(peer);
    await peer.kill();
  }

  // unmapping beside a kernel of this process that runs for long
  const beside = await writer.ask({ do: 'unmap-beside-kernel', repeat: small ? 2 : 24 });
  row(
    'unmapping beside a kernel',
    `${ms(beside.milliseconds!)}, the kernel went on for ${ms(Number(beside.gpu) / 1e6)}`,
  );

  const tooMuch = await next.try({ do: 'map-too-much', more: 2 * MIB });
  row(
    'mapping 2 MiB more than there is',
    tooMuch.error?.slice(0, 100) ?? 'went through',
    tooMuch.error !== undefined,
  );

  // the writer dies with launches queued: how long do they land after the end of its socket
  const ends: number[] = [];
  let marks = '';
  for (let round = 0; round < (small ? 1 : 6); round++) {
    const from = round === 0 ? writer : await start(0);
    if (round > 0) await from.ask({ do: 'cache', layout: theirs, layers });
    await pair(from, next);
    ({ slot } = await next.ask({ do: 'grant', seq: ++seq }));
    await from.ask({ do: 'tables', ...all });
    const repeat = Math.ceil(launches / layers);
    const [each, ctas] = round % 2 === 0 ? [1, 16] : [layers, 1];
    const endless = from.try({ do: 'write', seq, slot: slot!, mark: 1, each, ctas, repeat, drain: true });
    await next.ask({ do: 'watch', seq, slot: slot!, mark: 1 });
    const watching = next.ask({ do: 'last-flag', seq, slot: slot! });
    from.process.kill('SIGKILL');
    await endless;
    peers.delete(from);
    const end = await watching;
    ends.push(end.milliseconds!);
    marks += ` ${end.mark}/${(repeat * layers) / each}`;
  }
  row(
    'writer killed (-9) with launches queued',
    `last flag${marks}, after the socket's end: ${ends.map(ms).join(', ')}`,
  );
  const after = await next.ask({ do: 'state' });
  row(
    'the owner goes on',
    `${after.connected} connections, ${(after.free! / MIB).toFixed(0)} MiB free`,
    after.connected === 0,
  );
}

async function times(): Promise<void> {
  part = 'times';
  const [theirs, layers] = small ? [layout(64), 4] : [layout(1_024), 32];
  const { writer, owner } = await both(theirs, layers);
  const sizes: [string, number][] = small
    ? [['16 MiB', 64]]
    : [
        ['2 MiB (16 tokens)', 1],
        ['32 MiB', 16],
        ['128 MiB (1,024 tokens)', 64],
        ['2 GiB', 1_024],
      ];
  for (const [name, count] of sizes) {
    await writer.ask({ do: 'tables', ...blocks(count, theirs.numBlocks, theirs.numBlocks) });
    const bytes = count * 64 * 1024 * layers;
    const line: string[] = [];
    for (const ctas of small ? [4] : [4, 8, 16, 32, 64, 132]) {
      const { slot } = await owner.ask({ do: 'grant', seq: ++seq });
      const took: number[] = [];
      const gpu: number[] = [];
      for (let i = 1; i <= 15; i++) {
        const watching = owner.ask({ do: 'watch', seq, slot: slot!, mark: i });
        await pause(3);
        const { at } = await writer.ask({ do: 'write', seq, slot: slot!, mark: i, each: layers, ctas });
        const seen = await watching;
        took.push(Number(seen.at! - at!) / 1e6);
        gpu.push(Number(seen.gpu!) / 1e6);
      }
      await owner.ask({ do: 'give', slot: slot! });
      const median = (list: number[]) => list.sort((a, b) => a - b)[list.length >> 1]!;
      const [all, on] = [median(took), median(gpu)];
      line.push(`${ctas}: ${all.toFixed(3)} (GPU ${on.toFixed(3)}, ${(bytes / on / 1e6).toFixed(0)} GB/s)`);
    }
    row(name, line.join('  '));
  }
  // layer by layer, as behind each layer's event
  await writer.ask({ do: 'tables', ...blocks(small ? 8 : 64, theirs.numBlocks, theirs.numBlocks) });
  for (const ctas of small ? [4] : [16, 64]) {
    const { slot } = await owner.ask({ do: 'grant', seq: ++seq });
    const took: number[] = [];
    for (let i = 1; i <= 15; i++) {
      const watching = owner.ask({ do: 'watch', seq, slot: slot!, mark: layers * i });
      await pause(3);
      const { at } = await writer.ask({
        do: 'write',
        seq,
        slot: slot!,
        mark: layers * (i - 1) + 1,
        each: 1,
        ctas,
      });
      took.push(Number((await watching).at! - at!) / 1e6);
    }
    took.sort((a, b) => a - b);
    row(
      `${layers} launches of a layer each, 1,024 tokens, ${ctas} thread blocks`,
      ms(took[took.length >> 1]!),
    );
    await owner.ask({ do: 'give', slot: slot! });
  }
}

const parts = { correct, grant, faults, times };
row(
  'GPUs',
  `${gpus}, ${loadLibcuda().deviceName(0)}; ${gpus > 1 ? 'written from one to the other' : 'both processes on one'}`,
);
for (const [name, go] of Object.entries(parts)) {
  if (!wants(name)) continue;
  const began = performance.now();
  try {
    await go();
  } catch (error) {
    row(name, (error as Error).message, false);
  }
  await Promise.all([...peers].map((peer) => peer.kill()));
  peers.clear();
  console.log(`  ${name}: ${((performance.now() - began) / 1e3).toFixed(1)} s`);
}
rmSync(folder, { recursive: true, force: true });
const file = process.env['PD_RESULTS'];
if (file) writeFileSync(file, `${JSON.stringify(rows, null, 2)}\n`);
console.log(
  failures === 0 ? 'direct: all as it should be' : `direct: ${failures} rows are not as they should be`,
);
process.exit(failures === 0 ? 0 : 1);
