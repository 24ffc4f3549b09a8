/**
 * Bundles on the wire: many tensors in one announcement and one answer, between native peers only (docs/protocol.md, "Bundles"). What the
 * tensors of a bundle share is written once: ids as a common head and tail around a part of their own, shapes as runs of equal ones.
 */
import type { Dtype } from './dtype.ts';
import {
  checkDtype,
  checkShape,
  checkTensorId,
  countField,
  type Fields,
  field,
  nearFields,
  readNear,
  show,
} from './fields.ts';
import type { TensorId } from './ids.ts';
import { MAX_BUNDLE, MAX_DIGEST, MAX_TENSOR_ID, protocolError, type WireLimits } from './limits.ts';
import type { GetsMessage, GetVerdict, PutsMessage, PutVerdict, TensorForm } from './messages.ts';

const PUT_VERDICTS = { '0': 'send', '1': 'no-room', '3': 'unwanted' } as const satisfies Record<
  string,
  PutVerdict
>;
const GET_VERDICTS = { '0': 'here', '1': 'missing', '4': 'gone' } as const;
const CHARACTERS = { send: '0', 'no-room': '1', unwanted: '3' } as const satisfies Record<PutVerdict, string>;

export function putsFields({ cmd, seq, tensors, runs }: PutsMessage): Fields {
  return { cmd, seq, ...idFields(tensors), forms: formRuns(tensors), runs, ...promptRuns(tensors) };
}

export function getsFields({ cmd, seq, tensors, runs }: GetsMessage): Fields {
  return { cmd, seq, ...idFields(tensors), bytes: lengthRuns(tensors.map(({ bytes }) => bytes)), runs };
}

export function readPuts(fields: Fields, limits: WireLimits): PutsMessage {
  const cmd = 'PUTS';
  const ids = readIds(fields, cmd);
  const forms = readForms(fields, ids.length, limits, cmd);
  // Field by field: a spread costs microseconds, and tensors are many.
  const tensors = ids.map((tensor_id, index) => {
    const { shape, dtype, promptDigest } = forms[index]!;
    return { tensor_id, shape, dtype, promptDigest };
  });
  return { cmd, seq: countField(fields, 'seq', 0, cmd), tensors, runs: readRuns(fields, ids.length, cmd) };
}

export function readGets(fields: Fields): GetsMessage {
  const cmd = 'GETS';
  const ids = readIds(fields, cmd);
  const bytes = readLengths(field(fields, 'bytes'), ids.length, cmd);
  const tensors = ids.map((tensor_id, index) => ({ tensor_id, bytes: bytes[index]! }));
  return { cmd, seq: countField(fields, 'seq', 0, cmd), tensors, runs: readRuns(fields, ids.length, cmd) };
}

export function putsAnswerFields(answer: {
  readonly seq: number;
  readonly verdicts: readonly PutVerdict[];
  readonly runs: readonly number[];
}): Fields {
  const { seq, verdicts, runs } = answer;
  return { puts: seq, verdicts: verdicts.map((verdict) => CHARACTERS[verdict]).join(''), runs };
}

export function getsAnswerFields(answer: {
  readonly seq: number;
  readonly tensors: readonly GetVerdict[];
  readonly runs: readonly number[];
  readonly near?: readonly string[];
}): Fields {
  const { seq, tensors, runs, near } = answer;
  const verdicts = tensors.map((one) => (one === 'missing' ? '1' : one === 'gone' ? '4' : '0')).join('');
  const forms = tensors.filter(isForm);
  return { gets: seq, verdicts, forms: formRuns(forms), runs, ...promptRuns(forms), ...nearFields(near) };
}

export function readPutsAnswer(fields: Fields) {
  const what = 'answer to PUTS';
  const seq = countField(fields, 'puts', 0, what);
  const verdicts = readVerdicts(fields, PUT_VERDICTS, what);
  const runs = readRuns(fields, verdicts.filter((verdict) => verdict === 'send').length, what);
  return { kind: 'puts', seq, verdicts, runs } as const;
}

