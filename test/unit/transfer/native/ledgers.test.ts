/** What one ledger says when the other end is slow, late or false; both against each other in ledgers.property.test.ts. */
import { describe, expect, it } from 'vitest';
import type { Ask, GrantAction, WantAction } from '../../../../src/transfer/native/actions.ts';
import { Grants } from '../../../../src/transfer/native/grants.ts';
import type {
  AckMessage,
  ConsumerMessage,
  DoneMessage,
  DropMessage,
  Nonce,
  ProducerMessage,
  Ticket,
  WantMessage,
} from '../../../../src/transfer/native/messages.ts';
import { Wants } from '../../../../src/transfer/native/wants.ts';
import type { TransferId } from '../../../../src/wire/ids.ts';

const ID = 'request' as TransferId;
const PRODUCER = 'p'.repeat(32) as Nonce;
const CONSUMER = 'c'.repeat(32) as Nonce;
const TICKET = 't'.repeat(32) as Ticket;
const DIGEST = 'prompt';
const said = (
  actions: readonly (GrantAction | WantAction)[],
): readonly (ProducerMessage | ConsumerMessage)[] =>
  actions.flatMap((action) => (action.kind === 'send' ? [action.message] : []));
const commands = (actions: readonly (GrantAction | WantAction)[]) => said(actions).map(({ cmd }) => cmd);

const WANT: WantMessage = {
  cmd: 'WANT',
  from: CONSUMER,
  to: PRODUCER,
  seq: 1,
  ticket: TICKET,
  floor: 1,
  id: ID,
  promptDigest: DIGEST,
  tokens: 4,
  skip: 0,
  blocks: [7],
  samplingDigest: 'greedy',
  transport: 'host',
};
const DRAW = { drawn: [5], samplingDigest: 'greedy' };

