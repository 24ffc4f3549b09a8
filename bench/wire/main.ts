/**
 * The program behind scripts/wire-results.sh: `main check` runs our engines against an independent worker (support/peers, in Python; on GPUs
 * with torch and blocking NCCL, on the second GPU), and `main report` combines the results. Runs from the root of the repository.
 */
import { execFileSync } from 'node:child_process';
import { writeFileSync } from 'node:fs';
import { Command, Option } from 'commander';
import { prepareNativeEnvironment } from '../../src/device/native-env.ts';
import { readEnvironment, readMachine } from '../measure/machine.ts';
import { conclude } from '../measure/results.ts';
import { checkFamilies } from './families.ts';
import { checkModes } from './modes.ts';
import { checkRestarts } from './restarts.ts';
import { PARTS, type PeerResult, readWireResult, summarize, writeWireResult } from './result.ts';
import { Rig } from './rig.ts';
import { observeSettings } from './settings.ts';

interface CheckOptions {
  readonly device: 'host' | 'cuda';
  readonly output: string;
  readonly small?: true;
  readonly patience?: string;
}

interface ReportOptions {
  readonly out: string;
  readonly command: string;
  readonly only?: string;
}

const LOOK_MS = 30_000;
/** Default of `--patience`, seconds. On the host and on stand-ins a slow machine must not look like a hang. */
const PATIENCE_S = { full: 15, small: 50 };

const program = new Command('wire-results');
program
  .command('check')
  .addOption(new Option('--device <device>').choices(['host', 'cuda']).default('cuda'))
  .requiredOption('--output <file>')
  .option('--small')
  .option('--patience <seconds>', 'deadline of each wait, on either end')
  .action(check);
program
  .command('report')
  .argument('<folder>')
  .requiredOption('--out <folder>')
  .requiredOption('--command <line>')
  .addOption(new Option('--only <part>').choices(PARTS))
  .action((folder: string, { out, command, only }: ReportOptions) => {
    const result = readWireResult(folder, command, only ? [only] : PARTS);
    const base = writeWireResult(result, out);
    conclude(`${summarize(result)}\n${base}.md`, result.problems.length === 0);
  });
await program.parseAsync();

async function check({ device, output, small = undefined, patience }: CheckOptions): Promise<void> {
  const start = performance.now();
  const startedAt = new Date().toISOString();
  const [ours, theirs] = device === 'host' ? (['host', 'host'] as const) : (['cuda:0', 'cuda:1'] as const);
  const python = pythonFor(device);
  const bind = { host: '127.0.0.1', port: 0 };
  prepareNativeEnvironment({ device: ours, bind, announceHost: bind.host });
  const patienceS = Number(patience ?? (small ? PATIENCE_S.small : PATIENCE_S.full));
  const rig = await Rig.create({ ours, theirs, python, small: small ?? false, verbose: true, patienceS });
  let about: Readonly<Record<string, string>> = {};
  let error: string | undefined;
  try {
    const peer = await rig.peer();
    const { library, ...shown } = peer.about;
    about = shown; // a path means nothing on another machine
    // The NCCL that comes with torch, since both ends need the same one.
    if (library) process.env['PD_NCCL_LIB'] ??= library;
    await checkModes(rig, peer);
    await checkFamilies(rig, peer);
    await checkRestarts(rig, peer);
    if (peer.stderr) console.error(`stderr of the Python peer:\n${peer.stderr}`);
    await rig.row('overall', 'no message that vLLM would not understand', async () => {
      await peer.quit();
      return 'the peer exits at the first such message';
    });
    if (device === 'cuda') await observeSettings(rig);
  } catch (cause) {
    error = cause instanceof Error ? cause.message : String(cause);
    console.error(error);
  }
  const result: PeerResult = {
    startedAt,
    seconds: Math.round((performance.now() - start) / 100) / 10,
    devices: [ours, theirs],
    machine: await readMachine(),
    environment: await readEnvironment(device),
    peer: about,
    rows: rig.rows,
    ...(error !== undefined && { error }),
  };
  // First, since what follows may hang.
  writeFileSync(output, JSON.stringify(result, undefined, 1));
  await rig.clear();
  const bad = rig.rows.filter(({ ok, observed }) => !ok && !observed).length;
  process.exitCode = bad === 0 && error === undefined ? 0 : 1;
}

/** PD_TEST_PYTHON, or the first of PATH's and Debian's that has the modules. Finds torch without importing it, which takes seconds. */
function pythonFor(device: 'host' | 'cuda'): string {
  const modules = device === 'host' ? ['msgpack'] : ['msgpack', 'torch'];
  const code = `import importlib.util as u, sys; sys.exit(not all(u.find_spec(m) for m in ${JSON.stringify(modules)}))`;
  const named = process.env['PD_TEST_PYTHON'];
  const pythons = named ? [named] : ['python3', '/usr/bin/python3'];
  const python = pythons.find((one) => {
    try {
      execFileSync(one, ['-c', code], { stdio: 'ignore', timeout: LOOK_MS });
      return true;
    } catch {
      return false;
    }
  });
  if (!python)
    throw new Error(`no Python with ${modules.join(' and ')}: tried ${pythons.join(', ')} (PD_TEST_PYTHON)`);
  return python;
}