export function readGetsAnswer(fields: Fields, limits: WireLimits) {
  const what = 'answer to GETS';
  const seq = countField(fields, 'gets', 0, what);
  const verdicts = readVerdicts(fields, GET_VERDICTS, what);
  const found = verdicts.filter((verdict) => verdict === 'here').length;
  const forms = readForms(fields, found, limits, what);
  let next = 0;
  const tensors = verdicts.map((verdict): GetVerdict => (verdict === 'here' ? forms[next++]! : verdict));
  const runs = readRuns(fields, found, what);
  return { kind: 'gets', seq, tensors, runs, ...readNear(fields, what) } as const;
}

function isForm(verdict: GetVerdict): verdict is TensorForm {
  return typeof verdict === 'object';
}

function idFields(tensors: readonly { readonly tensor_id: TensorId }[]): Fields {
  const ids = tensors.map(({ tensor_id }) => checkTensorId(tensor_id, 'bundle'));
  if (ids.length === 0 || ids.length > MAX_BUNDLE) {
    throw protocolError('limit', `a bundle of ${ids.length} tensors, 1 to ${MAX_BUNDLE} are allowed`);
  }
  const [first = ''] = ids;
  let head = first.length;
  for (const id of ids) head = Math.min(head, commonLength(first, id));
  // Half of a surrogate pair is not text.
  if (isHigh(first, head - 1)) head--;
  let tail = first.length - head;
  for (const id of ids) tail = Math.min(tail, commonTail(first, id), id.length - head);
  if (isHigh(first, first.length - tail - 1)) tail--;
  return {
    head: first.slice(0, head),
    tail: first.slice(first.length - tail),
    names: ids.map((id) => id.slice(head, id.length - tail)),
  };
}

function readIds(fields: Fields, what: string): TensorId[] {
  const [head, tail] = ['head', 'tail'].map((key) => {
    const text = field(fields, key);
    if (typeof text === 'string' && text.length <= MAX_TENSOR_ID) return text;
    throw protocolError('bad_field', `${what}: ${key} is ${show(text)}, not a string of a tensor id`);
  });
  const names = field(fields, 'names');
  if (!Array.isArray(names) || names.length === 0 || !names.every((name) => typeof name === 'string')) {
    throw protocolError('bad_field', `${what}: names are ${show(names)}, not a list of strings`);
  }
  return names.map((name: string) => checkTensorId(`${head}${name}${tail}`, what));
}

/** `[count, dtype, ...shape]` for each run of equal ones. */
function formRuns(forms: readonly TensorForm[]): unknown[] {
  const runs: [number, Dtype, ...number[]][] = [];
  for (const { dtype, shape } of forms) {
    const last = runs[runs.length - 1];
    if (
      last &&
      last[1] === dtype &&
      last.length === shape.length + 2 &&
      shape.every((dim, i) => dim === last[i + 2])
    ) {
      last[0]++;
    } else {
      runs.push([1, dtype, ...shape]);
    }
  }
  return runs;
}

function readForms(fields: Fields, count: number, limits: WireLimits, what: string): TensorForm[] {
  const runs = asRuns(field(fields, 'forms'), what).map(([times, dtype, ...dims]) => {
    const known = checkDtype(dtype, what);
    return { times, of: { dtype: known, shape: checkShape(dims, known, limits, what) } };
  });
  const forms = expand(runs, count, what);
  const prompts = field(fields, 'prompts');
  if (prompts === undefined) return forms;
  const digests = readPromptRuns(prompts, count, what);
  return forms.map(({ shape, dtype }, index) => ({ shape, dtype, promptDigest: digests[index] }));
}

/** `[count, digest]` for each run of tensors of one prompt, the digest empty if unknown; nothing if all are. */
function promptRuns(forms: readonly TensorForm[]): { readonly prompts?: readonly [number, string][] } {
  if (forms.every(({ promptDigest }) => promptDigest === undefined)) return {};
  const runs: [number, string][] = [];
  for (const { promptDigest = '' } of forms) {
    const last = runs[runs.length - 1];
    if (last?.[1] === promptDigest) last[0]++;
    else runs.push([1, promptDigest]);
  }
  return { prompts: runs };
}

