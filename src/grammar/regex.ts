/**
 * Regular expressions, as JavaScript and Python both understand them: characters, classes, groups, alternatives, repetitions. What no
 * automaton can do (backreferences), or what would need one more pass (look-around, boundaries), is refused by name.
 */
import { PdError } from '../errors.ts';
import {
  type CodePointRange,
  characters,
  choice,
  type Expression,
  LAST_CODE_POINT,
  otherRanges,
  repeat,
  sequence,
} from './expression.ts';

const DIGITS: readonly CodePointRange[] = [[0x30, 0x39]];
const WORD: readonly CodePointRange[] = [...DIGITS, [0x41, 0x5a], [0x5f, 0x5f], [0x61, 0x7a]];
const SPACE: readonly CodePointRange[] = [
  [0x09, 0x0d],
  [0x20, 0x20],
  [0xa0, 0xa0],
  [0x1680, 0x1680],
  [0x2000, 0x200a],
  [0x2028, 0x2029],
  [0x202f, 0x202f],
  [0x205f, 0x205f],
  [0x3000, 0x3000],
  [0xfeff, 0xfeff],
];
const LINE_ENDS: readonly CodePointRange[] = [
  [0x0a, 0x0a],
  [0x0d, 0x0d],
  [0x2028, 0x2029],
];
const ANYTHING: Expression = repeat(characters([0, LAST_CODE_POINT]), 0, Number.POSITIVE_INFINITY);

const MOST_LENGTH = 32_768;
const MOST_NESTING = 100;
const MOST_REPEATS = 100_000;
const CONTROLS: Readonly<Record<string, number>> = { t: 9, n: 10, v: 11, f: 12, r: 13, '0': 0 };
const CLASSES: Readonly<Record<string, readonly CodePointRange[]>> = {
  d: DIGITS,
  D: otherRanges(DIGITS),
  w: WORD,
  W: otherRanges(WORD),
  s: SPACE,
  S: otherRanges(SPACE),
};

/** `whole`: the text matches from end to end; `within`: it holds a match, as JSON Schema's `pattern` has it. Throws REQUEST_INVALID. */
export function regexExpression(source: string, mode: 'whole' | 'within'): Expression {
  if (source.length > MOST_LENGTH) {
    throw new PdError(
      'REQUEST_INVALID',
      `the regular expression has ${source.length} characters; at most ${MOST_LENGTH} are supported`,
    );
  }
  return new RegexReader(source, mode).read();
}

class RegexReader {
  readonly #source: string;
  readonly #mode: 'whole' | 'within';
  #at = 0;
  #depth = 0;

  constructor(source: string, mode: 'whole' | 'within') {
    this.#source = source;
    this.#mode = mode;
  }

