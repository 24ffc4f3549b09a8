/** Every send type in both directions, with dense tensors of several families and element types; every byte is compared. */
import { formatHostPort } from '../../src/net/address.ts';
import type { TransferEngine } from '../../src/transfer/engine.ts';
import { type TensorId, tensorIdOf } from '../../src/wire/ids.ts';
import { proxiedId } from '../../support/ids.ts';
import { type PythonPeer, sha256 } from '../../support/python-peer.ts';
import { bytesOf, must, mustBe, nameOf, type Rig, type TensorForm } from './rig.ts';

const SMALL: readonly TensorForm[] = [
  { shape: [2, 3, 16, 2, 8], dtype: 'bfloat16' },
  { shape: [3, 16, 576], dtype: 'uint8' },
  { shape: [1], dtype: 'float64' },
];
/** One layer of 1 to 2,048 tokens: K/V first, blocks first, tokens, MLA in FP8, and one odd size. */
const LARGE: readonly TensorForm[] = [
  { shape: [2, 1, 16, 8, 128], dtype: 'bfloat16' },
  { shape: [64, 2, 16, 8, 128], dtype: 'bfloat16' },
  { shape: [2, 1_024, 1_024], dtype: 'float16' },
  { shape: [100, 16, 576], dtype: 'uint8' },
  { shape: [1_777, 576], dtype: 'float8_e4m3fn' },
  { shape: [1], dtype: 'float64' },
  { shape: [2, 1_024, 16, 8, 128], dtype: 'bfloat16' },
];

export async function checkModes(rig: Rig, peer: PythonPeer): Promise<void> {
  const tensors = rig.options.small ? SMALL : LARGE;
  for (const sendType of ['PUT', 'PUT_ASYNC'] as const) {
    const consumer = await rig.engine({ sendType });
    for (const [seed, form] of tensors.entries()) {
      await rig.row(`${sendType}, Python to ours`, nameOf(form), () =>
        putToOurs(rig, consumer, peer, `cmpl-in-${sendType}-0`, form, seed),
      );
    }
    await consumer.dispose();
    const producer = await rig.engine({ sendType });
    for (const [seed, form] of tensors.entries()) {
      await rig.row(`${sendType}, ours to Python`, nameOf(form), async () => {
        const tensor_id = `cmpl-out-${sendType}-0#layer.${seed}`;
        const { sent } = producer.send(rig.tensor(tensor_id, form, seed, peer.address));
        sent.catch(() => {}); // thrown by `await sent`, unless the peer's own error comes first
        const got = await peer.ask('received', { tensor_id });
        await sent;
        mustBe(got['sha256'], form, seed);
        return bytesOf(form);
      });
    }
    await producer.dispose();
  }

  const producer = await rig.engine({ sendType: 'GET' });
  const to = formatHostPort(producer.address);
  for (const [seed, form] of tensors.entries()) {
    await rig.row('GET, Python from ours', nameOf(form), async () => {
      const id = proxiedId('get');
      await producer.send(rig.tensor(`${id}#layer.${seed}`, form, seed)).sent;
      const got = await peer.ask('get', { peer: to, tensor_id: `${id}-89abcdef#layer.${seed}` });
      mustBe(got['sha256'], form, seed);
      return bytesOf(form);
    });
  }
  await producer.dispose();

  const consumer = await rig.engine({ sendType: 'GET' });
  for (const [seed, form] of tensors.entries()) {
    await rig.row('GET, ours from Python', nameOf(form), async () => {
      const tensor_id = `cmpl-ask-0#layer.${seed}`;
      await peer.ask('keep', { tensor_id, ...form, seed });
      const { memory } = await consumer.receive(tensor_id as TensorId, peer.address);
      mustBe(sha256(rig.download(memory)), form, seed);
      return bytesOf(form);
    });
  }
  await consumer.dispose();
  await rig.row('both directions on one pair', 'theirs, ours, theirs', () =>
    bothWays(rig, peer, tensors[0]!),
  );
}

/** The peer's id has a random suffix that we do not know. */
export async function putToOurs(
  rig: Rig,
  consumer: TransferEngine,
  peer: PythonPeer,
  name: string,
  form: TensorForm,
  seed: number,
): Promise<string> {
  const id = proxiedId(name);
  const waiting = consumer.receive(tensorIdOf(id, `layer.${seed}`), peer.address, 20_000);
  waiting.catch(() => {}); // thrown below, unless the peer's own error comes first
  const to = formatHostPort(consumer.address);
  const put = await peer.ask('put', { peer: to, tensor_id: `${id}-0123abcd#layer.${seed}`, ...form, seed });
  must(put['answer'] === '0', `ours answered ${put['answer']}`);
  mustBe(sha256(rig.download((await waiting).memory)), form, seed);
  return bytesOf(form);
}

/** The peer keeps one communicator per address and uses it in both directions. */
async function bothWays(rig: Rig, peer: PythonPeer, form: TensorForm): Promise<string> {
  const engine = await rig.engine({ sendType: 'PUT' });
  for (const round of [0, 1, 2]) {
    await putToOurs(rig, engine, peer, `cmpl-theirs-${round}-0`, form, round);
    const tensor_id = `cmpl-ours-${round}-0#layer.0`;
    await engine.send(rig.tensor(tensor_id, form, round, peer.address)).sent;
    mustBe((await peer.ask('received', { tensor_id }))['sha256'], form, round);
  }
  await engine.dispose();
  return '3 rounds, every byte right';
}
