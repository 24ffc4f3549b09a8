/** How often a property is tried: PD_PROPERTY_RUNS, or the usual number, where faults are not being hunted (test/seed.ts). */
export function propertyRuns(usual: number): number {
  return Number(process.env['PD_PROPERTY_RUNS'] ?? usual);
}
