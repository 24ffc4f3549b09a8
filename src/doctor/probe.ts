/** Questions about native libraries, each answered by a child process: a library that crashes or hangs takes nothing else down. */
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { fileURLToPath } from 'node:url';
import type { LibraryName } from '../../ffi/find.ts';
import type { DriverAnswer } from '../config/device-choice.ts';
import { type ErrorData, PdError } from '../errors.ts';
import { threadEntry } from '../thread-entry.ts';
import type { GpuReport, LibraryReport } from './inspect.ts';

export interface Answers {
  readonly koffi: { readonly version: string };
  readonly zeromq: { readonly version: string };
  readonly libraries: { readonly libraries: readonly LibraryReport[] };
  readonly gpus: { readonly gpus: readonly GpuReport[]; readonly error?: string };
  /** Creates no context on any GPU, so it is cheap and takes no memory from whatever runs there. `args`: other libraries to load. */
  readonly 'visible-gpus': DriverAnswer;
}
export type LoadQuestion = `load-${LibraryName}`;

export interface ProbeSettings {
  readonly args?: readonly string[];
  /** Instead of this process's own. */
  readonly env?: Readonly<Record<string, string | undefined>>;
  /** Kills the child; its reason is thrown. */
  readonly signal?: AbortSignal;
}

/** Whether the child died or hung instead of reporting an error. */
export function hasCrashed(error: PdError): boolean {
  return error.context['crashed'] === true;
}

/**
 * Throws what the child reported (LIBRARY_NOT_FOUND and others); LIBRARY_NOT_FOUND with `hasCrashed` if it died or took longer
 * than `timeoutMs`. CUDA takes about a second per GPU to start.
 */
export async function probe<Q extends keyof Answers>(
  question: Q,
  timeoutMs: number,
  settings?: ProbeSettings,
): Promise<Answers[Q]>;
export async function probe(question: LoadQuestion, timeoutMs: number): Promise<{ readonly loads: true }>;
export async function probe(
  question: string,
  timeoutMs: number,
  { args = [], env = process.env, signal }: ProbeSettings = {},
): Promise<unknown> {
  signal?.throwIfAborted();
  const entry = fileURLToPath(threadEntry(import.meta.url, './probe-main.js'));
  const child = spawn(process.execPath, [entry, question, ...args], {
    stdio: ['ignore', 'pipe', 'pipe'],
    env,
    timeout: timeoutMs,
    killSignal: 'SIGKILL',
    signal,
  });
  let out = '';
  let err = '';
  child.stdout.on('data', (chunk: Buffer) => {
    out += chunk;
  });
  child.stderr.on('data', (chunk: Buffer) => {
    err = (err + chunk).slice(-2_000);
  });
  const closed = once(child, 'close').finally(() => signal?.throwIfAborted());
  const [code, killer] = (await closed) as [number | null, NodeJS.Signals | null];
  const parsed = parseLine(out);
  if (parsed?.error) throw PdError.fromData(parsed.error);
  if (parsed && 'answer' in parsed) return parsed.answer;
  const how = child.killed
    ? `gave no answer within ${timeoutMs / 1_000} s`
    : `ended with ${killer ?? `status ${code}`}`;
  const lines = err.trim().split('\n');
  const words = lines.find((text) => /error|fatal|assert/i.test(text)) ?? lines.at(-1);
  throw new PdError('LIBRARY_NOT_FOUND', `${how}${words ? `: ${words}` : ''}`, { question, crashed: true });
}

function parseLine(out: string): { readonly answer?: unknown; readonly error?: ErrorData } | undefined {
  try {
    return JSON.parse(out) as { answer?: unknown; error?: ErrorData };
  } catch {
    return undefined;
  }
}
