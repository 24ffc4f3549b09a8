/** What CUDA calls take for a MemoryRef. */
import { PdError } from '../../errors.ts';
import type { DevicePointer, MemoryRef, PinnedPointer } from '../device.ts';
import { hostView } from '../memory.ts';

/** For copies, which take pageable memory too. */
export function addressOf(memory: MemoryRef): DevicePointer | PinnedPointer | Uint8Array {
  return memory.kind === 'host' ? hostView(memory) : memory.pointer;
}

/** An address that a kernel reaches. */
export function kernelAddress(memory: MemoryRef, what: string): bigint {
  if (memory.kind !== 'host') return memory.pointer;
  throw new PdError('INTERNAL', `${what}: a GPU does not reach pageable host memory`);
}

/** For messages: which GPUs this process is allowed to see. */
export function visible(): string {
  const chosen = process.env['CUDA_VISIBLE_DEVICES'];
  return chosen === undefined ? '' : ` (CUDA_VISIBLE_DEVICES=${chosen})`;
}
