/** One grouped send or receive on its way through a pair. */
import type { Region } from '../../../ffi/libnccl.ts';
import type { DeviceEvent, MemoryRef } from '../../device/device.ts';
import { PdError } from '../../errors.ts';
import type { OperationOptions } from '../transport.ts';

export interface Operation {
  readonly direction: 'send' | 'receive';
  readonly regions: readonly Region[];
  readonly options: OperationOptions;
  readonly resolve: () => void;
  readonly reject: (error: PdError) => void;
  /** When nothing of this pair was before it any more; the deadline counts from here. */
  startedAt?: number;
  /** Marks its end in the pair's stream, once NCCL has enqueued it. */
  event?: DeviceEvent;
}

/** Regions as NCCL takes them: GPU memory of `device`, or page-locked memory. Empty ones are left out, on both ends alike. */
export function deviceRegions(memory: readonly MemoryRef[], device: number): Region[] {
  const regions: Region[] = [];
  for (const ref of memory) {
    if (ref.kind === 'host') throw new PdError('INTERNAL', 'NCCL does not reach pageable host memory');
    if (ref.kind === 'cuda' && ref.device !== device) {
      throw new PdError(
        'INTERNAL',
        `memory of cuda:${ref.device} cannot travel over a pair of cuda:${device}`,
      );
    }
    if (ref.bytes > 0) regions.push({ pointer: ref.pointer, bytes: ref.bytes });
  }
  return regions;
}

export function operationBytes(operation: Operation): number {
  return operation.regions.reduce((sum, region) => sum + region.bytes, 0);
}