describe('a producer', () => {
  function start() {
    const grants = new Grants({
      nonce: PRODUCER,
      blockSize: 4,
      names: (_, peer) => peer === 'consumer',
      unboundMs: 5_000,
      leaseMs: 5_000,
    });
    grants.introduced('consumer', CONSUMER, 16, 0);
    return grants;
  }
  /** Of a prompt that is computed and drawn from; its write has not landed. */
  function written() {
    const grants = start();
    grants.message('consumer', WANT, 0);
    grants.begin(ID, DIGEST, 4, 0);
    const write = grants.progress(ID, 4, [3]).find((action) => action.kind === 'write')!;
    expect(write).toMatchObject({ place: 0, sources: [3], targets: [7], last: true });
    return { grants, launch: write.launch, finished: grants.finish(ID, DRAW, 0) };
  }
  function done() {
    const { grants, launch } = written();
    expect(commands(grants.landed(launch, 0))).toEqual(['DONE']);
    return grants;
  }
  const ack: AckMessage = { cmd: 'ACK', from: CONSUMER, to: PRODUCER, seq: 1, ticket: TICKET, floor: 1 };
  const drop: DropMessage = {
    cmd: 'DROP',
    from: CONSUMER,
    to: PRODUCER,
    floor: 1,
    id: ID,
    want: { seq: 1, ticket: TICKET },
  };

  it('writes each block once, when it is full, and the part-filled one with the last chunk', () => {
    const grants = start();
    const long = { ...WANT, tokens: 11, blocks: [7, 8, 9] };
    grants.message('consumer', long, 0);
    grants.begin(ID, DIGEST, 11, 0);
    const sources = [3, 4, 5];
    const written = [2, 5, 7, 10, 11].map((computed) =>
      grants
        .progress(ID, computed, sources)
        .flatMap((action) => (action.kind === 'write' ? [[action.targets, action.last]] : [])),
    );
    expect(written).toEqual([[], [[[7], false]], [], [[[8], false]], [[[9], true]]]);
    expect(grants.stats()).toMatchObject({ promised: 3, written: 3 });
  });

  it('fails a want of an id that is over at once, and one of an id that never comes at its deadline', () => {
    const grants = start();
    grants.begin(ID, DIGEST, 4, 0);
    grants.fail(ID, 'REQUEST_ABORTED', 'its client went away', 0);
    expect(said(grants.message('consumer', WANT, 0))).toMatchObject([
      { cmd: 'FAIL', code: 'KV_SEND_FAILED', message: expect.stringContaining('its client went away') },
    ]);
    const never = { ...WANT, seq: 2, id: 'never' as TransferId };
    expect(said(grants.message('consumer', never, 0))).toEqual([]);
    expect(said(grants.tick(5_000))).toContainEqual(
      expect.objectContaining({ cmd: 'FAIL', seq: 2, code: 'KV_SEND_FAILED' }),
    );
  });

  it('tells how long a consumer has waited for what has not begun', () => {
    const grants = start();
    expect(grants.longestUnbound('consumer', 0)).toBe(0);
    grants.message('consumer', WANT, 100);
    expect(grants.longestUnbound('consumer', 1_100)).toBe(1_000);
    grants.begin(ID, DIGEST, 4, 1_200);
    expect(grants.longestUnbound('consumer', 1_300)).toBe(0);
  });

  it('binds no want of an address that its id does not name, and takes no DROP from there', () => {
    const grants = start();
    grants.introduced('stranger', CONSUMER, 16, 0);
    grants.begin(ID, DIGEST, 4, 0);
    expect(said(grants.message('stranger', WANT, 0))).toMatchObject([
      { cmd: 'FAIL', code: 'MESSAGE_INVALID' },
    ]);
    grants.message('stranger', drop, 0);
    expect(grants.stats().ignored).toMatchObject({ forged: 1 });
  });

  it('tells no end before what was launched has landed', () => {
    const { grants, launch, finished } = written();
    expect(commands(finished)).toEqual([]);
    expect(commands(grants.message('consumer', drop, 0))).toEqual(['HELD']);
    expect(commands(grants.landed(launch, 0))).toEqual(['DONE']);
  });

  it('launches nothing more for a want that was dropped, and says so once the last has landed', () => {
    const grants = start();
    grants.message('consumer', WANT, 0);
    grants.begin(ID, DIGEST, 4, 0);
    const { launch } = grants.progress(ID, 4, [3]).find((action) => action.kind === 'write')!;
    expect(grants.mayLaunch(launch)).toBe(true);
    expect(commands(grants.message('consumer', drop, 0))).toEqual(['HELD']);
    expect(grants.mayLaunch(launch)).toBe(false);
    expect(commands(grants.landed(launch, 0))).toEqual(['DROPPED']);
  });

  it('repeats an end every second, after a reconnect, and to a want that is repeated, until it is acknowledged', () => {
    const grants = done();
    expect(commands(grants.tick(999))).toEqual([]);
    expect(commands(grants.tick(1_000))).toEqual(['DONE']);
    expect(commands(grants.introduced('consumer', CONSUMER, 16, 1_100))).toEqual(['DONE']);
    expect(commands(grants.message('consumer', WANT, 1_200))).toEqual(['DONE']);
    grants.message('consumer', ack, 1_300);
    expect(commands(grants.tick(60_000))).toEqual([]);
  });

  it('repeats an end less and less often to a peer that lives and never acknowledges', () => {
    const grants = done();
    let said = 0;
    for (let now = 250; now <= 600_000; now += 250) said += commands(grants.tick(now)).length;
    // after 1, 3, 7, 15, 31 and 63 s, then each minute
    expect(said).toBe(14);
  });

  it('keeps nothing for a consumer whose connection is gone, and writes nothing more', () => {
    const told = done();
    told.unreachable('consumer', 0);
    expect(told.isIdle).toBe(true);

    const bound = start();
    bound.message('consumer', WANT, 0);
    bound.begin(ID, DIGEST, 4, 0);
    const { launch } = bound.progress(ID, 4, [3]).find((action) => action.kind === 'write')!;
    bound.unreachable('consumer', 0);
    expect(bound.mayLaunch(launch)).toBe(false);
    expect(commands(bound.landed(launch, 0))).toEqual(['FAIL']);
    // which cannot be delivered
    bound.unreachable('consumer', 0);
    expect(bound.stats()).toMatchObject({ told: 0, launches: 0 });
  });

  it('does nothing for a late copy of a want whose end is acknowledged, whatever has its id by then', () => {
    const grants = done();
    grants.message('consumer', ack, 0);
    grants.begin(ID, DIGEST, 4, 0);
    grants.progress(ID, 4, [3]);
    expect(grants.message('consumer', WANT, 0)).toEqual([]);
    expect(grants.stats().ignored).toMatchObject({ stale: 1 });
  });

  it('writes where a want named first, whatever its seq names later', () => {
    const grants = start();
    grants.message('consumer', WANT, 0);
    expect(commands(grants.message('consumer', { ...WANT, blocks: [9] }, 0))).toEqual(['HELD']);
    const other = { ...WANT, ticket: 'x'.repeat(32) as Ticket, blocks: [9] };
    expect(grants.message('consumer', other, 0)).toEqual([]);
    grants.begin(ID, DIGEST, 4, 0);
    expect(grants.progress(ID, 4, [3])).toMatchObject([{ kind: 'write', targets: [7] }]);
  });

  it('forgets nothing for an acknowledgement with another ticket', () => {
    const grants = done();
    grants.message('consumer', { ...ack, ticket: 'x'.repeat(32) as Ticket }, 0);
    expect(commands(grants.tick(1_000))).toEqual(['DONE']);
    expect(grants.stats().ignored).toMatchObject({ forged: 1 });
  });

  it.each<[string, Partial<WantMessage>, string]>([
    ['another prompt', { promptDigest: 'another' }, 'PROMPT_MISMATCH'],
    ['a block beyond the cache', { blocks: [16] }, 'KV_SHAPE_MISMATCH'],
    ['more blocks than its tokens fill', { blocks: [7, 8] }, 'KV_SHAPE_MISMATCH'],
  ])('writes nothing for %s', (_, change, code) => {
    const grants = start();
    grants.begin(ID, DIGEST, 4, 0);
    grants.progress(ID, 4, [3]);
    const actions = grants.message('consumer', { ...WANT, ...change }, 0);
    expect(actions.filter(({ kind }) => kind === 'write')).toEqual([]);
    expect(said(actions)).toMatchObject([{ cmd: 'FAIL', code }]);
  });

  it('says that a dead process may be unmapped, once its writes have landed, and also where another had its address before', () => {
    const drained = { kind: 'drained', peer: 'consumer', nonce: CONSUMER };
    const { grants, launch } = written();
    expect(grants.died('consumer', CONSUMER, 0)).not.toContainEqual(drained);
    expect(grants.landed(launch, 0)).toContainEqual(drained);

    const replaced = start();
    replaced.introduced('consumer', 'd'.repeat(32) as Nonce, 16, 0);
    expect(replaced.died('consumer', CONSUMER, 0)).toEqual([drained]);
  });

  it('fails a want whose request does not come in time, and one of a process that has been replaced', () => {
    const late = start();
    late.message('consumer', WANT, 0);
    expect(commands(late.tick(4_999))).toEqual([]);
    expect(said(late.tick(5_000))).toMatchObject([{ cmd: 'FAIL', code: 'KV_SEND_FAILED' }]);

    const replaced = start();
    replaced.message('consumer', WANT, 0);
    replaced.introduced('consumer', 'd'.repeat(32) as Nonce, 16, 0);
    replaced.begin(ID, DIGEST, 4, 0);
    expect(replaced.progress(ID, 4, [3])).toEqual([]);
  });
});

