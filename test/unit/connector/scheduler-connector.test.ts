import { describe, expect, it } from 'vitest';
import { type KvRole, P2pSchedulerConnector } from '../../../src/connector/scheduler-connector.ts';
import { promptDigest } from '../../../src/kv/block-hash.ts';
import { engineRequestId, transferIdOf } from '../../../src/wire/ids.ts';

const PATTERN = '___prefill_addr_[::1]:8082___decode_addr_10.0.0.2:8084_0123456789abcdef0123456789abcdef';
const transferId = transferIdOf(`cmpl-${PATTERN}-1`);
const requestId = engineRequestId(transferId, 'deadbeef');
const promptTokens = Int32Array.from({ length: 10 }, (_, i) => i);
const request = { requestId, transferId, numPromptTokens: 10, promptTokens, mayLoad: true };
const NOTHING = { saves: [], loads: [], cancels: [], lost: [], fills: [], wants: [], unwanted: [] };

function scheduled(numComputedTokens: number, numScheduledTokens: number, blockIds = [5, 3, 9]) {
  return [
    {
      requestId,
      transferId,
      numPromptTokens: 10,
      promptTokens,
      numComputedTokens,
      numScheduledTokens,
      blockIds,
    },
  ];
}

describe('consumer', () => {
  const consumer = () => new P2pSchedulerConnector({ role: 'consumer', blockSize: 4 });

  it('claims the prompt but its last token, less the local hits', () => {
    expect(consumer().getNumNewMatchedTokens(request, 0)).toBe(9);
    expect(consumer().getNumNewMatchedTokens(request, 8)).toBe(1);
    expect(consumer().getNumNewMatchedTokens({ ...request, numPromptTokens: 9 }, 8)).toBe(0);
    expect(consumer().getNumNewMatchedTokens({ ...request, numPromptTokens: 1 }, 0)).toBe(0);
  });

  it('claims nothing for what must be computed here, or whose id names no peer', () => {
    expect(consumer().getNumNewMatchedTokens({ ...request, mayLoad: false }, 0)).toBe(0);
    const local = transferIdOf('cmpl-0123-0');
    expect(consumer().getNumNewMatchedTokens({ ...request, transferId: local }, 0)).toBe(0);
    expect(consumer().transfersKv(local)).toBe(false);
    expect(consumer().transfersKv(transferId)).toBe(true);
  });

  it('describes a load once, with blocks and skipped blocks, and of which prompt it is', () => {
    const connector = consumer();
    connector.updateStateAfterAlloc(request, [5, 3, 9], 4, 5);
    expect(connector.buildConnectorMeta([])).toEqual({
      ...NOTHING,
      loads: [
        {
          requestId,
          transferId,
          promptDigest: promptDigest(promptTokens),
          peer: { host: '::1', port: 8082 },
          numTokens: 5,
          blockIds: [5, 3, 9],
          skipBlocks: 1,
        },
      ],
    });
    expect(connector.buildConnectorMeta([])).toEqual(NOTHING);
  });

  it('loads a request once: not again after a failure, nor when it resumes', () => {
    const connector = consumer();
    connector.updateStateAfterAlloc(request, [5, 3, 9], 0, 9);
    connector.buildConnectorMeta([]);
    connector.requestPreempted(requestId);
    expect(connector.getNumNewMatchedTokens(request, 0)).toBe(0);
    connector.loadFailed(requestId);
    expect(connector.getNumNewMatchedTokens(request, 0)).toBe(0);
    connector.updateStateAfterAlloc(request, [1, 2, 3], 0, 0);
    expect(connector.buildConnectorMeta(scheduled(0, 10))).toEqual(NOTHING);
  });

  it('cancels a load under way when its request is over, also one that no metadata has carried', () => {
    const connector = consumer();
    connector.updateStateAfterAlloc(request, [5, 3, 9], 0, 9);
    connector.requestFinished(requestId);
    const { loads, cancels } = connector.buildConnectorMeta([]);
    expect(loads).toHaveLength(1);
    expect(cancels).toEqual([requestId]);
    expect(connector.buildConnectorMeta([])).toEqual(NOTHING);
  });
});

