/** Two processes that write into each other's caches, over stand-ins whose launches come late and whose memory outlives its owner. */
import { afterEach, beforeAll, expect, test } from 'vitest';
import { DirectPeer, pair, tryPair } from '../../../bench/transfer/direct-rig.ts';
import type { PagedLayout } from '../../../src/kv/layout.ts';
import { useStandIns } from '../../stand-ins/build.ts';
import { rows, withTheOthers } from '../../support/rows.ts';
import { sharedTempDir } from '../../support/temp-dir.ts';

const LAYERS = 3;
const LAYOUT: PagedLayout = {
  family: 'kv-first',
  numBlocks: 24,
  blockSize: 16,
  heads: 2,
  headDim: 64,
  dtype: 'bfloat16',
};
const peers: DirectPeer[] = [];
const folder = sharedTempDir();

beforeAll(() => {
  useStandIns();
});
afterEach(async () => {
  await Promise.all(peers.splice(0).map((peer) => peer.kill()));
});

async function start(
  layout = LAYOUT,
  env: Record<string, string> = {},
  layers = LAYERS,
): Promise<DirectPeer> {
  const peer = new DirectPeer(0, folder, env);
  peers.push(peer);
  await peer.ready;
  await peer.ask({ do: 'cache', layout, layers });
  return peer;
}

async function startPair(ours = LAYOUT, theirs = LAYOUT) {
  const [writer, owner] = await Promise.all([start(ours), start(theirs)]);
  await pair(writer, owner);
  return { writer, owner };
}

const round = async (
  { writer, owner }: Awaited<ReturnType<typeof startPair>>,
  blocks: { readonly source: number[]; readonly target: number[] },
  seq: number,
  each: number,
) => {
  await Promise.all([
    writer.ask({ do: 'fill', seed: 2 * seq }),
    owner.ask({ do: 'fill', seed: 2 * seq + 1 }),
  ]);
  const { slot } = await owner.ask({ do: 'grant', seq });
  await writer.ask({ do: 'tables', ...blocks });
  const check = { seed: 2 * seq + 1, from: 2 * seq, ...blocks };
  const watching = owner.ask({ do: 'watch', seq, slot: slot!, mark: Math.ceil(LAYERS / each), check });
  await writer.ask({ do: 'write', seq, slot: slot!, mark: 1, each, ctas: 4 });
  const seen = await watching;
  await owner.ask({ do: 'give', slot: slot! });
  return seen;
};

test.each(
  rows<[string, PagedLayout, PagedLayout]>(
    [
      [
        'sizes that are no multiples of 16 bytes',
        { ...LAYOUT, blockSize: 7, headDim: 3 },
        { ...LAYOUT, blockSize: 7, headDim: 3, numBlocks: 40 },
      ],
    ],
    [
      ['K first here, blocks first there', LAYOUT, { ...LAYOUT, family: 'blocks-first' }],
      ['K and V apart, other numbers of blocks', LAYOUT, { ...LAYOUT, numBlocks: 40 }],
      [
        'MLA of 8 bits',
        { ...LAYOUT, family: 'mla', heads: 1, headDim: 576, dtype: 'float8_e4m3fn' },
        { ...LAYOUT, family: 'mla', heads: 1, headDim: 576, dtype: 'float8_e4m3fn' },
      ],
    ],
  ),
)('every block lies where it was wanted, and no other byte has changed: %s', async (_, ours, theirs) => {
  const ends = await startPair(ours, theirs);
  const blocks = { source: [3, 1, 7, 0, 23], target: [20, 0, 5, 23, 1] };
  for (const [seq, each] of [
    [1, 1],
    [2, LAYERS],
    [3, 2],
  ] as const) {
    expect(await round(ends, blocks, seq, each)).toMatchObject({ wrong: 0, mark: Math.ceil(LAYERS / each) });
  }
});

test.each(rows([1_025], [1_024]))('%i blocks in one write', async (count) => {
  const small = { ...LAYOUT, numBlocks: 1_100, blockSize: 1, heads: 1 };
  const ends = await startPair(small, small);
  const source = Array.from({ length: count }, (_, i) => i);
  const target = source.map((block) => 1_099 - block);
  expect(await round(ends, { source, target }, 1, LAYERS)).toMatchObject({ wrong: 0 });
});

