/**
 * Tables of whole systems take minutes: files named `*.rows.test.ts` run some of their rows with every change (scripts/test.sh) and the
 * others where all is tested (scripts/test-all.sh).
 */

/** Set by vitest.config.ts. */
export const withTheOthers = process.env['PD_TEST_ROWS'] === 'others';

export function rows<Row>(few: readonly Row[], others: readonly Row[]): readonly Row[] {
  return withTheOthers ? others : few;
}
