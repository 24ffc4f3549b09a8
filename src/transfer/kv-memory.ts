/**
 * Memory for KV in transfer: a device arena of `kv_buffer_size`, and past it a host pool that grows to its limit, 64 MiB a step.
 *
 *   buffer (device)            pool (host), taken ahead of need
 *   [ used | free          ]   [ 64 MiB ][ 64 MiB ] . . . up to memPoolSize
 *
 * Both are taken once and handed out; nothing goes back to the system while the engine lives, because that waits for the device.
 */
import { Arena, type Block } from '../device/arena.ts';
import type { Device, MemoryRef } from '../device/device.ts';
import { sliceMemory } from '../device/memory.ts';
import { PdError } from '../errors.ts';
import type { Logger } from '../observability/log.ts';
import type { MetricsPage } from '../observability/metrics.ts';
import type { Deadlines } from './deadlines.ts';

export const POOL_STEP_BYTES = 64 * 2 ** 20;

/** Bytes handed out. They leave the count when `free` is called, and not before. */
export interface Held {
  readonly memory: MemoryRef;
  readonly bytes: number;
  /** Idempotent. */
  free(): void;
}

interface Region {
  readonly arena: Arena;
  readonly memory: MemoryRef;
  readonly place: 'buffer' | 'pool';
}

interface Waiter {
  readonly bytes: number;
  readonly settle: (held: Held | undefined) => void;
}

export interface KvMemoryOptions {
  readonly device: Device;
  readonly bufferBytes: number;
  readonly poolLimitBytes: number;
  readonly deadlines: Deadlines;
  readonly metrics: MetricsPage;
  readonly log: Logger;
}

export class KvMemory {
  readonly thresholdBytes: number;
  readonly limitBytes: number;
  readonly #options: KvMemoryOptions;
  readonly #buffer: Region;
  readonly #pool: Region[] = [];
  #bufferUsed = 0;
  #poolUsed = 0;
  #reserved = 0;
  #growing: Promise<boolean> | undefined;
  #waiters: Waiter[] = [];
  #closed = false;

  constructor(options: KvMemoryOptions) {
    this.#options = options;
    this.thresholdBytes = options.bufferBytes;
    this.limitBytes = options.poolLimitBytes;
    const memory = options.device.allocate(options.bufferBytes, 'KV buffer (--kv-buffer-size)');
    this.#buffer = { arena: new Arena(options.bufferBytes), memory, place: 'buffer' };
  }

  /** Bytes of tensors in the device buffer, without rounding. */
  get bufferUsed(): number {
    return this.#bufferUsed;
  }

  get poolUsed(): number {
    return this.#poolUsed;
  }

  /** Bytes of host memory taken from the system so far. */
  get poolReserved(): number {
    return this.#reserved;
  }

  get usedBytes(): number {
    return this.#bufferUsed + this.#poolUsed;
  }

  /** False where so much does not fit even when nothing else is held. */
  canEverHold(bytes: number): boolean {
    return bytes <= Math.max(this.thresholdBytes, this.limitBytes);
  }

