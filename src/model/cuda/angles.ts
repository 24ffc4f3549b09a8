/** Cosine and sine of every position's RoPE angles in GPU memory: computed in double precision, as the host computes them. */
import type { CudaDevice } from '../../device/cuda/device.ts';
import type { DevicePointer, MemoryRef } from '../../device/device.ts';
import { hostMemory, sliceMemory } from '../../device/memory.ts';
import type { ModelConfig } from '../config.ts';
import { ropeFrequencies } from '../rope-config.ts';

export interface AngleTables {
  /** Both [positions, headDim / 2], float32. */
  readonly cosine: DevicePointer;
  readonly sine: DevicePointer;
}

/** Positions per copy. */
const CHUNK = 16_384;

/** Throws OUT_OF_DEVICE_MEMORY. The copies wait: only while nothing is served. */
export function uploadAngles(device: CudaDevice, config: ModelConfig, positions: number): AngleTables {
  const frequencies = ropeFrequencies(config.rope, config.headDim);
  const half = frequencies.length;
  const bytes = positions * half * 4;
  const cosine = device.allocate(bytes, 'RoPE cosines');
  const sine = device.allocate(bytes, 'RoPE sines');
  const stream = device.createStream();
  const host = hostMemory(Math.min(CHUNK, positions) * half * 4);
  const fill = (target: MemoryRef, first: number, count: number, of: (angle: number) => number) => {
    const part = sliceMemory(host, 0, count * half * 4);
    const values = new Float32Array(host.buffer, 0, count * half);
    for (let p = 0; p < count; p++) {
      for (let i = 0; i < half; i++) values[p * half + i] = of((first + p) * frequencies[i]!);
    }
    device.copy(sliceMemory(target, first * half * 4, part.bytes), part, stream);
  };
  for (let first = 0; first < positions; first += CHUNK) {
    const count = Math.min(CHUNK, positions - first);
    fill(cosine, first, count, Math.cos);
    fill(sine, first, count, Math.sin);
  }
  stream.dispose();
  return { cosine: cosine.pointer, sine: sine.pointer };
}