describe('producer', () => {
  const producer = () => new P2pSchedulerConnector({ role: 'producer', blockSize: 4 });

  it('claims nothing', () => {
    expect(producer().getNumNewMatchedTokens(request, 0)).toBe(0);
  });

  it('saves with the last chunk of the prompt, all its blocks, to the decode instance', () => {
    const connector = producer();
    connector.updateStateAfterAlloc(request, [5, 3, 9], 0, 0);
    expect(connector.buildConnectorMeta(scheduled(0, 6))).toEqual(NOTHING);
    expect(connector.buildConnectorMeta(scheduled(6, 4))).toEqual({
      ...NOTHING,
      saves: [
        {
          requestId,
          transferId,
          promptDigest: promptDigest(promptTokens),
          peer: { host: '10.0.0.2', port: 8084 },
          numTokens: 10,
          blockIds: [5, 3, 9],
        },
      ],
    });
  });

  it('saves once, in the blocks of the step that completes the prompt, whatever came between', () => {
    const connector = producer();
    connector.updateStateAfterAlloc(request, [5, 3, 9], 0, 0);
    connector.buildConnectorMeta(scheduled(0, 6));
    connector.requestPreempted(requestId);
    connector.updateStateAfterAlloc(request, [1, 2, 4], 4, 0);
    const { saves } = connector.buildConnectorMeta(scheduled(4, 6, [1, 2, 4, 7]));
    expect(saves).toMatchObject([{ blockIds: [1, 2, 4] }]);
    connector.requestPreempted(requestId);
    connector.updateStateAfterAlloc(request, [8, 9, 10], 0, 0);
    expect(connector.buildConnectorMeta(scheduled(0, 11, [8, 9, 10]))).toEqual(NOTHING);
    connector.requestFinished(requestId);
    expect(connector.buildConnectorMeta([])).toEqual(NOTHING);
  });

  it('saves nothing for a request whose id names no peer', () => {
    const local = transferIdOf('cmpl-0123-0');
    const metadata = producer().buildConnectorMeta(
      scheduled(0, 10).map((each) => ({ ...each, transferId: local })),
    );
    expect(metadata).toEqual(NOTHING);
  });
});

describe('native', () => {
  const peer = { host: '::1', port: 8082 };
  const terms = { wire: 'native', samplingDigest: 'alike' } as const;
  const digests = { promptDigest: promptDigest(promptTokens), samplingDigest: 'alike' };
  const make = (role: KvRole) => new P2pSchedulerConnector({ role, blockSize: 4, native: true });
  const chunk = (computed: number, count: number, blocks?: number[]) =>
    scheduled(computed, count, blocks).map((each) => ({ ...each, ...terms }));

  it('wants the whole prompt but what is here, once, unless its last token alone is missing', () => {
    const connector = make('consumer');
    const native = { ...request, ...terms };
    expect(connector.getNumNewMatchedTokens(native, 4)).toBe(6);
    connector.updateStateAfterAlloc(native, [5, 3, 9, 7], 4, 6);
    expect(connector.buildConnectorMeta([])).toEqual({
      ...NOTHING,
      wants: [{ requestId, transferId, ...digests, peer, numTokens: 10, skipBlocks: 1, blockIds: [3, 9] }],
    });
    expect(connector.getNumNewMatchedTokens(native, 4)).toBe(0);
    expect(make('consumer').getNumNewMatchedTokens({ ...native, numPromptTokens: 9 }, 8)).toBe(0);
  });

  it.each([
    ['it lacks nothing but the last token', { numPromptTokens: 9 }, 8],
    ['it needs the logits of its whole prompt', { mayLoad: false }, 0],
  ])('tells the producer that nobody will ask where %s', (_, more, local) => {
    const connector = make('consumer');
    const settled = { ...request, ...terms, ...more };
    expect(connector.getNumNewMatchedTokens(settled, local)).toBe(0);
    connector.updateStateAfterAlloc(settled, [5, 3, 9], local, 0);
    connector.requestFinished(requestId);
    expect(connector.buildConnectorMeta([])).toEqual({ ...NOTHING, unwanted: [{ transferId, peer }] });
  });

  it('tells the producer that nobody will ask for a request that ends while it waits', () => {
    const connector = make('consumer');
    connector.getNumNewMatchedTokens({ ...request, ...terms }, 0);
    connector.requestFinished(requestId);
    expect(connector.buildConnectorMeta([])).toEqual({ ...NOTHING, unwanted: [{ transferId, peer }] });
  });

  it('fills with each step of the prompt, and begins again in other blocks after a preemption', () => {
    const connector = make('producer');
    const fill = { requestId, transferId, ...digests, numTokens: 10 };
    expect(connector.buildConnectorMeta(chunk(4, 2))).toEqual({
      ...NOTHING,
      fills: [{ ...fill, numComputed: 6, blockIds: [5, 3] }],
    });
    connector.requestPreempted(requestId);
    expect(connector.buildConnectorMeta(chunk(0, 10, [1, 2, 4]))).toEqual({
      ...NOTHING,
      lost: [transferId],
      fills: [{ ...fill, numComputed: 10, blockIds: [1, 2, 4] }],
    });
    connector.requestPreempted(requestId);
    expect(connector.buildConnectorMeta(chunk(0, 11))).toEqual(NOTHING);
  });

  it('takes the frozen wire where this end has no other, and refuses to guess what both ends compare', () => {
    const frozen = new P2pSchedulerConnector({ role: 'producer', blockSize: 4 });
    expect(frozen.buildConnectorMeta(chunk(0, 10)).saves).toHaveLength(1);
    expect(() =>
      make('producer').buildConnectorMeta(chunk(0, 10).map(({ promptTokens: _, ...rest }) => rest)),
    ).toThrow(expect.objectContaining({ code: 'REQUEST_INVALID' }));
  });
});