  /** From what is there now. */
  tryAllocate(bytes: number): Held | undefined {
    for (const region of [this.#buffer, ...this.#pool]) {
      const block = region.arena.allocate(bytes);
      if (block) return this.#hand(region, block);
    }
    return undefined;
  }

  /** As `tryAllocate`, but never before those that wait. */
  tryInTurn(bytes: number): Held | undefined {
    return this.#waiters.length === 0 ? this.tryAllocate(bytes) : undefined;
  }

  /** Grows the pool where it must; undefined where there is no room and none can be made. */
  async allocate(bytes: number): Promise<Held | undefined> {
    for (;;) {
      if (this.#closed) return undefined;
      const held = this.tryAllocate(bytes);
      if (held) return held;
      if (!(await this.#grow(bytes))) return this.#closed ? undefined : this.tryAllocate(bytes);
    }
  }

  /**
   * As `allocate`, but waits for others to free; not for what never fits. First come, first served: otherwise small sends behind a large one of the same peer
   * would take what it waits for, and none of them could leave.
   */
  async waitFor(bytes: number, timeoutMs: number): Promise<Held | undefined> {
    if (!this.canEverHold(bytes)) return undefined;
    const now = this.tryInTurn(bytes);
    if (now) return now;
    return new Promise((resolve) => {
      const settle = (held: Held | undefined) => {
        deadline.cancel();
        this.#waiters = this.#waiters.filter((other) => other !== waiter);
        resolve(held);
        this.#serve();
      };
      const waiter: Waiter = { bytes, settle };
      const deadline = this.#options.deadlines.after(timeoutMs, () => settle(undefined));
      this.#waiters.push(waiter);
      if (this.#closed) settle(undefined);
      else void this.#growFor(waiter);
    });
  }

  /** What is wrong, in words. */
  checkIntegrity(): string[] {
    const wrong = [this.#buffer, ...this.#pool].flatMap(({ arena }) => arena.checkIntegrity());
    const blocks = this.#buffer.arena.blocks + this.#pool.reduce((sum, { arena }) => sum + arena.blocks, 0);
    if (blocks === 0 && this.usedBytes !== 0) wrong.push(`${this.usedBytes} bytes counted, none held`);
    if (this.#reserved > this.limitBytes) wrong.push(`pool of ${this.#reserved} bytes is over its limit`);
    return wrong;
  }

  /** Waiters get nothing. The device frees the memory itself. */
  dispose(): void {
    this.#closed = true;
    for (const waiter of [...this.#waiters]) waiter.settle(undefined);
  }

  async #growFor(waiter: Waiter): Promise<void> {
    while (this.#waiters.includes(waiter) && (await this.#grow(waiter.bytes))) this.#serve();
  }

  #serve(): void {
    const first = this.#waiters[0];
    if (!first) return;
    const held = this.tryAllocate(first.bytes);
    if (held) first.settle(held);
  }

  #hand(region: Region, block: Block): Held {
    const { bytes } = block;
    this.#count(region.place, bytes);
    let held = true;
    const free = () => {
      if (!held) return;
      held = false;
      region.arena.free(block);
      this.#count(region.place, -bytes);
      this.#serve();
    };
    this.#growAhead();
    return { memory: sliceMemory(region.memory, block.offset, bytes), bytes, free };
  }

  #count(place: Region['place'], bytes: number): void {
    if (place === 'buffer') this.#bufferUsed += bytes;
    else this.#poolUsed += bytes;
    this.#options.metrics.set('pd_kv_buffer_used_bytes', this.#bufferUsed);
    this.#options.metrics.set('pd_kv_pool_used_bytes', this.#poolUsed);
  }

  /** Page-locking 64 MiB takes 30 ms: once the buffer is three quarters full, the next step is already under way. */
  #growAhead(): void {
    const full = this.#bufferUsed * 4 >= this.thresholdBytes * 3;
    if (!full || this.#growing || this.#closed || this.#reserved >= this.limitBytes) return;
    if (this.#reserved - this.#poolUsed < POOL_STEP_BYTES / 2) void this.#grow(1);
  }

  /** True where the pool is larger than before, so that trying again makes sense. One step at a time. */
  async #grow(bytes: number): Promise<boolean> {
    if (this.#growing) return this.#growing;
    const size = Math.min(
      Math.ceil(bytes / POOL_STEP_BYTES) * POOL_STEP_BYTES,
      this.limitBytes - this.#reserved,
    );
    if (size < bytes || size <= 0 || this.#closed) return false;
    this.#growing = this.#take(size);
    try {
      return await this.#growing;
    } finally {
      this.#growing = undefined;
    }
  }

  async #take(size: number): Promise<boolean> {
    const { device, log } = this.#options;
    this.#reserved += size;
    try {
      const memory = await device.allocatePinned(size, 'KV host pool (--mem-pool-size-gb)');
      this.#pool.push({ arena: new Arena(size), memory, place: 'pool' });
      log.debug({ poolBytes: this.#reserved, poolLimit: this.limitBytes }, 'KV host pool grown');
      return true;
    } catch (error) {
      this.#reserved -= size;
      log.error(
        { err: PdError.from(error) },
        `KV host pool: ${size} bytes more could not be had; announcements past the buffer are refused`,
      );
      return false;
    }
  }
}
