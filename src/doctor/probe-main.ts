/** The child process of a probe: loads native libraries, which may crash, and prints what it found as one line of JSON. */
import { writeSync } from 'node:fs';
import { PdError } from '../errors.ts';

/** Each question loads only what it needs, so that a broken koffi does not fail the one about zeromq. */
async function answer(question: string, args: readonly string[]): Promise<unknown> {
  if (question === 'zeromq') return { version: (await import('zeromq')).version };
  return (await import('./inspect.ts')).answerNative(question, args);
}

let line: unknown;
try {
  line = { answer: await answer(process.argv[2] ?? '', process.argv.slice(3)) };
} catch (error) {
  line = { error: PdError.from(error, 'LIBRARY_NOT_FOUND').toData() };
}
// Written before a library's own cleanup can crash or hang at exit.
writeSync(1, `${JSON.stringify(line)}\n`);
process.exit(0);