describe('a consumer', () => {
  const ask: Ask = {
    peer: 'producer',
    id: ID,
    owner: 'sequence',
    promptDigest: DIGEST,
    samplingDigest: 'greedy',
    tokens: 4,
    skip: 0,
    blocks: [7],
    transport: 'direct',
    withinMs: 10_000,
  };
  function start() {
    const wants = new Wants({
      nonce: CONSUMER,
      cacheBlocks: 16,
      layers: 1,
      newTicket: () => TICKET,
      slots: 1,
    });
    wants.introduced('producer', PRODUCER, 0);
    const asked = wants.ask(ask, 0);
    if (typeof asked === 'string') throw new Error(`refused: ${asked}`);
    expect(commands(asked.actions)).toEqual(['WANT']);
    return wants;
  }
  const done: DoneMessage = {
    cmd: 'DONE',
    from: PRODUCER,
    to: CONSUMER,
    seq: 1,
    ticket: TICKET,
    ...DRAW,
    promised: 1,
    written: 1,
  };
  const kinds = (actions: readonly WantAction[]) => actions.map(({ kind }) => kind);

  it('asks again every second and after a reconnect, until it hears an end', () => {
    const wants = start();
    expect(commands(wants.tick(999))).toEqual([]);
    expect(commands(wants.tick(1_000))).toEqual(['WANT']);
    expect(commands(wants.introduced('producer', PRODUCER, 1_100))).toEqual(['WANT']);
    wants.message('producer', done, 1_200);
    expect(commands(wants.tick(2_200))).toEqual([]);
  });

  it('says DROP again every second where it gave up, and keeps the blocks from everybody until it hears an end', () => {
    const wants = start();
    expect(commands(wants.abort(1, 0))).toEqual(['DROP']);
    expect(wants.quarantinedBy('producer')).toBe(1);
    expect(commands(wants.tick(1_000))).toEqual(['DROP']);
    const { from, to, seq, ticket } = done;
    const heard = wants.message('producer', { cmd: 'DROPPED', from, to, seq, ticket }, 1_100);
    expect(commands(heard)).toEqual(['ACK']);
    expect(kinds(heard)).toContain('retract');
    expect(wants.quarantinedBy('producer')).toBe(0);
    expect(wants.isIdle).toBe(true);
  });

  it('gives up at its deadline: its owner fails, and lets go of blocks that may still be written to', () => {
    const wants = start();
    for (let now = 1_000; now < 10_000; now += 1_000) wants.tick(now);
    const late = wants.tick(10_000);
    expect(late).toContainEqual(
      expect.objectContaining({
        kind: 'failed',
        quarantined: true,
        error: expect.objectContaining({ code: 'KV_LOAD_TIMEOUT' }),
      }),
    );
    expect(commands(late)).toEqual(['DROP']);
    expect(kinds(late)).not.toContain('retract');
  });

  it('takes neither DONE nor the flag alone', () => {
    const flagFirst = start();
    expect(kinds(flagFirst.flag('producer', PRODUCER, 1, 1))).toEqual([]);
    expect(kinds(flagFirst.message('producer', done, 0))).toContain('loaded');

    const doneFirst = start();
    expect(kinds(doneFirst.message('producer', done, 0))).toEqual(['send']);
    const flagged = kinds(doneFirst.flag('producer', PRODUCER, 1, 1));
    expect(flagged.indexOf('retract')).toBeLessThan(flagged.indexOf('loaded'));
    expect(flagged).toContain('retract');
  });

  it('counts a forged end, and a flag of another seq, and goes on waiting', () => {
    const wants = start();
    expect(wants.message('producer', { ...done, ticket: 'x'.repeat(32) as Ticket }, 0)).toEqual([]);
    expect(wants.message('producer', { ...done, from: 'x'.repeat(32) as Nonce }, 0)).toEqual([]);
    expect(wants.message('producer', { ...done, to: 'x'.repeat(32) as Nonce }, 0)).toEqual([]);
    expect(wants.flag('producer', PRODUCER, 1, 2)).toEqual([]);
    expect(wants.stats().ignored).toMatchObject({ forged: 1, unintroduced: 1, misaddressed: 1, flag: 1 });
    expect(wants.stats().waiting).toBe(1);
  });

  it('hears what a slot that it has revoked still says of its seq, and nothing of it once the slot is another’s', () => {
    const wants = start();
    wants.abort(1, 0);
    const at = { peer: 'producer', nonce: PRODUCER, slot: 1, seq: 1 };
    expect(wants.flag('producer', PRODUCER, 1, 1)).toEqual([]);
    expect(wants.quarantinedBy('producer')).toBe(1);
    const ended = kinds(wants.doneInPage(at, DRAW, 0));
    expect(ended).toContain('retract');
    expect(ended).not.toContain('loaded');
    expect(wants.ask(ask, 0)).toMatchObject({ seq: 2 });
    expect([wants.flag('producer', PRODUCER, 1, 1), wants.doneInPage(at, DRAW, 0)]).toEqual([[], []]);
    expect(wants.stats()).toMatchObject({ waiting: 1, ignored: { flag: 2 } });
  });

  it('takes no end that says less was written than was wanted', () => {
    const wants = start();
    wants.flag('producer', PRODUCER, 1, 1);
    const actions = wants.message('producer', { ...done, written: 0 }, 0);
    expect(kinds(actions)).toContain('failed');
    expect(kinds(actions)).not.toContain('loaded');
  });

  it('asks a peer for nothing more while it may write to more than a quarter of the cache', () => {
    const wants = new Wants({
      nonce: CONSUMER,
      cacheBlocks: 16,
      layers: 1,
      newTicket: () => TICKET,
      slots: 9,
    });
    wants.introduced('producer', PRODUCER, 0);
    for (const [seq, blocks] of [
      [1, [1, 2, 3, 4]],
      [2, [5]],
    ] as const) {
      expect(wants.ask({ ...ask, blocks }, 0)).toMatchObject({ seq });
      wants.abort(seq, 0);
    }
    expect(wants.quarantine()).toEqual([{ peer: 'producer', blocks: 5 }]);
    expect(wants.ask(ask, 0)).toBe('quarantine');
    expect(kinds(wants.died('producer', PRODUCER, 0))).toContain('retract');
    expect(wants.quarantine()).toEqual([]);
  });

  it('receives what was announced on a pair, into scratch where its want is over, and ends a pair that has lost step', () => {
    const wants = new Wants({
      nonce: CONSUMER,
      cacheBlocks: 16,
      layers: 1,
      newTicket: () => TICKET,
      slots: 0,
    });
    wants.introduced('producer', PRODUCER, 0);
    wants.ask({ ...ask, transport: 'nccl' }, 0);
    const { from, to, seq, ticket } = done;
    const part = { cmd: 'PART', from, to, seq, ticket, layer: 0, layers: 1, block: 0, blocks: 1 } as const;
    expect(wants.message('producer', { ...part, part: 1 }, 0)).toMatchObject([
      { kind: 'receive', into: [7] },
    ]);
    wants.abort(1, 0);
    expect(wants.message('producer', { ...part, part: 2 }, 0)).toMatchObject([
      { kind: 'receive', into: 'scratch' },
    ]);
    // its blocks stay its own until what goes there has come
    expect(wants.quarantinedBy('producer')).toBe(1);
    expect(kinds(wants.received(1, true, 0))).toContain('retract');
    const after = wants.message('producer', { ...part, part: 4 }, 0);
    expect(kinds(after)).toEqual(['reset-pair', 'receive']);
  });

  it('asks a peer for nothing more while no slot is free', () => {
    const wants = start();
    expect(wants.ask(ask, 0)).toBe('slots');
    expect(wants.ask({ ...ask, peer: 'stranger' }, 0)).toBe('unknown');
  });

  it('takes the end from the page as from DONE', () => {
    const wants = start();
    const at = { peer: 'producer', nonce: PRODUCER, slot: 1, seq: 1 };
    wants.flag('producer', PRODUCER, 1, 1);
    expect(wants.doneInPage({ ...at, slot: 2 }, DRAW, 0)).toEqual([]);
    expect(wants.doneInPage(at, DRAW, 0)).toContainEqual(
      expect.objectContaining({ kind: 'loaded', draw: DRAW }),
    );
    expect(commands(wants.message('producer', done, 0))).toEqual(['ACK']);
  });

  it('is late from when its producer was done, and not before', () => {
    const wants = start();
    wants.hasten(1, 3_000, 1_000);
    wants.hasten(1, 60_000, 1_000);
    for (let now = 1_000; now < 4_000; now += 1_000) expect(kinds(wants.tick(now))).not.toContain('failed');
    expect(kinds(wants.tick(4_000))).toContain('failed');
  });

  it('goes on by direct when the connection is gone, and gives up what would have come on a pair', () => {
    const error = { code: 'PEER_LOST', message: 'gone', context: {} } as const;
    const direct = start();
    expect(direct.unreachable('producer', error, 0)).toEqual([]);

    const wants = new Wants({
      nonce: CONSUMER,
      cacheBlocks: 16,
      layers: 1,
      newTicket: () => TICKET,
      slots: 0,
    });
    wants.introduced('producer', PRODUCER, 0);
    wants.ask({ ...ask, transport: 'host' }, 0);
    const { from, to, seq, ticket } = done;
    wants.message('producer', { cmd: 'HELD', from, to, seq, ticket, state: 'bound' }, 0);
    const actions = wants.unreachable('producer', error, 0);
    expect(kinds(actions)).toEqual(expect.arrayContaining(['failed', 'retract']));
    expect(wants.isIdle).toBe(true);
  });

  it('may ask once more for what its producer may not have heard of when the connection was lost', () => {
    const wants = new Wants({
      nonce: CONSUMER,
      cacheBlocks: 16,
      layers: 1,
      newTicket: () => TICKET,
      slots: 0,
    });
    wants.introduced('producer', PRODUCER, 0);
    wants.ask({ ...ask, transport: 'nccl' }, 0);
    const error = { code: 'PEER_LOST', message: 'gone', context: {} } as const;
    const actions = wants.unreachable('producer', error, 0);
    expect(kinds(actions)).toEqual(['retract', 'again']);
    expect(wants.isIdle).toBe(true);
    expect(wants.ask({ ...ask, transport: 'nccl' }, 0)).toMatchObject({ seq: 2 });
  });
});
