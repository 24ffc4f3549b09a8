/**
 * Grammars as users write them: `name ::= ...`, begun in rule `root`. Texts in quotes, classes in brackets, `.`, groups, `|`, the
 * repetitions `*`, `+`, `?` and `{m,n}`, comments behind `#`.
 */
import { PdError } from '../errors.ts';
import {
  type CodePointRange,
  characters,
  choice,
  type Expression,
  type Grammar,
  LAST_CODE_POINT,
  otherRanges,
  type Rule,
  repeat,
  rule,
  sequence,
  text,
} from './expression.ts';

const MOST_LENGTH = 262_144;
const MOST_NESTING = 100;
const MOST_REPEATS = 100_000;
const DEFINITION = /([A-Za-z_][\w-]*)[ \t\r\n]*::=/y;
const NAME = /[A-Za-z_][\w-]*/y;
const BLANKS = /(?:[ \t\r\n]+|#[^\n]*)+/y;
const ESCAPES: Readonly<Record<string, string>> = { n: '\n', r: '\r', t: '\t' };

/** Throws REQUEST_INVALID with the line. */
export function ebnfGrammar(source: string): Grammar {
  if (source.length > MOST_LENGTH) {
    throw new PdError(
      'REQUEST_INVALID',
      `the grammar has ${source.length} characters; at most ${MOST_LENGTH} are supported`,
    );
  }
  return new EbnfReader(source).read();
}

class EbnfReader {
  readonly #source: string;
  readonly #numbers = new Map<string, number>([['root', 0]]);
  readonly #bodies = new Map<number, Expression>();
  #at = 0;
  #depth = 0;

  constructor(source: string) {
    this.#source = source;
  }

  read(): Grammar {
    this.#skip();
    while (this.#at < this.#source.length) {
      const name = this.#takePattern(DEFINITION)?.[1];
      if (name === undefined) throw this.#invalid('a rule begins with NAME ::=');
      const number = this.#numberOf(name);
      if (this.#bodies.has(number)) throw this.#invalid(`rule "${name}" is defined twice`);
      this.#skip();
      this.#bodies.set(number, withoutLeftRecursion(this.#alternatives(), number));
    }
    const rules = [...this.#numbers].map(([name, number]): Rule => {
      const body = this.#bodies.get(number);
      if (!body) throw new PdError('REQUEST_INVALID', `the grammar does not define rule "${name}"`);
      return { name, body };
    });
    return { rules };
  }

  #numberOf(name: string): number {
    const known = this.#numbers.get(name);
    if (known !== undefined) return known;
    this.#numbers.set(name, this.#numbers.size);
    return this.#numbers.size - 1;
  }

  #alternatives(): readonly Expression[] {
    const alternatives = [this.#sequence()];
    while (this.#take('|')) alternatives.push(this.#sequence());
    return alternatives;
  }

  #sequence(): Expression {
    const items: Expression[] = [];
    for (;;) {
      const next = this.#source[this.#at];
      if (next === undefined || next === '|' || next === ')' || this.#looksAt(DEFINITION)) {
        if (next === ')' && this.#depth === 0) throw this.#invalid('a ")" closes nothing');
        return sequence(...items);
      }
      items.push(this.#repeated(this.#atom()));
    }
  }

  #repeated(item: Expression): Expression {
    let result = item;
    for (let times = 0; ; times++) {
      const counts = this.#counts();
      if (!counts) return result;
      if (times >= MOST_NESTING) throw this.#invalid('too many repetitions of repetitions');
      const [min, max] = counts;
      if (min > max) throw this.#invalid(`{${min},${max}} has its numbers out of order`);
      if (Math.max(min, Number.isFinite(max) ? max : 0) > MOST_REPEATS) {
        throw this.#invalid(`something is repeated more than ${MOST_REPEATS} times`);
      }
      result = repeat(result, min, max);
    }
  }

  #counts(): readonly [number, number] | undefined {
    if (this.#take('*')) return [0, Number.POSITIVE_INFINITY];
    if (this.#take('+')) return [1, Number.POSITIVE_INFINITY];
    if (this.#take('?')) return [0, 1];
    const counts = this.#takePattern(/\{\s*(\d{0,9})\s*(,\s*(\d{0,9}))?\s*\}/y);
    if (!counts) return undefined;
    this.#skip();
    const min = Number(counts[1]);
    if (counts[2] === undefined) {
      if (counts[1] === '') throw this.#invalid('a repetition has no number');
      return [min, min];
    }
    return [min, counts[3] ? Number(counts[3]) : Number.POSITIVE_INFINITY];
  }

  #atom(): Expression {
    const quote = this.#source[this.#at]!;
    switch (quote) {
      case '"':
      case "'": {
        this.#at++;
        const value = this.#quoted(quote);
        this.#skip();
        return text(value);
      }
      case '[': {
        this.#at++;
        const item = characters(...this.#characterClass());
        this.#skip();
        return item;
      }
      case '(': {
        this.#at++;
        if (++this.#depth > MOST_NESTING) throw this.#invalid(`groups nest deeper than ${MOST_NESTING}`);
        if (this.#source[this.#at] === '=') throw this.#invalid('look-ahead is not supported');
        this.#skip();
        const inner = choice(...this.#alternatives());
        if (!this.#take(')')) throw this.#invalid('a group is not closed');
        this.#depth--;
        return inner;
      }
      case '.':
        this.#take('.');
        return characters([0, LAST_CODE_POINT]);
      default: {
        const name = this.#takePattern(NAME)?.[0];
        if (name === undefined) throw this.#invalid(`"${quote}" is not expected`);
        this.#skip();
        return rule(this.#numberOf(name));
      }
    }
  }

  #quoted(quote: string): string {
    let value = '';
    for (;;) {
      const character = this.#character('a text in quotes');
      if (character === quote) return value;
      value += character === '\\' ? this.#escape() : character;
    }
  }

  #characterClass(): readonly CodePointRange[] {
    const negated = this.#source[this.#at] === '^';
    if (negated) this.#at++;
    const ranges: CodePointRange[] = [];
    for (;;) {
      const character = this.#character('a class');
      if (character === ']') return negated ? otherRanges(ranges) : ranges;
      const low = (character === '\\' ? this.#escape() : character).codePointAt(0)!;
      let high = low;
      if (this.#source[this.#at] === '-' && this.#source[this.#at + 1] !== ']') {
        this.#at++;
        const last = this.#character('a class');
        high = (last === '\\' ? this.#escape() : last).codePointAt(0)!;
        if (low > high) throw this.#invalid('a range of a class has its ends out of order');
      }
      ranges.push([low, high]);
    }
  }

  #escape(): string {
    const hex = this.#takePattern(/x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})/y);
    if (hex) {
      const codePoint = Number.parseInt((hex[1] ?? hex[2] ?? hex[3])!, 16);
      if (codePoint > LAST_CODE_POINT || (codePoint >= 0xd800 && codePoint <= 0xdfff)) {
        throw this.#invalid('an escape is no character');
      }
      return String.fromCodePoint(codePoint);
    }
    const character = this.#character('an escape');
    if (Object.hasOwn(ESCAPES, character)) return ESCAPES[character]!;
    if (/[A-Za-z0-9]/.test(character)) throw this.#invalid(`the escape \\${character} is not supported`);
    return character;
  }

  #character(within: string): string {
    const codePoint = this.#source.codePointAt(this.#at);
    if (codePoint === undefined) throw this.#invalid(`${within} is not closed`);
    const character = String.fromCodePoint(codePoint);
    this.#at += character.length;
    return character;
  }

  #take(expected: string): boolean {
    if (this.#source[this.#at] !== expected) return false;
    this.#at++;
    this.#skip();
    return true;
  }

  #skip(): void {
    this.#takePattern(BLANKS);
  }

  #looksAt(pattern: RegExp): boolean {
    pattern.lastIndex = this.#at;
    return pattern.test(this.#source);
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
    const line = this.#source.slice(0, this.#at).split('\n').length;
    return new PdError('REQUEST_INVALID', `the grammar cannot be read in line ${line}: ${why}`);
  }
}

/** `a ::= a x | y`, which would never begin, as `a ::= y x*`. */
function withoutLeftRecursion(alternatives: readonly Expression[], self: number): Expression {
  const isSelf = (item: Expression | undefined) => item?.kind === 'rule' && item.rule === self;
  const tails: Expression[] = [];
  const others: Expression[] = [];
  for (const one of alternatives) {
    if (isSelf(one)) continue;
    if (one.kind === 'sequence' && isSelf(one.items[0])) tails.push(sequence(...one.items.slice(1)));
    else others.push(one);
  }
  if (tails.length === 0 && others.length === alternatives.length) return choice(...others);
  return sequence(choice(...others), repeat(choice(...tails), 0, Number.POSITIVE_INFINITY));
}
