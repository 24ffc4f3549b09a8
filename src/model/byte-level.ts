/** The alphabet of byte-level BPE: each byte has a printable character, so that any bytes can be written as a token string. */

function isPrintable(byte: number): boolean {
  return (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte <= 0xac) || byte >= 0xae;
}

const BYTE_OF: ReadonlyMap<string, number> = (() => {
  const bytes = new Map<string, number>();
  // Bytes without a character of their own take the next one from U+0100 on, in order.
  let next = 0x100;
  for (let byte = 0; byte < 256; byte++) {
    bytes.set(String.fromCharCode(isPrintable(byte) ? byte : next++), byte);
  }
  return bytes;
})();

const CHARACTERS: readonly string[] = [...BYTE_OF.keys()];

/** The character of one byte. */
export function byteLevelToken(byte: number): string {
  return CHARACTERS[byte]!;
}

/** The bytes a token string stands for, or undefined where a character is outside of the alphabet. */
export function byteLevelBytes(token: string): Uint8Array | undefined {
  const bytes = new Uint8Array(token.length);
  for (let i = 0; i < token.length; i++) {
    const byte = BYTE_OF.get(token[i]!);
    if (byte === undefined) return undefined;
    bytes[i] = byte;
  }
  return bytes;
}
