/** Cache slots of the tokens at positions `start` to `end` (exclusive): block * blockSize + offset. */
export function slotMapping(
  blockIds: readonly number[],
  blockSize: number,
  start: number,
  end: number,
): number[] {
  const slots: number[] = [];
  for (let position = start; position < end; position++) {
    slots.push(blockIds[Math.floor(position / blockSize)]! * blockSize + (position % blockSize));
  }
  return slots;
}
