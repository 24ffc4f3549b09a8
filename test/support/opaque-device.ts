/**
 * A device whose memory the CPU cannot read, as a GPU's: copies wait in the stream until its event is polled for the second time, so
 * that whoever does not wait for them sees old bytes.
 */
import type {
  Device,
  DeviceEvent,
  DevicePointer,
  MemoryRef,
  PinnedPointer,
  Stream,
} from '../../src/device/device.ts';
import { PdError } from '../../src/errors.ts';

type Address = DevicePointer | PinnedPointer;

interface Run {
  readonly base: bigint;
  readonly bytes: Uint8Array;
}

export class OpaqueDevice implements Device {
  readonly kind = 'cuda';
  readonly name = 'cuda:0';
  copies = 0;
  readonly #runs: Run[] = [];
  readonly #pending: (() => void)[] = [];
  #next = 0x10000n;

  allocate(bytes: number): MemoryRef {
    return { kind: 'cuda', device: 0, pointer: this.#take(bytes) as DevicePointer, bytes };
  }

  async allocatePinned(bytes: number): Promise<MemoryRef> {
    return { kind: 'pinned', pointer: this.#take(bytes) as PinnedPointer, bytes };
  }

  createStream(): Stream {
    return { record: () => this.#record(), wait: () => {}, dispose: () => {} };
  }

  copy(target: MemoryRef, source: MemoryRef): void {
    this.copies++;
    this.#pending.push(() => this.bytesOf(target).set(this.bytesOf(source)));
  }

  gather(): void {
    throw new PdError('INTERNAL', 'not needed here');
  }

  scatter(): void {
    throw new PdError('INTERNAL', 'not needed here');
  }

  gatherLayers(): void {
    throw new PdError('INTERNAL', 'not needed here');
  }

  scatterLayers(): void {
    throw new PdError('INTERNAL', 'not needed here');
  }

  reblock(): void {
    throw new PdError('INTERNAL', 'not needed here');
  }

  view(memory: MemoryRef): Uint8Array {
    if (memory.kind === 'cuda') throw new PdError('INTERNAL', 'the CPU cannot read this');
    return this.bytesOf(memory);
  }

  dispose(): void {}

  /** Behind the curtain: what a peer's transfer would read and write. */
  bytesOf(memory: MemoryRef): Uint8Array {
    if (memory.kind === 'host') throw new PdError('INTERNAL', 'not memory of this device');
    const run = this.#runs.find(
      ({ base, bytes }) => memory.pointer >= base && memory.pointer < base + BigInt(bytes.length),
    );
    if (!run) throw new PdError('INTERNAL', 'address without memory');
    const at = Number(memory.pointer - run.base);
    return run.bytes.subarray(at, at + memory.bytes);
  }

  #take(bytes: number): Address {
    const base = this.#next;
    this.#next += BigInt(bytes) + 0x1000n;
    this.#runs.push({ base, bytes: new Uint8Array(bytes) });
    return base as Address;
  }

  #record(): DeviceEvent {
    let asked = 0;
    const work = this.#pending.splice(0);
    return {
      ref: { kind: 'cuda', handle: 1n },
      done: () => {
        if (++asked < 2) return false;
        for (const run of work.splice(0)) run();
        return true;
      },
      dispose: () => {},
    };
  }
}
