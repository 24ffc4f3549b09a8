/**
 * Parts of JSON as expressions. What is written is a little less than what JSON allows, so that a model cannot lose itself: blanks between
 * tokens and digits of numbers are limited, and nothing has surrogates by escapes.
 */
import {
  type CodePointRange,
  characters,
  choice,
  EMPTY,
  type Expression,
  type GraphEdge,
  oneOf,
  optional,
  otherRanges,
  type Rule,
  repeat,
  rule,
  sequence,
  text,
} from './expression.ts';

/** Blanks between two tokens, at most. */
const MOST_BLANKS = 64;
const MOST_DIGITS = 20;

/** What stands in a string as it is. */
const PLAIN_CHARACTERS: readonly CodePointRange[] = otherRanges([
  [0, 0x1f],
  [0x22, 0x22],
  [0x5c, 0x5c],
]);

const HEX = characters([0x30, 0x39], [0x41, 0x46], [0x61, 0x66]);
/** One character of a string. Escapes of surrogates (\ud800 to \udfff) are left out: characters beyond U+FFFF stand for themselves. */
const STRING_CHARACTER: Expression = choice(
  characters(...PLAIN_CHARACTERS),
  sequence(text('\\'), oneOf('"\\/bfnrt')),
  sequence(
    text('\\u'),
    choice(
      sequence(
        characters([0x30, 0x39], [0x41, 0x43], [0x45, 0x46], [0x61, 0x63], [0x65, 0x66]),
        HEX,
        HEX,
        HEX,
      ),
      sequence(oneOf('dD'), characters([0x30, 0x37]), HEX, HEX),
    ),
  ),
);

export const DIGIT = characters([0x30, 0x39]);
const NATURAL = choice(text('0'), sequence(characters([0x31, 0x39]), repeat(DIGIT, 0, MOST_DIGITS - 1)));
export const INTEGER: Expression = sequence(optional(text('-')), NATURAL);
export const NUMBER: Expression = sequence(
  INTEGER,
  optional(sequence(text('.'), repeat(DIGIT, 1, MOST_DIGITS))),
  optional(sequence(oneOf('eE'), optional(oneOf('+-')), repeat(DIGIT, 1, 2))),
);
/** Each number that it writes in one way alone, and none that is read as another: 15 digits are told apart. */
const NONZERO = characters([0x31, 0x39]);
const TRIMMED = sequence(text('.'), repeat(DIGIT, 0, 5), NONZERO);
export const SINGLE_NUMBER: Expression = choice(
  text('0'),
  sequence(optional(text('-')), NONZERO, repeat(DIGIT, 0, 14)),
  sequence(optional(text('-')), choice(text('0'), sequence(NONZERO, repeat(DIGIT, 0, 8))), TRIMMED),
);
const BOOLEAN: Expression = choice(text('true'), text('false'));

/** A string of so many characters. */
export function stringOf(min: number, max: number): Expression {
  return quoted(repeat(STRING_CHARACTER, min, max));
}

export function quoted(inside: Expression): Expression {
  return sequence(text('"'), inside, text('"'));
}

/** `value` as JSON writes it without blanks. */
export function literal(value: unknown): Expression {
  return text(JSON.stringify(value));
}

/** A key and its value, blanks between them. */
export function member(blanks: Expression, key: Expression, value: Expression): Expression {
  return sequence(key, blanks, text(':'), blanks, value);
}

/** Keys in plain characters that are none of `names`. */
export function keyBesides(names: Iterable<string>): Expression {
  interface Node {
    readonly next: Map<string, number>;
    isName: boolean;
  }
  const nodes: Node[] = [{ next: new Map(), isName: false }];
  for (const name of names) {
    let at = 0;
    for (const character of name) {
      const known = nodes[at]!.next.get(character);
      const next = known ?? nodes.push({ next: new Map(), isName: false }) - 1;
      nodes[at]!.next.set(character, next);
      at = next;
    }
    nodes[at]!.isName = true;
  }
  /** Behind the nodes: no name begins so. */
  const free = nodes.length;
  const edges: GraphEdge[] = [{ from: free, to: free, item: characters(...PLAIN_CHARACTERS) }];
  nodes.forEach(({ next }, from) => {
    const taken: CodePointRange[] = [];
    for (const [character, to] of next) {
      const codePoint = character.codePointAt(0)!;
      taken.push([codePoint, codePoint]);
      // A name with a quote or a control in it is never met, as keys here are plain.
      if (JSON.stringify(character).length === character.length + 2) {
        edges.push({ from, to, item: characters([codePoint, codePoint]) });
      }
    }
    const others = otherRanges([...otherRanges(PLAIN_CHARACTERS), ...taken]);
    edges.push({ from, to: free, item: characters(...others) });
  });
  const ends = [free, ...nodes.flatMap(({ isName }, at) => (isName ? [] : [at]))];
  return quoted({ kind: 'graph', size: nodes.length + 1, edges, ends });
}

/** The rules that any JSON text is made of, from rule `first` on. */
export function jsonRules(first: number): {
  readonly rules: readonly Rule[];
  readonly blanks: Expression;
  readonly string: Expression;
  readonly value: Expression;
  readonly object: Expression;
  readonly array: Expression;
} {
  const [blanks, string, value, object, array] = [0, 1, 2, 3, 4].map((i) => rule(first + i)) as [
    Expression,
    Expression,
    Expression,
    Expression,
    Expression,
  ];
  const bodies: Record<string, Expression> = {
    blanks: repeat(oneOf(' \t\n\r'), 0, MOST_BLANKS),
    string: stringOf(0, Number.POSITIVE_INFINITY),
    'any value': choice(string, NUMBER, BOOLEAN, text('null'), object, array),
    'any object': listed(blanks, '{', member(blanks, string, value), '}'),
    'any array': listed(blanks, '[', value, ']'),
  };
  const rules = Object.entries(bodies).map(([name, body]): Rule => ({ name, body }));
  return { rules, blanks, string, value, object, array };
}

function listed(blanks: Expression, open: string, item: Expression, close: string): Expression {
  const more = repeat(sequence(text(','), blanks, item, blanks), 0, Number.POSITIVE_INFINITY);
  return sequence(text(open), blanks, choice(EMPTY, sequence(item, blanks, more)), text(close));
}

/** Any JSON object: what `json_object` asks for. */
export function anyObject(): { readonly rules: readonly Rule[] } {
  const { rules, blanks, object } = jsonRules(1);
  return { rules: [{ name: 'JSON object', body: sequence(blanks, object) }, ...rules] };
}
