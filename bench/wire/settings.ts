/** A peer whose NCCL differs from ours in settings or version. Whatever happens is the result, but it must end in time, with KV or an error. */
import { existsSync, realpathSync } from 'node:fs';
import type { PythonPeer } from '../../support/python-peer.ts';
import { putToOurs } from './modes.ts';
import { mustBe, type Rig, type TensorForm } from './rig.ts';

const FORM: TensorForm = { shape: [64, 2, 16, 8, 128], dtype: 'bfloat16' };
const GROUP = 'different settings on their end';
const SYSTEM_NCCL = ['/usr/lib/x86_64-linux-gnu/libnccl.so.2', '/usr/lib64/libnccl.so.2'];

interface Setting {
  readonly name: string;
  readonly env: NodeJS.ProcessEnv;
}

export async function observeSettings(rig: Rig): Promise<void> {
  const all = settings();
  // Started together, as importing torch takes longer than the rest.
  const peers = await Promise.allSettled(all.map(({ env }) => rig.peer(0, env)));
  for (const [i, { name }] of all.entries()) {
    const peer = peers[i]!;
    await rig.row(
      GROUP,
      name,
      async () => {
        if (peer.status === 'rejected') throw peer.reason;
        return bothRoles(rig, peer.value, `cmpl-setting-${i}`);
      },
      'observed',
    );
  }
}

function settings(): Setting[] {
  const ours = process.env['PD_NCCL_LIB'];
  const other = SYSTEM_NCCL.find(
    (path) => existsSync(path) && ours && realpathSync(path) !== realpathSync(ours),
  );
  return [
    { name: 'NCCL_CUMEM_ENABLE=0', env: { NCCL_CUMEM_ENABLE: '0' } },
    { name: '8 channels (ours 16)', env: { NCCL_MIN_NCHANNELS: '8', NCCL_MAX_NCHANNELS: '8' } },
    ...(other ? [{ name: "the system's NCCL (ours torch's)", env: { PD_NCCL_LIB: other } }] : []),
  ];
}

async function bothRoles(rig: Rig, peer: PythonPeer, id: string): Promise<string> {
  const engine = await rig.engine({ sendType: 'PUT' });
  try {
    const parts = [`NCCL ${peer.about['nccl']}`];
    await putToOurs(rig, engine, peer, `${id}-0`, FORM, 1);
    parts.push('KV to ours');
    const tensor_id = `${id}-1#layer.0`;
    await engine.send(rig.tensor(tensor_id, FORM, 2, peer.address)).sent;
    mustBe((await peer.ask('received', { tensor_id }))['sha256'], FORM, 2);
    parts.push('KV to theirs');
    return parts.join('; ');
  } finally {
    await engine.dispose();
  }
}
