/** What the wire checks share: our device and engines, the Python peers, and the rows of the result. */
import { setTimeout as sleep } from 'node:timers/promises';
import { transferOptions } from '../../src/config/embedded.ts';
import type { TransferOptions } from '../../src/config/transfer-options.ts';
import { withDeadline } from '../../src/deferred.ts';
import { createDevice } from '../../src/device/create-device.ts';
import type { Device, MemoryRef, Stream } from '../../src/device/device.ts';
import { hostMemory, hostView } from '../../src/device/memory.ts';
import { PdError } from '../../src/errors.ts';
import type { HostPort } from '../../src/net/address.ts';
import { freePorts } from '../../src/net/free-ports.ts';
import { TransferEngine } from '../../src/transfer/engine.ts';
import type { SendRequest } from '../../src/transfer/types.ts';
import { type Dtype, tensorBytes } from '../../src/wire/dtype.ts';
import type { TensorId } from '../../src/wire/ids.ts';
import { PythonPeer, seededBytes, sha256 } from '../../support/python-peer.ts';

export interface WireRow {
  readonly group: string;
  readonly name: string;
  readonly ok: boolean;
  /** Not a requirement: whatever happened is the result. */
  readonly observed?: true;
  readonly milliseconds: number;
  readonly value: string;
}

export interface RigOptions {
  readonly ours: string;
  readonly theirs: string;
  readonly python: string;
  readonly small: boolean;
  readonly verbose: boolean;
  /** Deadline of each wait on either end, seconds; longer than opening a pair or any transfer takes. */
  readonly patienceS: number;
}

export interface TensorForm {
  readonly shape: readonly number[];
  readonly dtype: Dtype;
}

/** A row fails after this many times the patience, and the next one starts. Everything it waits for has a shorter deadline. */
const ROW_WAITS = 3;
const PORT_MS = 5_000;
const HOST = '127.0.0.1';
/** Each failure may take its full deadline; after this many, the rest is not tried. */
const MOST_FAILURES = 3;

/** What vLLM's engine sets for its communicators, for 16 channels. Otherwise the user's settings, and none of ours. */
const VLLM_ENVIRONMENT: NodeJS.ProcessEnv = {
  NCCL_CUMEM_ENABLE: '1',
  NCCL_MIN_NCHANNELS: '16',
  NCCL_MAX_NCHANNELS: '16',
  // undefined removes a variable; read before our own are set
  NCCL_SOCKET_IFNAME: process.env['NCCL_SOCKET_IFNAME'],
  NCCL_SOCKET_FAMILY: process.env['NCCL_SOCKET_FAMILY'],
  CUDA_MODULE_LOADING: process.env['CUDA_MODULE_LOADING'],
};

export class Rig {
  readonly options: RigOptions;
  readonly rows: WireRow[] = [];
  readonly #device: Device;
  readonly #stream: Stream;
  readonly #held: { dispose(): Promise<void> }[] = [];
  readonly #ports = new Set<number>();

  private constructor(options: RigOptions, device: Device) {
    this.options = options;
    this.#device = device;
    this.#stream = device.createStream();
  }

  static async create(options: RigOptions): Promise<Rig> {
    return new Rig(options, await createDevice(options.ours));
  }

