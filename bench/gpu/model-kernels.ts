/** Each kernel alone at the shapes of an 8B Llama: milliseconds, and the bandwidth or arithmetic rate that it reaches. */
import { Cublas } from '../../ffi/libcublas.ts';
import type { CudaDevice } from '../../src/device/cuda/device.ts';
import type { CudaStream } from '../../src/device/cuda/stream.ts';
import type { DevicePointer } from '../../src/device/device.ts';
import { hostMemory, hostView, sliceMemory } from '../../src/device/memory.ts';
import { EventPoller } from '../../src/device/poller.ts';
import { type Matrix, ModelKernels, type ProductMode } from '../../src/model/cuda/kernels.ts';
import { Products } from '../../src/model/cuda/products.ts';
import { toBfloat16 } from '../../support/safetensors-writer.ts';
import { row } from './rows.ts';

const HIDDEN = 4_096;
const INNER = 14_336;
const VOCAB = 128_256;
const SHAPE = { type: 'bfloat16', heads: 32, kvHeads: 8, headDim: 128, blockSize: 16, eps: 1e-5 } as const;
const WEIGHTS: readonly [string, ProductMode, number, number][] = [
  ['qkv', 'store', 6_144, HIDDEN],
  ['output', 'add', HIDDEN, HIDDEN],
  ['gate+up', 'store', 2 * INNER, HIDDEN],
  ['down', 'add', HIDDEN, INNER],
  ['head', 'logits', VOCAB, HIDDEN],
];
const MIB = 2 ** 20;

export async function kernelTimes(device: CudaDevice): Promise<Record<string, number>> {
  const stream = device.createStream();
  const poller = new EventPoller();
  const results: Record<string, number> = {};
  const measure = async (name: string, repeat: number, run: (i: number) => void) => {
    const once = async (count: number) => {
      const began = performance.now();
      for (let i = 0; i < count; i++) run(i);
      const event = stream.record();
      await poller.wait(event, 30_000, name);
      event.dispose();
      return (performance.now() - began) / count;
    };
    await once(2);
    results[name] = Math.min(await once(repeat), await once(repeat));
    return results[name];
  };
  const area = device.allocate(3_072 * MIB, 'kernel times');
  fillRandom(device, stream, area);
  const at = (mib: number) => (area.pointer + BigInt(mib * MIB)) as DevicePointer;
  const [x, out, weights] = [at(0), at(320), at(1_024)];
  const kernels = new ModelKernels(device.target, stream.handle, SHAPE, { cosine: at(256), sine: at(272) });
  const cublas = Cublas.create(stream.handle, device.allocate(32 * MIB, 'workspace'));
  const ours = new Products(kernels, undefined);
  const usual = new Products(kernels, cublas);

  for (const rows of [1, 2, 16, 64, 2_048]) {
    for (const [kind, products] of [
      ['', usual],
      [' invariant', ours],
    ] as const) {
      for (const [name, mode, outputs, inputs] of WEIGHTS) {
        if (name === 'head' && rows > 64) continue;
        // from another place each time, so that it is not in the L2 cache
        const weight = (i: number): Matrix => ({
          pointer: (weights + BigInt((i % 3) * 256 * MIB)) as DevicePointer,
          outputs,
          inputs,
        });
        const label = `${name} x ${rows}${kind}`;
        const time = await measure(label, 12, (i) => {
          if (name === 'gate+up') products.gated({ out: at(768), x, gateUp: weight(i), rows, scratch: out });
          else products.product(mode, { out, x, weight: weight(i), rows });
        });
        const rate =
          rows <= 64
            ? `${((2 * outputs * inputs) / time / 1e6).toFixed(0)} GB/s`
            : `${((2 * rows * outputs * inputs) / time / 1e9).toFixed(0)} TFLOP/s`;
        row(label, `${time.toFixed(3)} ms ${rate}`);
      }
    }
  }
  await attention(device, stream, kernels, at, measure);
  for (const rows of [1, 2_048]) {
    const positions = at(300);
    row(
      `norm x ${rows}`,
      `${(await measure(`norm x ${rows}`, 50, () => kernels.rmsNorm({ out, x: at(1_024), weight: x, hidden: HIDDEN, rows, chosen: undefined }))).toFixed(4)} ms`,
    );
    row(
      `swiglu x ${rows}`,
      `${(await measure(`swiglu x ${rows}`, 50, () => kernels.swiglu({ out, gateUp: at(1_024), rows, inner: INNER }))).toFixed(4)} ms`,
    );
    upload(
      device,
      stream,
      positions,
      Int32Array.from({ length: rows }, (_, i) => i),
    );
    const args = {
      qkv: at(1_024),
      bias: undefined,
      queryNorm: undefined,
      keyNorm: undefined,
      positions,
      slots: positions,
      q: out,
      rows,
    };
    const cache = { keys: at(1_536), values: at(2_048) };
    row(
      `rope x ${rows}`,
      `${(await measure(`rope x ${rows}`, 50, () => kernels.ropeCache({ ...args, cache }))).toFixed(4)} ms`,
    );
  }
  row(
    'argmax x 1',
    `${(await measure('argmax x 1', 50, () => kernels.argmax({ tokens: out, logits: at(1_024), rows: 1, vocab: VOCAB }))).toFixed(4)} ms`,
  );
  const draws = Float32Array.from({ length: 80 }, (_, i) => [1, 0, 0.9, 0.7, 0][i % 5]!);
  upload(device, stream, at(300), new Int32Array(draws.buffer));
  upload(device, stream, out, new Int32Array(16));
  const drawing = await measure('draw x 16, top-p', 20, () =>
    kernels.draw({ tokens: out, logits: at(1_024), draws: at(300), rows: 16, vocab: VOCAB }),
  );
  row('draw x 16, top-p', `${drawing.toFixed(3)} ms`);
  cublas.dispose();
  poller.dispose();
  return results;
}