function readPromptRuns(value: unknown, count: number, what: string): (string | undefined)[] {
  const runs = asRuns(value, what).map(([times, digest]) => {
    if (typeof digest === 'string' && digest.length <= MAX_DIGEST) {
      return { times, of: digest === '' ? undefined : digest };
    }
    throw protocolError('bad_field', `${what}: ${show(digest)} is not a prompt digest`);
  });
  return expand(runs, count, what);
}

/** `[count, bytes]` for each run of equal ones. */
function lengthRuns(lengths: readonly number[]): [number, number][] {
  const runs: [number, number][] = [];
  for (const bytes of lengths) {
    const last = runs[runs.length - 1];
    if (last?.[1] === bytes) last[0]++;
    else runs.push([1, bytes]);
  }
  return runs;
}

function readLengths(value: unknown, count: number, what: string): number[] {
  const runs = asRuns(value, what).map(([times, bytes]) => {
    if (bytes === 0 || isCount(bytes)) return { times, of: bytes };
    throw protocolError('bad_field', `${what}: a tensor of ${show(bytes)} bytes`);
  });
  return expand(runs, count, what);
}

function asRuns(value: unknown, what: string): [number, ...unknown[]][] {
  if (!Array.isArray(value))
    throw protocolError('bad_field', `${what}: ${show(value)} is not a list of runs`);
  return value.map((run: unknown) => {
    if (Array.isArray(run) && isCount(run[0])) return run as [number, ...unknown[]];
    throw protocolError('bad_field', `${what}: ${show(run)} is not a run`);
  });
}

function expand<T>(
  runs: readonly { readonly times: number; readonly of: T }[],
  count: number,
  what: string,
): T[] {
  const total = runs.reduce((sum, { times }) => sum + times, 0);
  if (total !== count) throw protocolError('bad_field', `${what}: runs of ${total} for ${count} tensors`);
  return runs.flatMap(({ times, of }) => Array.from({ length: times }, () => of));
}

function readRuns(fields: Fields, count: number, what: string): number[] {
  const runs = field(fields, 'runs');
  if (!Array.isArray(runs) || !runs.every(isCount)) {
    throw protocolError('bad_field', `${what}: runs are ${show(runs)}, not a list of counts`);
  }
  const total = runs.reduce((sum: number, run: number) => sum + run, 0);
  if (total !== count) throw protocolError('bad_field', `${what}: runs of ${total} for ${count} tensors`);
  return runs;
}

function readVerdicts<V>(fields: Fields, known: Readonly<Record<string, V>>, what: string): V[] {
  const text = field(fields, 'verdicts');
  if (typeof text === 'string' && text.length > 0 && text.length <= MAX_BUNDLE) {
    const verdicts = [...text].flatMap((character) =>
      Object.hasOwn(known, character) ? known[character]! : [],
    );
    if (verdicts.length === text.length) return verdicts as V[];
  }
  throw protocolError('bad_field', `${what}: verdicts are ${show(text)}`);
}

function isCount(value: unknown): value is number {
  return Number.isSafeInteger(value) && (value as number) >= 1;
}

function commonLength(a: string, b: string): number {
  const most = Math.min(a.length, b.length);
  let at = 0;
  while (at < most && a.charCodeAt(at) === b.charCodeAt(at)) at++;
  return at;
}

function commonTail(a: string, b: string): number {
  const most = Math.min(a.length, b.length);
  let at = 0;
  while (at < most && a.charCodeAt(a.length - 1 - at) === b.charCodeAt(b.length - 1 - at)) at++;
  return at;
}

function isHigh(text: string, at: number): boolean {
  const unit = text.charCodeAt(at);
  return unit >= 0xd800 && unit <= 0xdbff;
}
