/** Answers and parts of a producer, told by the core thread, to peers that may have gone meanwhile. */
import { beforeEach, expect, it } from 'vitest';
import { transferOptions } from '../../../../src/config/embedded.ts';
import { createLogger } from '../../../../src/observability/log.ts';
import type { TransferContext } from '../../../../src/transfer/context.ts';
import type { FromWire, NativeInit } from '../../../../src/transfer/native/channel.ts';
import { decodeAnswered, encodeNative } from '../../../../src/transfer/native/codec.ts';
import { identityOf } from '../../../../src/transfer/native/hello.ts';
import type {
  HelloMessage,
  Nonce,
  ProducerMessage,
  Ticket,
} from '../../../../src/transfer/native/messages.ts';
import { NativeWire } from '../../../../src/transfer/native/wire.ts';
import type { Router } from '../../../../src/transfer/router.ts';

const PEER = '10.0.0.2:8084';
const SHAPE = { blocks: 64, blockSize: 16, layers: 2, blockBytes: 64, family: 'kv-first' } as const;
const OURS = 'a'.repeat(32) as Nonce;
const THEIRS = 'b'.repeat(32) as Nonce;

let said: { readonly identity: string; readonly message: ReturnType<typeof decodeAnswered> }[];
let told: FromWire[];
let wire: NativeWire;

beforeEach(() => {
  said = [];
  told = [];
  const router = {
    answer: (identity: Buffer, body: Uint8Array) =>
      said.push({
        identity: identity.toString(),
        message: decodeAnswered(body, { maxBlocks: SHAPE.blocks }),
      }),
  };
  const context = {
    options: transferOptions({ device: 'host' }),
    self: '10.0.0.1:8082',
    log: createLogger({ level: 'silent', format: 'json' }, 'test'),
    deadlines: { now: () => 0 },
  };
  const init: NativeInit = { nonce: OURS, layers: [], shape: SHAPE, transports: ['host'] };
  wire = new NativeWire(context as unknown as TransferContext, router as unknown as Router, init, {
    tell: (event) => told.push(event),
    pairsChanged: () => {},
  });
});

const done = (blocks: number): ProducerMessage => ({
  cmd: 'DONE',
  from: OURS,
  to: THEIRS,
  seq: 1,
  ticket: 'c'.repeat(32) as Ticket,
  drawn: [7],
  samplingDigest: 'd'.repeat(32),
  promised: blocks,
  written: blocks,
});

function hears(hello: Pick<HelloMessage, 'cache'>): void {
  const message: HelloMessage = {
    cmd: 'HELLO',
    from: THEIRS,
    hello: { version: 1, features: ['native'], sendType: 'PUT_ASYNC' },
    transports: ['host'],
    ...hello,
  };
  wire.heard(Buffer.from(identityOf(PEER)), Buffer.from(encodeNative(message, { maxBlocks: 1 })));
}

it('reach a peer that has no session, whatever number of our blocks they tell of', () => {
  wire.command({ kind: 'answer', peer: PEER, message: done(SHAPE.blocks) });
  expect(said).toEqual([{ identity: identityOf(PEER), message: done(SHAPE.blocks) }]);
});

it('are left out where they tell of more blocks than the peer has by now, and the next one goes', () => {
  hears({ cache: { ...SHAPE, blocks: 8 } });
  expect(said.splice(0)).toMatchObject([{ message: { cmd: 'HELLO' } }]);
  wire.command({ kind: 'answer', peer: PEER, message: done(SHAPE.blocks) });
  expect(said).toEqual([]);
  wire.command({ kind: 'answer', peer: PEER, message: done(8) });
  expect(said).toMatchObject([{ message: { cmd: 'DONE', promised: 8 } }]);
});

it('says of a part for the process that had the address before that its connection is gone, and sends nothing on the new one', () => {
  hears({ cache: SHAPE });
  said = [];
  const to = 'e'.repeat(32) as Nonce;
  const of = { cmd: 'PART', from: OURS, to, seq: 1, ticket: 'c'.repeat(32) as Ticket } as const;
  const part = { ...of, layer: 0, layers: 2, block: 0, blocks: 1 };
  wire.command({ kind: 'write', peer: PEER, launch: 5, part, blocks: Int32Array.of(3) });
  expect(told.at(-1)).toMatchObject({ kind: 'written', launch: 5, error: { code: 'PEER_LOST' } });
  expect(said).toEqual([]);
});
