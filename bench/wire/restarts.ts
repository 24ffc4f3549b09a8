/** Our consumer restarts, after a clean end and after kill -9, while the producer keeps announcing; then the other way round. */
import { type ChildProcess, fork } from 'node:child_process';
import { once } from 'node:events';
import { extname } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import { within } from '../../src/deferred.ts';
import { formatHostPort, type HostPort } from '../../src/net/address.ts';
import type { TransferEngine } from '../../src/transfer/engine.ts';
import type { TensorId } from '../../src/wire/ids.ts';
import { type PythonPeer, sha256 } from '../../support/python-peer.ts';
import type { ConsumerMessage } from './consumer.ts';
import { must, mustBe, type Rig, type TensorForm } from './rig.ts';

const FORM: TensorForm = { shape: [2, 3, 16, 8, 128], dtype: 'bfloat16' };
const SEED = 5;
const AGAIN_MS = 20;
const GROUP = 'restarts';

/** Our consumer, in this process or in its own. */
interface Receiver {
  readonly address: HostPort;
  /** SHA-256 of what arrived. */
  receive(tensorId: string, peer: HostPort): Promise<string>;
}

export async function checkRestarts(rig: Rig, peer: PythonPeer): Promise<void> {
  await rig.row(GROUP, 'our consumer, clean exit: 1, NEW from ours, KV', async () => {
    const before = await rig.engine({ sendType: 'PUT' });
    await put(peer, receiver(rig, before), 'cmpl-a-0');
    await before.dispose();
    await peer.ask('disconnected', { peer: formatHostPort(before.address) });
    const after = await rig.engine({ sendType: 'PUT', port: before.address.port });
    const told = await putToRestarted(peer, receiver(rig, after), 'cmpl-b');
    await after.dispose();
    return told;
  });

  await rig.row(GROUP, 'our consumer, kill -9: 1, NEW from ours, KV', async () => {
    const before = await Consumer.start(rig, await rig.freshPort());
    let after: Consumer | undefined;
    try {
      await put(peer, before, 'cmpl-c-0');
      await before.kill();
      await peer.ask('disconnected', { peer: formatHostPort(before.address) });
      after = await Consumer.start(rig, before.address.port);
      return await putToRestarted(peer, after, 'cmpl-d');
    } finally {
      await Promise.all([before.kill(), after?.kill()]);
    }
  });

  await rig.row(GROUP, 'their producer, kill -9: its NEW replaces the pair, KV', async () => {
    const consumer = await rig.engine({ sendType: 'PUT' });
    const theirs = await rig.peer();
    await put(theirs, receiver(rig, consumer), 'cmpl-e-0');
    await theirs.dispose();
    const again = await rig.peer(theirs.address.port);
    await put(again, receiver(rig, consumer), 'cmpl-f-0');
    await again.quit();
    await consumer.dispose();
    return 'the same address, another process';
  });
}

function receiver(rig: Rig, engine: TransferEngine): Receiver {
  return {
    address: engine.address,
    receive: async (tensorId, peer) => {
      const { memory } = await engine.receive(tensorId as TensorId, peer);
      return sha256(rig.download(memory));
    },
  };
}

/** The peer still has the old communicator, and so sends no NEW. */
async function putToRestarted(peer: PythonPeer, consumer: Receiver, id: string): Promise<string> {
  const to = formatHostPort(consumer.address);
  const times = Number((await peer.ask('joins_of', { peer: to }))['times']);
  const first = await announce(peer, to, `${id}-0#layer.0`);
  must(first === '1', `the restarted consumer answered ${first}, not 1`);
  const start = performance.now();
  await peer.ask('joined', { peer: to, times: times + 1 });
  const milliseconds = Math.round(performance.now() - start);
  const refused = await put(peer, consumer, `${id}-1`);
  const also = refused > 0 ? `, ${refused} more answered 1` : '';
  return `answered 1; their communicator replaced after ${milliseconds} ms${also}; KV`;
}

/**
 * Returns how many times the answer was 1: the other end of a new communicator may be a moment late and has no pair until then. Ends with
 * the deadline of `receive` on the other end.
 */
async function put(peer: PythonPeer, consumer: Receiver, id: string): Promise<number> {
  const tensorId = `${id}#layer.0`;
  const to = formatHostPort(consumer.address);
  let over = false;
  const waiting = consumer.receive(tensorId, peer.address).finally(() => {
    over = true;
  });
  waiting.catch(() => {}); // thrown below, unless the peer's own error comes first
  let refused = 0;
  while ((await announce(peer, to, tensorId)) === '1' && !over) {
    refused++;
    await sleep(AGAIN_MS);
  }
  mustBe(await waiting, FORM, SEED);
  return refused;
}

async function announce(peer: PythonPeer, to: string, tensor_id: string): Promise<string> {
  return String((await peer.ask('put', { peer: to, tensor_id, ...FORM, seed: SEED }))['answer']);
}

/** consumer.ts in its own process, so that it can be killed. */
class Consumer implements Receiver {
  readonly address: HostPort;
  readonly #child: ChildProcess;
  readonly #rig: Rig;

  private constructor(rig: Rig, child: ChildProcess, address: HostPort) {
    this.#rig = rig;
    this.#child = child;
    this.address = address;
  }

  static async start(rig: Rig, port: number): Promise<Consumer> {
    const { ours, patienceS } = rig.options;
    // From the sources TypeScript, from a build JavaScript.
    const script = fileURLToPath(
      new URL(`./consumer${extname(fileURLToPath(import.meta.url))}`, import.meta.url),
    );
    const args = [ours, port, patienceS].map(String);
    const child = fork(script, args, { stdio: ['ignore', 'inherit', 'inherit', 'ipc'] });
    try {
      const { address, error } = await next(rig, child);
      if (!address) throw new Error(`our consumer did not start: ${error}`);
      return new Consumer(rig, child, address);
    } catch (error) {
      child.kill('SIGKILL');
      throw error;
    }
  }

  async receive(tensorId: string, peer: HostPort): Promise<string> {
    const answer = next(this.#rig, this.#child);
    this.#child.send({ tensorId, peer });
    const { sha256, error } = await answer;
    if (sha256 === undefined) throw new Error(`our consumer: ${error}`);
    return sha256;
  }

  async kill(): Promise<void> {
    if (this.#child.exitCode !== null || this.#child.signalCode !== null) return;
    this.#child.kill('SIGKILL');
    await once(this.#child, 'exit');
  }
}

async function next({ options }: Rig, child: ChildProcess): Promise<ConsumerMessage> {
  const over = new AbortController();
  const signal = within(2_000 * options.patienceS, over.signal);
  try {
    return await Promise.race([
      once(child, 'message', { signal }).then(([message]) => message as ConsumerMessage),
      once(child, 'exit', { signal }).then(
        ([code, by]): ConsumerMessage => ({ error: `ended: ${code ?? by}` }),
      ),
    ]);
  } finally {
    over.abort();
  }
}