  peer(port = 0, env: NodeJS.ProcessEnv = {}): Promise<PythonPeer> {
    return startPeer(this.options, port, env).then((peer) => this.#hold(peer));
  }

  /**
   * A port that no engine of this rig has used. The peer keeps a communicator per address, as vLLM does: it would take an engine on a port
   * used before for its predecessor, and answer its first PUT with 1.
   */
  async freshPort(): Promise<number> {
    for (;;) {
      const [port] = await freePorts(1, HOST);
      if (this.#ports.has(port!)) continue;
      this.#ports.add(port!);
      return port!;
    }
  }

  /** On a new port, unless one is given; waits for a port that an earlier engine has just released. */
  async engine(overrides: Partial<TransferOptions> & { readonly port?: number }): Promise<TransferEngine> {
    const { port = await this.freshPort(), ...rest } = overrides;
    const end = performance.now() + PORT_MS;
    for (;;) {
      try {
        return this.#hold(
          await TransferEngine.create({ ...engineOptions(this.options.ours, port, this.options), ...rest }),
        );
      } catch (error) {
        if (PdError.from(error).code !== 'PORT_IN_USE' || performance.now() > end) throw error;
        await sleep(20);
      }
    }
  }

  /** Device memory with these bytes, which stays until the rig is disposed. */
  upload(bytes: Uint8Array, what: string): MemoryRef {
    const host = hostMemory(bytes.length);
    hostView(host).set(bytes);
    const memory = this.#device.allocate(bytes.length, what);
    this.#device.copy(memory, host, this.#stream);
    return memory;
  }

  download(memory: MemoryRef): Uint8Array {
    const host = hostMemory(memory.bytes);
    this.#device.copy(host, memory, this.#stream);
    return hostView(host);
  }

  /** A tensor of `seededBytes` in device memory. */
  tensor(id: string, { shape, dtype }: TensorForm, seed: number, peer?: HostPort): SendRequest {
    const memory = this.upload(seededBytes(shape, dtype, seed), id);
    return {
      tensorId: id as TensorId,
      shape,
      dtype,
      source: { kind: 'flat', memory },
      ready: this.#stream.record().ref,
      ...(peer && { peer }),
    };
  }

  /** One check: what it returns goes into the result, and so does what it throws. Throws after too many failures. */
  async row(group: string, name: string, check: () => Promise<string>, observed?: 'observed'): Promise<void> {
    const start = performance.now();
    let ok = true;
    const value = await this.#deadline(check(), name).catch((error: unknown) => {
      ok = false;
      return error instanceof Error ? error.message : String(error);
    });
    const milliseconds = Math.round((performance.now() - start) * 10) / 10;
    this.rows.push({ group, name, ok, ...(observed && { observed: true }), milliseconds, value });
    if (this.options.verbose)
      console.error(`${ok ? 'ok    ' : 'FAILED'} ${group}: ${name}: ${value} (${milliseconds} ms)`);
    const failures = this.rows.filter((row) => !row.ok && !row.observed).length;
    if (failures >= MOST_FAILURES)
      throw new Error(`${failures} checks failed, so the rest was not tried. The last: ${name}: ${value}`);
  }

  /** Ends the peers and engines of the checks so far. */
  async clear(): Promise<void> {
    await Promise.all(
      this.#held.splice(0).map((one) => this.#deadline(one.dispose(), 'dispose').catch(() => {})),
    );
  }

  async #deadline<T>(work: Promise<T>, what: string): Promise<T> {
    const seconds = ROW_WAITS * this.options.patienceS;
    const done = await withDeadline(
      work.then((value) => ({ value })),
      seconds * 1_000,
    );
    if (done) return done.value;
    throw new Error(`${what}: not done after ${seconds} s; going on without it`);
  }

  #hold<T extends { dispose(): Promise<void> }>(one: T): T {
    this.#held.push(one);
    return one;
  }
}

function startPeer(
  { theirs, python, patienceS }: RigOptions,
  port = 0,
  env: NodeJS.ProcessEnv = {},
): Promise<PythonPeer> {
  return PythonPeer.start({
    python,
    port,
    script: 'support/peers/peer.py',
    transport: theirs === 'host' ? 'host' : 'nccl',
    device: theirs,
    timeoutS: patienceS,
    env: { ...VLLM_ENVIRONMENT, ...env },
  });
}

export function engineOptions(
  device: string,
  port: number,
  { patienceS }: Pick<RigOptions, 'patienceS'>,
): TransferOptions {
  const patience = patienceS * 1_000;
  return transferOptions({
    device,
    bind: { host: HOST, port },
    kvBufferSize: 512 * 2 ** 20,
    memPoolSize: 512 * 2 ** 20,
    ncclNumChannels: 16,
    timeouts: {
      ...{ connect: patience, answer: patience, pairInit: patience, transfer: patience },
      load: 1.3 * patience,
    },
    log: { level: 'error', format: 'json' },
  });
}

export function must(condition: boolean, message: string): void {
  if (!condition) throw new Error(message);
}

/** Compares what arrived with what was made from the seed. */
export function mustBe(got: unknown, { shape, dtype }: TensorForm, seed: number): void {
  must(got === sha256(seededBytes(shape, dtype, seed)), 'the bytes differ from those sent');
}

export function bytesOf({ shape, dtype }: TensorForm): string {
  return `${tensorBytes(shape, dtype).toLocaleString('en')} bytes`;
}

export function nameOf({ shape, dtype }: TensorForm): string {
  return `${dtype} [${shape.join(', ')}]`;
}
