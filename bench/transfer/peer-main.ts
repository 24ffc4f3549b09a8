/** A peer of the benchmark: one engine on one device, controlled over the IPC channel. Exits when that closes. */
import { setFlagsFromString } from 'node:v8';
import { runInNewContext } from 'node:vm';
import { DEFAULT_LIMITS } from '../../src/config/transfer-options.ts';
import { createDevice } from '../../src/device/create-device.ts';
import type { CudaDevice } from '../../src/device/cuda/device.ts';
import type { Device } from '../../src/device/device.ts';
import { EventPoller } from '../../src/device/poller.ts';
import { PdError, unreachable } from '../../src/errors.ts';
import { TransferEngine } from '../../src/transfer/engine.ts';
import { monotonicMs, readEnvironment } from '../measure/machine.ts';
import type { Compute } from './compute.ts';
import type { End } from './end.ts';
import { PeerJobs } from './jobs.ts';
import { BenchKv } from './kv.ts';
import type { Command, EndSetup, PeerMessage, PeerSetup, Reply } from './messages.ts';
import { deviceCopy, RawTransport } from './raw.ts';

const LOOPBACK = '127.0.0.1';
/** If a native call does not return and the process cannot exit, the system ends it after this. */
const QUIT_SECONDS = 4;

const setup = JSON.parse(process.argv[2] ?? '{}') as PeerSetup;
const say = (message: PeerMessage) => process.send?.(message);

try {
  const peer = await startPeer();
  process.on('message', ({ seq, command }: { seq: number; command: Command }) => {
    // in an async function, so that what it throws is reported like a rejection
    (async () => peer.run(command))().then(
      (reply) => say({ type: 'reply', seq, reply }),
      (error: unknown) => say({ type: 'failed', seq, error: PdError.from(error).toData() }),
    );
  });
  // the parent is gone: there will be no `quit`
  process.on('disconnect', orphaned);
  say({ type: 'ready', address: peer.address });
} catch (error) {
  process.send?.({ type: 'not-ready', error: PdError.from(error).toData() }, () => process.exit(1));
}

function orphaned(): void {
  process.exit(1);
}

async function startPeer() {
  const device = await createDevice(setup.device);
  const poller = new EventPoller();
  const kv = await BenchKv.create(device, setup.shape, poller, setup);
  const compute = setup.compute && device.kind === 'cuda' ? await createCompute(device, poller) : undefined;
  const engine = setup.engine && (await createEngine(setup, setup.engine));
  const jobs = engine && new PeerJobs(device, engine, setup.engine.sendType, kv);
  const end = setup.end && (await createEnd(device, setup.end, poller));
  const raw = new RawTransport(device, setup.ncclNumChannels, kv.area);

  function withEngine(): PeerJobs {
    if (jobs) return jobs;
    throw new PdError('INTERNAL', 'this peer of the benchmark has no engine');
  }
  function withEnd(): End {
    if (end) return end;
    throw new PdError('INTERNAL', 'this peer of the benchmark is no end of a hand-over');
  }
  function withCompute(): Compute {
    if (compute) return compute;
    throw new PdError(
      'DEVICE_UNAVAILABLE',
      `the compute loop needs a GPU, and this peer is on ${device.name}`,
    );
  }

  async function run(command: Command): Promise<Reply> {
    switch (command.do) {
      case 'fill':
        await kv.fill(command.job, command.side);
        return {};
      case 'arm':
        await withEngine().arm(command.job, command.peer, command.timeoutMs);
        return {};
      case 'wait':
        return withEngine().wait(command.id);
      case 'send':
        return withEngine().send(command.job, command.peer);
      case 'check':
        return withEngine().check(command.job);
      case 'finish':
        withEngine().finish(command.id);
        return {};
      case 'pump':
        return withEngine().pump(command.job, command.peer, command.window);
      case 'drain':
        return withEngine().drain(command.job, command.peer, command.window);
      case 'stop':
        withEngine().stop(command.count);
        return {};
      case 'fill-cache':
        await kv.fillCache(withEnd().layers, command.stream);
        return {};
      case 'want':
        return withEnd().want(command.ids, command.tokens, command.peer);
      case 'asked':
        await withEnd().asked(command.count);
        return {};
      case 'loaded':
        return withEnd().loaded(command.ids);
      case 'prefill': {
        const { ids, tokens, abandon } = command;
        return withEnd().prefill(ids, tokens, command.compute ? withCompute() : undefined, abandon);
      }
      case 'timelines':
        return { timelines: withEnd().timelines() };
      case 'check-cache':
        return kv.checkCache(withEnd().layers, command.stream, command.source, command.target);
      case 'compute':
        return withCompute().run(command.loop, command.ms);
      case 'occupy':
        await withCompute().occupy(command.ms);
        return {};
      case 'memory':
        collectGarbage();
        return { residentBytes: process.memoryUsage.rss(), ...deviceUse(device) };
      case 'raw-id':
        return { uniqueId: await raw.createUniqueId() };
      case 'raw-open':
        await raw.open(command.uniqueId, command.rank);
        return {};
      case 'raw-send':
      case 'raw-receive':
        return { times: await raw.move(command.do, command.regions, command.rounds) };
      case 'device-copy': {
        const { target, bytes, rounds } = command;
        return { times: await deviceCopy(device, kv.area, target, bytes, rounds, poller) };
      }
      case 'clock':
        return { at: monotonicMs() };
      case 'environment':
        return { environment: await readEnvironment(device.kind) };
      case 'quit':
        await quit();
        return {};
      default:
        return unreachable(command, 'command of the benchmark');
    }
  }

  /** The way a worker exits: with a deadline at every step, and by the system if a native call does not return. */
  async function quit(): Promise<void> {
    if (device.kind === 'cuda') (await import('../../ffi/libc.ts')).killAfter(QUIT_SECONDS);
    await raw.dispose();
    await end?.close();
    await engine?.dispose();
    process.off('disconnect', orphaned);
    setImmediate(() => process.exit(0));
  }

  return { run, address: (end ?? engine)?.address ?? { host: LOOPBACK, port: 0 } };
}

function createEngine(
  { device, ncclNumChannels }: PeerSetup,
  { port, logLevel, ...engine }: NonNullable<PeerSetup['engine']>,
): Promise<TransferEngine> {
  return TransferEngine.create({
    ...engine,
    device,
    ncclNumChannels,
    bind: { host: LOOPBACK, port },
    announceHost: LOOPBACK,
    rank: 0,
    limits: DEFAULT_LIMITS,
    log: { level: logLevel, format: 'json' },
  });
}

/** Loaded here, as what frozen peers need is enough for them. */
async function createEnd(device: Device, options: EndSetup, poller: EventPoller): Promise<End> {
  const { End } = await import('./end.ts');
  return End.create(device, setup, options, poller);
}

async function createCompute(device: unknown, poller: EventPoller): Promise<Compute> {
  // loaded here, so that a machine without a GPU needs none of its libraries
  const { Compute } = await import('./compute.ts');
  return Compute.create(device as CudaDevice, poller);
}

/** Garbage of this thread must not count as memory held. The engine's own thread is left alone. */
function collectGarbage(): void {
  setFlagsFromString('--expose-gc');
  (runInNewContext('gc') as () => void)();
}

function deviceUse(device: { readonly kind: string }): Reply {
  if (device.kind === 'host') return {};
  const { free, total } = (device as CudaDevice).runtime.memoryInfo();
  return { deviceUsedBytes: total - free };
}
