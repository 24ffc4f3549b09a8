/** What pd-doctor found: one line each, in sections, with the fix wherever something is wrong. */

/** `fail` would stop a worker, or the system that was asked about; `warn` will cause trouble; `info` is neither good nor bad. */
export type Level = 'ok' | 'info' | 'warn' | 'fail';

export interface Finding {
  readonly level: Level;
  readonly what: string;
  /** Which command or flag to use; always present for `fail`. */
  readonly fix?: string;
}

export interface Section {
  readonly title: string;
  readonly findings: readonly Finding[];
}

export interface DoctorReport {
  readonly version: string;
  /** No finding is a `fail`. */
  readonly sound: boolean;
  readonly sections: readonly Section[];
}

export const ok = (what: string): Finding => ({ level: 'ok', what });
export const info = (what: string): Finding => ({ level: 'info', what });
export const warn = (what: string, fix?: string): Finding =>
  fix === undefined ? { level: 'warn', what } : { level: 'warn', what, fix };
export const fail = (what: string, fix: string): Finding => ({ level: 'fail', what, fix });

export function reportOf(version: string, sections: readonly Section[]): DoctorReport {
  const filled = sections.filter(({ findings }) => findings.length > 0);
  const sound = !filled.some(({ findings }) => findings.some(({ level }) => level === 'fail'));
  return { version, sound, sections: filled };
}
