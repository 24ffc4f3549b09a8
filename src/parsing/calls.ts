/**
 * Calls of tools in a model's text, in the forms that the families we serve write them:
 *
 *   hermes        <tool_call>{"name": "f", "arguments": {...}}</tool_call>            Hermes, Qwen 2.5 and 3
 *   llama3_json   {"name": "f", "parameters": {...}}; {...}    at the very beginning, or behind <|python_tag|>
 *   mistral       [TOOL_CALLS][{"name": "f", "arguments": {...}}, ...]   or   [TOOL_CALLS]f[ARGS]{...}
 *
 * What does not come out as a call is text.
 */
import { JsonScanner } from './json-scanner.ts';
import { MarkerFinder, type Part, type PartParser, TrailingBlanks } from './parts.ts';

export const CALL_DIALECTS = ['hermes', 'llama3_json', 'mistral'] as const;
export type CallDialect = (typeof CALL_DIALECTS)[number];

interface Form {
  /** Stands before a call, or before a list of them. */
  readonly begin: string;
  /** Stands behind each. */
  readonly end: string;
  /** An object at the beginning of the text, or behind another call, is one without a marker; it has to name a tool. */
  readonly bare: boolean;
  /** Calls may stand in a list, or as a name and its arguments. */
  readonly listed: boolean;
  /** Tokens that a decoder must not leave out. */
  readonly tokens: readonly string[];
  /** How calls are written where a grammar writes them. */
  readonly written: WrittenForm;
}

/** Text before the first call, behind the last and between two; and within one before its name, before its arguments and behind them. */
export interface WrittenForm {
  readonly before: string;
  readonly after: string;
  readonly between: string;
  readonly open: string;
  readonly middle: string;
  readonly close: string;
}

const FORMS: Readonly<Record<CallDialect, Form>> = {
  hermes: {
    begin: '<tool_call>',
    end: '</tool_call>',
    bare: false,
    listed: false,
    tokens: ['<tool_call>', '</tool_call>'],
    written: {
      before: '',
      after: '',
      between: '\n',
      open: '<tool_call>\n{"name": "',
      middle: '", "arguments": ',
      close: '}\n</tool_call>',
    },
  },
  llama3_json: {
    begin: '<|python_tag|>',
    end: '',
    bare: true,
    listed: false,
    tokens: ['<|python_tag|>'],
    written: {
      before: '',
      after: '',
      between: '; ',
      open: '{"name": "',
      middle: '", "parameters": ',
      close: '}',
    },
  },
  mistral: {
    begin: '[TOOL_CALLS]',
    end: '',
    bare: false,
    listed: true,
    tokens: ['[TOOL_CALLS]', '[ARGS]', '[CALL_ID]'],
    written: {
      before: '[TOOL_CALLS][',
      after: ']',
      between: ', ',
      open: '{"name": "',
      middle: '", "arguments": ',
      close: '}',
    },
  },
};

/** Special tokens that are part of calls. */
export function callTokens(dialect: CallDialect): readonly string[] {
  return FORMS[dialect].tokens;
}

/** How a grammar writes calls, so that a parser of the same dialect reads them. */
export function writtenForm(dialect: CallDialect): WrittenForm {
  return FORMS[dialect].written;
}

/** The form that a checkpoint's chat template teaches; undefined where it is none of ours. */
export function dialectOf(template: string): CallDialect | undefined {
  if (template.includes('<function=')) return undefined; // Qwen3-Coder: XML within the same markers
  if (template.includes('<tool_call>')) return 'hermes';
  if (template.includes('[TOOL_CALLS]')) return 'mistral';
  if (template.includes('<|start_header_id|>') && template.includes('"parameters"')) return 'llama3_json';
  return undefined;
}

/** `f`, `f[ARGS]` or `f[CALL_ID]id[ARGS]`. */
const HEADER = /^([\w.-]{1,64})\s*(?:\[CALL_ID\]\w*)?(?:\[ARGS\])?\s*$/;
const MAX_HEADER = 200;

/** Of a call without a marker. */
const FIRST_KEYS = ['name', 'type'];

export class CallParser implements PartParser {
  readonly #form: Form;
  readonly #names: ReadonlySet<string>;
  readonly #finder: MarkerFinder;
  readonly #blanks = new TrailingBlanks();
  /**
   * text    until the marker
   * begin   behind it, until an object begins
   * header  the name before its arguments
   * call    in the object
   * after   between two, or behind the last
   */
  #mode: 'text' | 'begin' | 'header' | 'call' | 'after';
  /** What may still come to be text: since the marker, or since the last call. */
  #raw = '';
  #inList = false;
  #call: CallReader | undefined;
  #called = false;
  /** Of calls that came out whole, there has been one. */
  #whole = false;
  readonly #single: boolean;
  #hasContent = false;

