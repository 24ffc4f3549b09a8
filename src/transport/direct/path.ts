/** What direct writes from one GPU to another should reach, by what is known of the link between them. Pure. */

export interface PathFacts {
  /** Both ends' caches lie on one GPU. */
  readonly sameGpu: boolean;
  /** Of the GPU that is written to, as its driver names it: `NVIDIA H200`. */
  readonly gpu: string;
  /** What CUDA says of the two, where this process sees both. */
  readonly peerLink: 'nvlink' | 'pcie' | 'none' | undefined;
  /** The slower of their slots: transfers a second and lane, times lanes, in 1e9. */
  readonly pcieGtPerSecond: number | undefined;
}

export interface ExpectedPath {
  readonly link: 'nvlink' | 'pcie' | 'same GPU' | 'unknown';
  /** Of long writes. Absent where nothing is known. */
  readonly bytesPerSecond?: number;
}

/** One direction of all NVLinks of a GPU, by its name, in GB/s, as its maker gives it. */
const NVLINK: readonly (readonly [RegExp, number])[] = [
  [/\b(GB200|B200|GB300|B300)\b/, 900],
  [/\bH800\b/, 200],
  [/\bH100 NVL\b/, 300],
  [/\b(H100|H200|H20|GH200)\b/, 450],
  [/\bA800\b/, 200],
  [/\bA100\b/, 300],
  [/\bV100\b/, 150],
];
/**
 * Within one GPU, in GB/s, measured with 2 GiB and the thread blocks of a self-test (CTAS_ALONE). There the kernel's width is the limit, not
 * a link: on an H200 4, 8, 16, 32 and 64 thread blocks reach 193, 385, 763, 1,419 and 1,981. Between GPUs 16 come to what NVLink gives.
 */
const SAME_GPU: readonly (readonly [RegExp, number])[] = [
  [/\b(H200|GH200)\b/, 1_980],
  [/\bH100\b/, 1_370],
];
/** Of a link's rate, what writes reach: NVLink measured on two H100 and two H200 (371 of 450), PCIe an estimate. */
const NVLINK_SHARE = 0.82;
const PCIE_SHARE = 0.8;
/** Payload of a line code of 128 in 130 bits, in bytes per transfer. */
const PCIE_BYTES = 128 / 130 / 8;
/** What a launch takes by the GPU's own clock beside its bytes: 3.5 to 4.5 us on H100 and H200, within one GPU and between two. */
const LAUNCH_SECONDS = 4e-6;
const GB = 1e9;

export function expectedPath({ sameGpu, gpu, peerLink, pcieGtPerSecond }: PathFacts): ExpectedPath {
  if (sameGpu) return { link: 'same GPU', ...rateOf(SAME_GPU, gpu, 1) };
  // Where CUDA was not asked: GPUs of these names, but for cards in slots, have NVLink to all others of their machine.
  const assumed = NVLINK.some(([name]) => name.test(gpu)) && !/PCIe/i.test(gpu) ? 'nvlink' : 'pcie';
  const link = peerLink === undefined || peerLink === 'none' ? assumed : peerLink;
  if (link === 'nvlink') return { link, ...rateOf(NVLINK, gpu, NVLINK_SHARE) };
  if (pcieGtPerSecond === undefined) return { link: 'unknown' };
  return { link, bytesPerSecond: pcieGtPerSecond * PCIE_BYTES * PCIE_SHARE * GB };
}

/** Of one write of so many bytes: the rest of 4 MiB within one GPU, which take 2 us, is the launch. */
export function rateOfWrite({ bytesPerSecond }: ExpectedPath, bytes: number): number | undefined {
  return bytesPerSecond && bytes / (LAUNCH_SECONDS + bytes / bytesPerSecond);
}

function rateOf(table: readonly (readonly [RegExp, number])[], gpu: string, share: number) {
  const found = table.find(([name]) => name.test(gpu));
  return found && { bytesPerSecond: found[1] * share * GB };
}