type Measure = (name: string, repeat: number, run: (i: number) => void) => Promise<number>;

async function attention(
  device: CudaDevice,
  stream: CudaStream,
  kernels: ModelKernels,
  at: (mib: number) => DevicePointer,
  measure: Measure,
): Promise<void> {
  const cache = { keys: at(1_024), values: at(1_536) };
  const [q, out, plan, scratch] = [at(0), at(128), at(300), at(320)];
  for (const tokens of [512, 2_048, 8_192]) {
    const items: number[] = [];
    for (let first = tokens - 128; first >= 0; first -= 128) items.push(first, 128, first, 0);
    const tables = Array.from({ length: tokens / 16 }, (_, i) => i);
    upload(device, stream, plan, Int32Array.from([...items, ...tables]));
    const tablesAt = (plan + BigInt(4 * items.length)) as DevicePointer;
    const name = `prefill attention ${tokens}`;
    const time = await measure(name, 10, () => {
      kernels.attentionPrefill({ out, q, cache, items: plan, count: items.length / 4, tables: tablesAt });
    });
    row(name, `${time.toFixed(3)} ms ${((2 * tokens * tokens * 32 * 128) / time / 1e9).toFixed(0)} TFLOP/s`);
  }
  for (const [count, context] of [
    [1, 512],
    [1, 8_192],
    [16, 512],
    [16, 2_048],
    [64, 1_024],
  ] as const) {
    const blocks = context / 16;
    const zeros = Array.from({ length: count }, (_, i) => i);
    const contexts = zeros.map(() => context);
    const starts = zeros.map((i) => i * blocks);
    const tables = Array.from({ length: count * blocks }, (_, i) => i);
    upload(device, stream, plan, Int32Array.from([...zeros, ...contexts, ...starts, ...tables]));
    const part = (i: number) => (plan + BigInt(4 * i * count)) as DevicePointer;
    const rows = { queryRows: plan, contexts: part(1), tableStarts: part(2), tables: part(3), count };
    const splits = Math.min(64, Math.ceil((4 * device.multiProcessors) / (count * 8)));
    const name = `decode attention ${count} x ${context}`;
    const time = await measure(name, 30, () => {
      kernels.attentionDecode({ out, q, cache, rows, splits, scratch });
    });
    row(name, `${time.toFixed(4)} ms ${((count * context * 4_096) / time / 1e6).toFixed(0)} GB/s`);
  }
}

function upload(device: CudaDevice, stream: CudaStream, target: DevicePointer, words: Int32Array): void {
  const host = hostMemory(words.byteLength);
  hostView(host).set(new Uint8Array(words.buffer));
  device.copy({ kind: 'cuda', device: device.index, pointer: target, bytes: words.byteLength }, host, stream);
}

/** Random bfloat16 around zero; with zeros a GPU draws less power and runs faster. */
function fillRandom(device: CudaDevice, stream: CudaStream, area: ReturnType<CudaDevice['allocate']>): void {
  const host = hostMemory(16 * MIB);
  const bits = new Uint16Array(host.buffer);
  for (let i = 0; i < bits.length; i++) bits[i] = toBfloat16((Math.random() - 0.5) / 16);
  for (let offset = 0; offset < area.bytes; offset += host.bytes) {
    device.copy(sliceMemory(area, offset, host.bytes), host, stream);
  }
}
