/** One JSON object, character by character: where it ends, and the first character that makes it none. */

type Expected = 'value' | 'value or end' | 'key' | 'key or end' | 'colon' | 'comma or end';

const BLANK = /[ \t\n\r]/;
const SCALAR = /[-+.0-9A-Za-z]/;
const SCALARS = /^(?:true|false|null|-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?)$/;
/** Nobody means more; JSON.parse would take it, and a template's recursion would not. */
const MAX_DEPTH = 200;

export class JsonScanner {
  /** `open` from the first brace to the last. */
  state: 'open' | 'closed' | 'broken' = 'open';
  readonly #stack: ('{' | '[')[] = [];
  #expected: Expected = 'value';
  #inString = false;
  /** Of an escape within a string: characters that are still to come; 5 right after the backslash, as what comes then says how many. */
  #escape = 0;
  #scalar = '';

  /** Braces and brackets that are open. */
  get depth(): number {
    return this.#stack.length;
  }

  /** What comes next, blanks aside. Undefined within a string, a number or a word. */
  get expected(): Expected | undefined {
    return this.#inString || this.#scalar !== '' ? undefined : this.#expected;
  }

  push(char: string): JsonScanner['state'] {
    if (this.state !== 'open') return this.state;
    if (!this.#take(char)) this.state = 'broken';
    else if (this.#stack.length === 0) this.state = 'closed';
    return this.state;
  }

  #take(char: string): boolean {
    if (this.#inString) return this.#inside(char);
    if (this.#scalar !== '') {
      if (SCALAR.test(char)) {
        this.#scalar += char;
        return this.#scalar.length <= 400;
      }
      if (!SCALARS.test(this.#scalar)) return false;
      this.#scalar = '';
    }
    if (BLANK.test(char)) return this.#stack.length > 0;
    const expected = this.#expected;
    switch (char) {
      case '{':
      case '[':
        if (!expected.startsWith('value') || this.#stack.length === MAX_DEPTH) return false;
        if (this.#stack.length === 0 && char === '[') return false;
        this.#stack.push(char);
        this.#expected = char === '{' ? 'key or end' : 'value or end';
        return true;
      case '}':
      case ']':
        if (!expected.endsWith('or end')) return false;
        this.#expected = 'comma or end';
        return this.#stack.pop() === (char === '}' ? '{' : '[');
      case ':':
        this.#expected = 'value';
        return expected === 'colon';
      case ',':
        this.#expected = this.#stack.at(-1) === '{' ? 'key' : 'value';
        return expected === 'comma or end';
      case '"':
        this.#inString = true;
        if (expected.startsWith('key')) this.#expected = 'colon';
        else if (expected.startsWith('value')) this.#expected = 'comma or end';
        else return false;
        return this.#stack.length > 0;
      default:
        if (!expected.startsWith('value') || !SCALAR.test(char) || this.#stack.length === 0) return false;
        this.#scalar = char;
        this.#expected = 'comma or end';
        return true;
    }
  }

  #inside(char: string): boolean {
    if (this.#escape === 5) {
      this.#escape = char === 'u' ? 4 : 0;
      return /["\\/bfnrtu]/.test(char);
    }
    if (this.#escape > 0) {
      this.#escape--;
      return /[0-9a-fA-F]/.test(char);
    }
    if (char === '\\') this.#escape = 5;
    else if (char === '"') this.#inString = false;
    return char >= ' ';
  }
}