  read(): Expression {
    const alternatives = [this.#topAlternative()];
    while (this.#take('|')) alternatives.push(this.#topAlternative());
    if (this.#at < this.#source.length) throw this.#invalid('a ")" closes nothing');
    return choice(...alternatives);
  }

  /** Anchors stand at the ends of the alternatives of the whole expression, and nowhere else. */
  #topAlternative(): Expression {
    const begins = this.#takeAnchor('^', '\\A');
    const items = this.#items();
    const ends = this.#takeAnchor('$', '\\Z', '\\z');
    const next = this.#peek();
    if (ends && next !== undefined && next !== '|' && next !== ')') {
      throw this.#unsupported('an anchor within the expression');
    }
    if (this.#mode === 'whole') return sequence(...items);
    return sequence(...(begins ? [] : [ANYTHING]), ...items, ...(ends ? [] : [ANYTHING]));
  }

  #takeAnchor(...names: readonly string[]): boolean {
    let found = false;
    while (names.some((name) => this.#take(name))) found = true;
    return found;
  }

  #alternatives(): Expression {
    const alternatives = [sequence(...this.#items())];
    while (this.#take('|')) alternatives.push(sequence(...this.#items()));
    return choice(...alternatives);
  }

  #items(): Expression[] {
    const items: Expression[] = [];
    for (;;) {
      const next = this.#peek();
      if (next === undefined || next === '|' || next === ')' || this.#atEndAnchor()) return items;
      items.push(this.#quantified(this.#atom()));
    }
  }

  #atEndAnchor(): boolean {
    return (
      ['$', '\\Z', '\\z'].some((anchor) => this.#source.startsWith(anchor, this.#at)) && this.#depth === 0
    );
  }

  #quantified(item: Expression): Expression {
    const counts = this.#quantifier();
    if (!counts) return item;
    const [min, max] = counts;
    if (Math.max(min, Number.isFinite(max) ? max : 0) > MOST_REPEATS) {
      throw new PdError(
        'REQUEST_INVALID',
        `the regular expression repeats something more than ${MOST_REPEATS} times`,
      );
    }
    if (min > max) throw this.#invalid(`{${min},${max}} has its numbers out of order`);
    // A lazy one matches the same texts.
    this.#take('?');
    if (this.#peek() === '+') throw this.#unsupported('a possessive quantifier');
    if (this.#quantifier()) throw this.#invalid('a quantifier has nothing to repeat');
    return repeat(item, min, max);
  }

  #quantifier(): readonly [number, number] | undefined {
    if (this.#take('*')) return [0, Number.POSITIVE_INFINITY];
    if (this.#take('+')) return [1, Number.POSITIVE_INFINITY];
    if (this.#take('?')) return [0, 1];
    const counts = this.#takePattern(/\{(\d{1,9})(,(\d{0,9}))?\}/y);
    if (!counts) return undefined;
    const min = Number(counts[1]);
    if (counts[2] === undefined) return [min, min];
    return [min, counts[3] ? Number(counts[3]) : Number.POSITIVE_INFINITY];
  }

  #atom(): Expression {
    const character = this.#next();
    switch (character) {
      case '(':
        return this.#group();
      case '[':
        return characters(...this.#characterClass());
      case '.':
        return characters(...otherRanges(LINE_ENDS));
      case '\\':
        return characters(...this.#escape(false));
      case '^':
      case '$':
        throw this.#unsupported('an anchor within the expression');
      case '*':
      case '+':
      case '?':
        throw this.#invalid(`"${character}" has nothing to repeat`);
      default:
        return characters(only(character));
    }
  }

  #group(): Expression {
    if (this.#take('?')) {
      const named = this.#takePattern(/P?<[A-Za-z_]\w*>/y);
      if (!named && !this.#take(':')) {
        const what = this.#takePattern(/<?[=!]/y) ? 'look-around' : 'a group with flags or a condition';
        throw this.#unsupported(what);
      }
    }
    if (++this.#depth > MOST_NESTING) {
      throw new PdError('REQUEST_INVALID', `the regular expression nests deeper than ${MOST_NESTING} groups`);
    }
    const inner = this.#alternatives();
    this.#depth--;
    if (!this.#take(')')) throw this.#invalid('a group is not closed');
    return inner;
  }

  #characterClass(): readonly CodePointRange[] {
    const negated = this.#take('^');
    const ranges: CodePointRange[] = [];
    for (let first = true; ; first = false) {
      if (this.#at >= this.#source.length) throw this.#invalid('a "[" is not closed');
      if (this.#take(']')) {
        // JavaScript reads [] as nothing and Python as the beginning of a class with a bracket.
        if (first) throw this.#unsupported('an empty class');
        break;
      }
      const low = this.#classMember();
      if (this.#peek() !== '-' || this.#source[this.#at + 1] === ']') {
        ranges.push(...low);
        continue;
      }
      this.#at++;
      const high = this.#classMember();
      const [from, to] = [low[0]![0], high[0]![0]];
      if (!isOne(low) || !isOne(high)) throw this.#invalid('a range of a class has a class at its end');
      if (from > to) throw this.#invalid('a range of a class has its ends out of order');
      ranges.push([from, to]);
    }
    return negated ? otherRanges(ranges) : ranges;
  }

  #classMember(): readonly CodePointRange[] {
    if (this.#at >= this.#source.length) throw this.#invalid('a "[" is not closed');
    const character = this.#next();
    return character === '\\' ? this.#escape(true) : [only(character)];
  }

  #escape(inClass: boolean): readonly CodePointRange[] {
    if (this.#at >= this.#source.length) throw this.#invalid('it ends in a backslash');
    const hex = this.#takePattern(/x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|u\{([0-9a-fA-F]{1,6})\}/y);
    if (hex) return [this.#codePoint(Number.parseInt((hex[1] ?? hex[2] ?? hex[3])!, 16))];
    const character = this.#next();
    if (Object.hasOwn(CLASSES, character)) return CLASSES[character]!;
    if (character === 'b' && inClass) return [[8, 8]];
    if (character === '0' && /\d/.test(this.#peek() ?? '')) throw this.#unsupported('an octal escape');
    if (Object.hasOwn(CONTROLS, character)) return [[CONTROLS[character]!, CONTROLS[character]!]];
    if (/[1-9k]/.test(character)) throw this.#unsupported('a backreference');
    if (/[bBAZzG]/.test(character)) throw this.#unsupported('a boundary within the expression');
    if (/[pP]/.test(character)) throw this.#unsupported('a class by Unicode property');
    if (/[a-zA-Z]/.test(character)) throw this.#unsupported(`the escape \\${character}`);
    return [only(character)];
  }

  /** Two escapes of surrogates spell one character. */
  #codePoint(value: number): CodePointRange {
    if (value > LAST_CODE_POINT) throw this.#invalid('an escape is above the last code point');
    if (value < 0xd800 || value > 0xdfff) return [value, value];
    const low = value < 0xdc00 ? this.#takePattern(/\\u([dD][c-fC-F][0-9a-fA-F]{2})/y) : undefined;
    if (!low) throw this.#unsupported('half of a surrogate pair');
    const whole = 0x10000 + (value - 0xd800) * 0x400 + Number.parseInt(low[1]!, 16) - 0xdc00;
    return [whole, whole];
  }

  #peek(): string | undefined {
    return this.#source[this.#at];
  }

  #next(): string {
    const character = String.fromCodePoint(this.#source.codePointAt(this.#at)!);
    this.#at += character.length;
    return character;
  }

  #take(expected: string): boolean {
    if (!this.#source.startsWith(expected, this.#at)) return false;
    this.#at += expected.length;
    return true;
  }

  /** `pattern` is sticky. */
  #takePattern(pattern: RegExp): RegExpExecArray | undefined {
    pattern.lastIndex = this.#at;
    const found = pattern.exec(this.#source);
    if (!found) return undefined;
    this.#at += found[0].length;
    return found;
  }

  #invalid(why: string): PdError {
    return new PdError(
      'REQUEST_INVALID',
      `the regular expression cannot be read at character ${this.#at}: ${why}`,
    );
  }

  #unsupported(what: string): PdError {
    return new PdError(
      'REQUEST_INVALID',
      `the regular expression has ${what} (before character ${this.#at}), which is not supported`,
    );
  }
}

function only(character: string): CodePointRange {
  const codePoint = character.codePointAt(0)!;
  return [codePoint, codePoint];
}

function isOne(ranges: readonly CodePointRange[]): boolean {
  return ranges.length === 1 && ranges[0]![0] === ranges[0]![1];
}

/** The same over what JSON writes for each character inside of a string: `"` and `\` escaped, controls as \u00XX. */
export function insideString(expression: Expression): Expression {
  switch (expression.kind) {
    case 'character':
      return jsonCharacter(expression.ranges);
    case 'sequence':
    case 'choice':
      return { ...expression, items: expression.items.map(insideString) };
    case 'repeat':
      return { ...expression, item: insideString(expression.item) };
    case 'graph':
      return {
        ...expression,
        edges: expression.edges.map((edge) => ({ ...edge, item: insideString(edge.item) })),
      };
    case 'byte':
    case 'text':
    case 'rule':
      throw new PdError('INTERNAL', `a ${expression.kind} is not written in characters`);
  }
}

const ESCAPED: readonly CodePointRange[] = [
  [0, 0x1f],
  [0x22, 0x22],
  [0x5c, 0x5c],
];

function jsonCharacter(ranges: readonly CodePointRange[]): Expression {
  const plain = otherRanges([...otherRanges(ranges), ...ESCAPED]);
  const escaped: Expression[] = [];
  for (const [first, last] of ESCAPED) {
    for (let codePoint = first; codePoint <= last; codePoint++) {
      if (!ranges.some(([low, high]) => low <= codePoint && codePoint <= high)) continue;
      const written = JSON.stringify(String.fromCodePoint(codePoint)).slice(1, -1);
      escaped.push({ kind: 'text', bytes: new TextEncoder().encode(written) });
    }
  }
  const known = escaped.length > 0 ? choice(characters(...plain), ...escaped) : characters(...plain);
  return plain.length === 0 && escaped.length === 0 ? choice() : known;
}
