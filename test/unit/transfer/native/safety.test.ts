/**
 * The rules that keep a native hand-over from wrong text, a lost worker or a leak, and the tests of each. A rule whose test is gone or renamed
 * fails here. What a real GPU alone can show (fences, a kernel's own looks at grant and ids) is in bench/gpu/direct.ts and
 * scripts/native-faults.sh.
 */
import { readFileSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import { expect, test } from 'vitest';

const LEDGERS = 'unit/transfer/native/ledgers.test.ts';
const CODEC = 'unit/transfer/native/codec.test.ts';
const CONNECTIONS = 'unit/transfer/native/connections.test.ts';
const HOSTILE = 'integration/native-hostile.test.ts';
const PAGE = 'integration/direct-page.test.ts';
const ENDPOINT = 'integration/direct-endpoint.test.ts';
const DIRECT = 'integration/cuda/direct.rows.test.ts';
const PAIR = 'integration/native-hand-over.test.ts';
const BLOCKS = 'unit/kv/block-manager.test.ts';
const FAULTS = 'wide/native-faults.test.ts';

const RULES: readonly (readonly [rule: string, tests: readonly (readonly [file: string, name: string])[]])[] =
  [
    [
      '1. A write may come late: blocks of a WANT are nobody else’s until it is over or its producer dead',
      [
        [
          LEDGERS,
          'says DROP again every second where it gave up, and keeps the blocks from everybody until it hears an end',
        ],
        [LEDGERS, 'asks a peer for nothing more while it may write to more than a quarter of the cache'],
        [BLOCKS, 'keeps exposed blocks from everybody, their own sequence too, until they are retracted'],
        [PAGE, 'that is revoked takes nothing more'],
        [
          DIRECT,
          "a writer that was stopped before its launch changes no byte once its slot is another seq's",
        ],
        [
          FAULTS,
          'a producer that is stopped in the middle of its writes changes nothing that is another’s by then',
        ],
      ],
    ],
    [
      '2. DONE, FAIL and DROPPED leave only when nothing is written any more; a flag alone ends nothing',
      [
        [LEDGERS, 'tells no end before what was launched has landed'],
        [LEDGERS, 'launches nothing more for a want that was dropped, and says so once the last has landed'],
        [LEDGERS, 'takes neither DONE nor the flag alone'],
        [LEDGERS, 'takes no end that says less was written than was wanted'],
      ],
    ],
    [
      '3. Dead means dead: by the socket’s end alone; a worker that stops answers every WANT first',
      [
        [CONNECTIONS, 'it is known to be dead by its socket alone'],
        [ENDPOINT, 'the end of one is seen by the other'],
        [PAIR, 'answers every WANT before it stops'],
        [
          'unit/transfer/native/hand-over.test.ts',
          'closes within seconds beside a producer that never says a word',
        ],
        [FAULTS, 'a producer that is killed is known to be dead, and its blocks are free'],
      ],
    ],
    [
      '4. Source blocks stay referenced until the write has landed',
      [
        [
          'unit/transfer/native/ledgers.property.test.ts',
          'let nobody write to what is another’s, end every want, and keep nothing',
        ],
        [BLOCKS, 'never loses a block, whatever is done in whatever order'],
        [DIRECT, 'every block lies where it was wanted, and no other byte has changed'],
      ],
    ],
    [
      '5. The same prompt, the same draw',
      [
        [PAIR, 'fails a want %s, and gives its blocks back'],
        [PAIR, 'brings no token that was drawn under other parameters'],
        [LEDGERS, 'writes nothing for %s'],
      ],
    ],
    [
      '6. Who may be answered: nonces, ticket, address; ends are repeated until acknowledged, ended seqs and ids remembered',
      [
        [LEDGERS, 'counts a forged end, and a flag of another seq, and goes on waiting'],
        [LEDGERS, 'binds no want of an address that its id does not name, and takes no DROP from there'],
        [
          LEDGERS,
          'does nothing for a late copy of a want whose end is acknowledged, whatever has its id by then',
        ],
        [LEDGERS, 'forgets nothing for an acknowledgement with another ticket'],
        [
          LEDGERS,
          'repeats an end every second, after a reconnect, and to a want that is repeated, until it is acknowledged',
        ],
        [
          LEDGERS,
          'fails a want of an id that is over at once, and one of an id that never comes at its deadline',
        ],
        [
          LEDGERS,
          'fails a want whose request does not come in time, and one of a process that has been replaced',
        ],
        [
          HOSTILE,
          'a producer answers each of a hostile consumer’s messages, or counts it, and serves the others',
        ],
        [HOSTILE, 'a consumer takes nothing that a producer forges, and goes on with what is true'],
        [HOSTILE, 'a consumer whose name another takes for a moment is served again'],
      ],
    ],
    [
      '7. Leases belong to the block manager, and end by DROP, acknowledgement or age',
      [
        [PAIR, 'keeps what is computed before it is asked for under a lease, and hands it over then'],
        [PAIR, 'ends the lease of KV that nobody wants'],
        [BLOCKS, 'leases the blocks of a prompt beyond the end of its sequence'],
      ],
    ],
    [
      '8. One wire per request; of two settings of --transport the weaker holds',
      [
        [CONNECTIONS, 'is nccl at once, by the weaker of two settings or hosts: %s'],
        [PAIR, 'asks nothing of a worker with which it has no way for KV in common'],
        [PAIR, 'fails a want at once, by name, where its producer speaks the frozen wire alone'],
        [
          PAIR,
          'fails a load at once, by name, where its producer hands over natively and it was told otherwise',
        ],
      ],
    ],
    [
      '9. nccl: what PART announced is always sent and always received',
      [
        [
          LEDGERS,
          'receives what was announced on a pair, into scratch where its want is over, and ends a pair that has lost step',
        ],
        [
          'wide/native-stand-ins.test.ts',
          'text equals the undivided worker, nothing is computed twice, nothing is left',
        ],
      ],
    ],
    [
      '10. Mappings: unmapped when the owner is dead; a start waits for its memory and says who holds it; claims are checked',
      [
        [DIRECT, 'its successor gets its memory back and is written into'],
        [DIRECT, 'unmapping waits for our own writes'],
        [DIRECT, 'more memory than there is does not map, and a cache of another geometry is refused'],
        ['unit/transport/direct-claims.test.ts', 'refused, since a write would land outside: %s'],
      ],
    ],
    [
      '11. The socket and the page: own folder, own user, nonces; every fallback has its reason',
      [
        [ENDPOINT, 'is made for this user alone; another mode, a link or a file is refused'],
        [ENDPOINT, 'another user'],
        [ENDPOINT, 'another process on the path than its hello said'],
        [PAGE, 'memory %s is refused'],
        [CONNECTIONS, 'is nccl where direct is refused, and the gauge and the state say why'],
        [CONNECTIONS, 'is none where direct is refused and no other is common, by name'],
        [FAULTS, 'a cache that cannot be mapped is filled by nccl'],
      ],
    ],
    [
      '12. Limits: block lists up to the cache; a part-filled block is written once',
      [
        [CODEC, 'may be as long as the longest prompt, and no longer'],
        [DIRECT, '%i blocks in one write'],
        [LEDGERS, 'writes each block once, when it is full, and the part-filled one with the last chunk'],
      ],
    ],
    [
      '13. Polling: spin only once the last chunk has begun, and not for ever; the first token leaves in the middle of a step',
      [
        ['unit/transfer/native/page-watch.test.ts', 'without a pause once the last chunk has begun'],
        [
          'unit/worker/core.test.ts',
          'says the first token of a load in the middle of a step, and computes nothing of its prompt',
        ],
      ],
    ],
    [
      '14. Stand-ins do not flatter: launches land late, an unmapped range ends the process, memory outlives its owner',
      [
        [DIRECT, 'unmapping waits for our own writes; without that the process would end'],
        [DIRECT, 'an owner killed in mid-write'],
      ],
    ],
  ];

const source = (file: string) =>
  readFileSync(fileURLToPath(new URL(`../../../${file}`, import.meta.url)), 'utf8').replaceAll("\\'", "'");

test.each(RULES)('%s', (_, tests) => {
  const missing = tests.filter(([file, name]) => !source(file).includes(name));
  expect(missing).toEqual([]);
});