if (!withTheOthers) {
  test("a writer that was stopped before its launch changes no byte once its slot is another seq's", async () => {
    const { writer, owner } = await startPair();
    const blocks = { source: [3, 1, 7], target: [20, 0, 5] };
    await writer.ask({ do: 'fill', seed: 1 });
    const { slot } = await owner.ask({ do: 'grant', seq: 1 });
    await writer.ask({ do: 'tables', ...blocks });
    const writing = writer.ask({
      do: 'write',
      seq: 1,
      slot: slot!,
      mark: 1,
      each: 1,
      ctas: 4,
      drain: true,
      stop: true,
    });
    await writer.stopped();
    await owner.ask({ do: 'give', slot: slot! });
    expect(await owner.ask({ do: 'grant', seq: 2 })).toMatchObject({ slot });
    await owner.ask({ do: 'fill', seed: 2 });
    writer.process.kill('SIGCONT');
    await writing;
    expect(await owner.ask({ do: 'check', seed: 2, from: 1, source: [], target: [] })).toMatchObject({
      wrong: 0,
    });
    expect(await owner.ask({ do: 'last-flag', seq: 1, slot: slot! })).toMatchObject({ mark: 0 });
  });

  test('an owner killed in mid-write: writes end without an error, the mapping goes, and its successor gets its memory back and is written into', async () => {
    // a GPU that holds one cache and not two
    const env = { PD_STANDIN_GPUS: `direct-${process.pid}`, PD_STANDIN_MEMORY_MB: '9' };
    const big = { ...LAYOUT, numBlocks: 170 };
    const owner = await start(big, env);
    const writer = await start(LAYOUT);
    await pair(writer, owner);
    const { slot } = await owner.ask({ do: 'grant', seq: 1 });
    await writer.ask({ do: 'tables', source: [0, 1, 2], target: [0, 1, 2] });
    const writing = writer.try({
      do: 'write',
      seq: 1,
      slot: slot!,
      mark: 1,
      each: 1,
      ctas: 4,
      repeat: 50,
      drain: true,
    });
    await owner.ask({ do: 'watch', seq: 1, slot: slot!, mark: 1 });
    // the writer holds the memory of the dead owner for as long as it is stopped
    writer.process.kill('SIGSTOP');
    await writer.stopped();
    await owner.kill();
    const next = new DirectPeer(0, folder, env);
    peers.push(next);
    await next.ready;
    expect(await next.try({ do: 'cache', layout: big, layers: LAYERS })).toMatchObject({
      code: 'OUT_OF_DEVICE_MEMORY',
    });
    const waits = new Promise<void>((resolve) => {
      next.waits = resolve;
    });
    const waiting = next.ask({ do: 'cache', layout: big, layers: LAYERS, whenFree: true });
    await waits;
    writer.process.kill('SIGCONT');
    expect((await writing).error).toBeUndefined();
    expect((await waiting).waited).toMatch(
      new RegExp(`process(es)? ha(s|ve) this GPU open: .*${writer.process.pid} \\(`),
    );
    await pair(writer, next);
    await writer.ask({ do: 'tables', source: [0, 1, 2], target: [0, 1, 2] });
    const again = await next.ask({ do: 'grant', seq: 2 });
    const watching = next.ask({ do: 'watch', seq: 2, slot: again.slot!, mark: 1 });
    await writer.ask({ do: 'write', seq: 2, slot: again.slot!, mark: 1, each: LAYERS, ctas: 4 });
    await watching;
  });

  test('unmapping waits for our own writes; without that the process would end', async () => {
    const env = { PD_STANDIN_WRITE_US: '20000' };
    const owner = await start();
    for (const [how, survives] of [
      ['disconnect', true],
      ['unmap-under-writes', false],
    ] as const) {
      const writer = await start(LAYOUT, env);
      await pair(writer, owner);
      const { slot } = await owner.ask({ do: 'grant', seq: 1 });
      await writer.ask({ do: 'tables', source: [0, 1], target: [0, 1] });
      // Those that are to be under way still, however late the next command is read, end with their process.
      const repeat = survives ? 20 : 500;
      void writer.try({ do: 'write', seq: 1, slot: slot!, mark: 1, each: 1, ctas: 4, repeat });
      await writer.try({ do: how });
      if (survives) expect(await writer.ask({ do: 'state' })).toMatchObject({ mapped: false });
      else expect(await writer.exit).toBe('SIGABRT');
    }
  });

  test('more memory than there is does not map, and a cache of another geometry is refused', async () => {
    const owner = await start();
    const alike = await start();
    expect(await tryPair(alike, owner, 2 * 2 ** 20)).toMatchObject({
      code: 'DIRECT_REFUSED',
      error: expect.stringMatching(
        /^the KV cache of the owner cannot be mapped as \d+ bytes: .*cuMemMap failed/,
      ),
    });
    const writer = await start({ ...LAYOUT, heads: 1 });
    expect(await tryPair(writer, owner)).toMatchObject({
      code: 'DIRECT_REFUSED',
      error: expect.stringContaining('heads is 2 there and 1 here'),
    });
  });
}
