/** Cosine and sine of every position's RoPE angles in GPU memory. */
import type { CudaDevice } from '../../device/cuda/device.ts';
import { hostMemory, sliceMemory } from '../../device/memory.ts';
import type { ModelConfig } from '../config.ts';
import { ropeFrequencies, writeAngles } from '../rope-config.ts';
import type { Addresses } from './kernels.ts';

/** Positions per copy. */
const CHUNK = 16_384;

/** Both [positions, headDim / 2], float32. Throws OUT_OF_DEVICE_MEMORY. The copies wait: only while nothing is served. */
export function uploadAngles(
  device: CudaDevice,
  config: ModelConfig,
  positions: number,
): Addresses<'cosine' | 'sine'> {
  const frequencies = ropeFrequencies(config.rope, config.headDim);
  const rowBytes = frequencies.length * 4;
  const cosine = device.allocate(positions * rowBytes, 'RoPE cosines');
  const sine = device.allocate(positions * rowBytes, 'RoPE sines');
  const stream = device.createStream();
  const host = { cos: hostMemory(CHUNK * rowBytes), sin: hostMemory(CHUNK * rowBytes) };
  const angles = { cos: new Float32Array(host.cos.buffer), sin: new Float32Array(host.sin.buffer) };
  for (let first = 0; first < positions; first += CHUNK) {
    const count = Math.min(CHUNK, positions - first);
    for (let row = 0; row < count; row++) writeAngles(angles, row, first + row, frequencies);
    const [at, bytes] = [first * rowBytes, count * rowBytes];
    device.copy(sliceMemory(cosine, at, bytes), sliceMemory(host.cos, 0, bytes), stream);
    device.copy(sliceMemory(sine, at, bytes), sliceMemory(host.sin, 0, bytes), stream);
  }
  stream.dispose();
  return { cosine: cosine.pointer, sine: sine.pointer };
}