  /** `names`: the tools that there are; `single`: there may be one call at most, and what stands behind one that broke is text. */
  constructor(dialect: CallDialect, names: readonly string[], single = false) {
    this.#single = single;
    this.#form = FORMS[dialect];
    this.#names = new Set(names);
    this.#finder = new MarkerFinder(this.#form.begin);
    this.#mode = this.#form.bare ? 'after' : 'text';
  }

  get done(): boolean {
    const closing = this.#mode === 'after' && this.#form.end !== '';
    return this.#single && this.#whole && !closing;
  }

  push(text: string): Part[] {
    const parts: Part[] = [];
    for (let at = 0; at < text.length && !this.done; ) {
      if (this.#mode === 'text' && this.#single && this.#called) {
        this.#say(text.slice(at), parts);
        break;
      } else if (this.#mode === 'text') {
        const { before, after } = this.#finder.push(text.slice(at));
        this.#say(before, parts);
        if (after === undefined) break;
        at = text.length - after.length;
        this.#raw = this.#form.begin;
        this.#mode = 'begin';
      } else if (this.#mode === 'call') {
        at = this.#inCall(text, at, parts);
      } else if (this.#between(text[at]!)) {
        at++;
      } else {
        this.#giveUp(parts);
      }
    }
    return parts;
  }

