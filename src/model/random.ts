/** Random numbers without state: a pure hash of what they are for, so that a batch, a restart or another instance draws the same. */

/** Spreads every bit of a 32-bit number over all of them (the finalizer of MurmurHash3, which is in the public domain). */
function mix(value: number): number {
  let hash = value | 0;
  hash = Math.imul(hash ^ (hash >>> 16), 0x85ebca6b);
  hash = Math.imul(hash ^ (hash >>> 13), 0xc2b2ae35);
  return hash ^ (hash >>> 16);
}

/** Even in [0, 1), 53 bits, from the seed (any safe integer), which of n completions, and the position in the output. */
export function uniform(seed: number, index: number, position: number): number {
  let hash = mix((seed % 2 ** 32) + 0x9e3779b9);
  hash = mix(hash ^ Math.floor(seed / 2 ** 32));
  hash = mix(hash + Math.imul(index + 1, 0x9e3779b9));
  hash = mix(hash + Math.imul(position + 1, 0x7f4a7c15));
  const high = mix(hash ^ 0x5bd1e995) >>> 5;
  const low = mix(hash ^ 0x27d4eb2f) >>> 6;
  return (high * 2 ** 26 + low) / 2 ** 53;
}