  flush(): Part[] {
    const parts: Part[] = [];
    switch (this.#mode) {
      case 'text':
        this.#say(this.#finder.flush(), parts);
        break;
      case 'after':
        if (!this.#called) this.#say(this.#raw, parts);
        break;
      case 'begin':
      case 'header':
        this.#say(this.#raw, parts);
        break;
      case 'call':
        this.#break(parts);
        break;
    }
    // Blanks around calls are no answer.
    const blanks = this.#blanks.flush();
    if (!this.#called && blanks !== '') parts.push({ type: 'content', text: blanks });
    return parts;
  }

  /** Takes what it can of an object; where to go on. */
  #inCall(text: string, from: number, parts: Part[]): number {
    const call = this.#call!;
    let at = from;
    while (at < text.length && call.push(text[at]!)) at++;
    this.#raw += text.slice(from, at);
    call.send(parts);
    const whole = call.state === 'closed' && call.finish(parts);
    if (call.began) {
      this.#called = true;
      this.#blanks.flush();
    }
    if (whole) {
      this.#raw = '';
      this.#whole = true;
      this.#mode = 'after';
    } else if (call.state !== 'open') {
      this.#break(parts);
    }
    return at;
  }

  /** What has been taken is no call. */
  #break(parts: Part[]): void {
    if (this.#call!.began) parts.push({ type: 'broken', text: this.#raw });
    else this.#say(this.#raw, parts);
    this.#raw = '';
    this.#inList = false;
    this.#mode = 'text';
  }

  /** Outside of objects. False where the character does not belong there. */
  #between(char: string): boolean {
    const { end, listed, bare } = this.#form;
    const known = (name: string) => name !== '' && (!bare || this.#names.has(name));
    if (this.#mode === 'header') {
      if (char === '{') {
        const name = HEADER.exec(this.#raw.slice(this.#form.begin.length).trimStart())?.[1];
        if (name === undefined) return false;
        this.#open(new CallReader(known, bare, name));
        return true;
      }
      if (this.#raw.length > MAX_HEADER) return false;
    } else if (/\s/.test(char)) {
      // Looked at below: it is kept.
    } else if (char === '{' && (this.#mode === 'begin' || bare || this.#inList)) {
      this.#open(new CallReader(known, bare));
      return true;
    } else if (this.#mode === 'begin') {
      if (!listed) return false;
      if (char === '[' && !this.#inList) this.#inList = true;
      else if (/[\w]/.test(char) && !this.#inList) this.#mode = 'header';
      else return false;
    } else if (this.#inList && char === ']') {
      this.#inList = false;
      this.#raw = '';
      this.#mode = 'text';
      return true;
    } else if (this.#inList || bare) {
      if (char !== ',' && (char !== ';' || this.#inList)) return false;
    } else {
      const seen = this.#raw.trimStart() + char;
      if (!end.startsWith(seen)) return false;
      if (seen === end) {
        this.#raw = '';
        this.#mode = 'text';
        return true;
      }
    }
    this.#raw += char;
    return true;
  }

  #open(call: CallReader): void {
    this.#call = call;
    this.#mode = 'call';
    call.push('{');
    this.#raw += '{';
  }

  #giveUp(parts: Part[]): void {
    const raw = this.#raw;
    this.#raw = '';
    this.#inList = false;
    this.#mode = 'text';
    // Behind the one call that there may be nothing is told, a piece of a marker neither.
    if (!this.#single || !this.#whole) this.#say(raw, parts);
  }

  /** Blanks between content and calls are left out. */
  #say(text: string, parts: Part[]): void {
    const certain = this.#blanks.push(text);
    if (certain === '') return;
    const out = this.#called && !this.#hasContent ? certain.trimStart() : certain;
    this.#hasContent = true;
    parts.push({ type: 'content', text: out });
  }
}

/** One call: `{"name": "f", "arguments": {...}}`, or with a name that is known before, its arguments alone. */
class CallReader {
  began = false;
  readonly #known: (name: string) => boolean;
  readonly #bare: boolean;
  #refused = false;
  readonly #json = new JsonScanner();
  /** The object so far, until the call has begun. */
  #text = '';
  #name: string | undefined;
  /** Where the last string at the top began, and what it says where it is a key. */
  #stringAt = 0;
  #key: string | undefined;
  /** The depth at which the arguments begin; `inside` them now or not, and what of them has not been sent. */
  readonly #depth: 0 | 1;
  #arguments: 'before' | 'inside' | 'behind' = 'before';
  #unsent = '';

  /** `bare`: it is an answer rather than a call unless its first key and its name are those of one. */
  constructor(known: (name: string) => boolean, bare: boolean, name?: string) {
    this.#known = known;
    this.#bare = bare;
    this.#name = name;
    this.#depth = name === undefined ? 1 : 0;
  }

  get state(): JsonScanner['state'] {
    return this.#refused ? 'broken' : this.#json.state;
  }

  /** False where the object has ended before, or cannot have this character. */
  push(char: string): boolean {
    const json = this.#json;
    if (json.state !== 'open') return false;
    const { depth, expected } = json;
    if (json.push(char) === 'broken') return false;
    if (!this.began) this.#text += char;
    if (
      this.#arguments === 'before' &&
      depth === this.#depth &&
      char === '{' &&
      expected?.startsWith('value')
    ) {
      if (depth === 0 || this.#key === 'arguments' || this.#key === 'parameters') this.#arguments = 'inside';
    }
    if (this.#arguments === 'inside') {
      this.#unsent += char;
      if (json.depth === this.#depth) this.#arguments = 'behind';
    } else if (depth === 1 && char === '"' && !this.began && this.#depth === 1) {
      this.#string(expected !== undefined);
    }
    return !this.#refused;
  }

  /** A string at the top begins or ends. */
  #string(begins: boolean): void {
    if (begins) {
      this.#stringAt = this.#text.length - 1;
      return;
    }
    const { expected } = this.#json;
    if (expected === undefined) return; // an escaped quote
    const string = JSON.parse(this.#text.slice(this.#stringAt)) as string;
    if (expected === 'colon') {
      if (this.#bare && this.#key === undefined) this.#refused = !FIRST_KEYS.includes(string);
      this.#key = string;
    } else if (this.#key === 'name') {
      this.#name = string;
      if (this.#bare) this.#refused = !this.#known(string);
    }
  }

  /** What is certain by now. */
  send(parts: Part[]): void {
    if (this.#name === undefined || this.#arguments === 'before' || !this.#known(this.#name)) return;
    if (!this.began) parts.push({ type: 'call', name: this.#name });
    this.began = true;
    if (this.#unsent !== '') parts.push({ type: 'arguments', text: this.#unsent });
    this.#unsent = '';
  }

  /** The object is whole. False where it is no call. */
  finish(parts: Part[]): boolean {
    if (this.began) return true;
    const name = this.#name;
    if (name === undefined || !this.#known(name)) return false;
    const whole = parsed(this.#text) as Readonly<Record<string, unknown>> | undefined;
    let given: unknown = whole?.['arguments'] ?? whole?.['parameters'] ?? {};
    // Some write the arguments as OpenAI's API has them: JSON in a string.
    if (typeof given === 'string') given = parsed(given);
    if (typeof given !== 'object' || given === null || Array.isArray(given)) return false;
    this.began = true;
    parts.push({ type: 'call', name }, { type: 'arguments', text: JSON.stringify(given) });
    return true;
  }
}

/** Undefined where it is no JSON. */
function parsed(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch {
    return undefined;
  }
}
