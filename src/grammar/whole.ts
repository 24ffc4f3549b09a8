/** The whole of what a model writes: thoughts before an answer, one of several kinds of answers, special tokens around their parts. */
import {
  type CodePointRange,
  characters,
  choice,
  EMPTY,
  type Expression,
  type Grammar,
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

const MOST_BLANKS = 16;
/** No byte of any text. */
const NO_TEXT = 0xff;

/** What a special token is spelt as in a vocabulary: no text of a grammar, unless it asks for that token. */
export function specialBytes(token: string): Uint8Array {
  return Uint8Array.from([NO_TEXT, ...new TextEncoder().encode(token), NO_TEXT]);
}

/** The bytes of a token; undefined where they are of no text: a vocabulary has tokens of single bytes, by which a special one could be spelt. */
export function textBytes(token: Uint8Array | undefined): Uint8Array | undefined {
  return token?.includes(NO_TEXT) ? undefined : token;
}

/** `value`, in which each of `tokens` is that text or the special token of the name. */
export function textWithTokens(value: string, tokens: readonly string[]): Expression {
  const token = tokens.find((one) => value.includes(one));
  if (token === undefined) return text(value);
  const at = value.indexOf(token);
  return sequence(
    text(value.slice(0, at)),
    marker(token),
    textWithTokens(value.slice(at + token.length), tokens),
  );
}

function marker(token: string): Expression {
  return choice(text(token), { kind: 'text', bytes: specialBytes(token) });
}

/** Any of them. */
export function eitherGrammar(options: readonly Grammar[]): Grammar {
  const rules: Rule[] = [];
  const starts = options.map((option) => {
    const first = rules.length + 1;
    rules.push(...movedRules(option.rules, first));
    return rule(first);
  });
  return { rules: [{ name: 'answer', body: choice(...starts) }, ...rules] };
}

export interface ThoughtMarkers {
  readonly begin: string;
  readonly end: string;
  /** The text begins within thoughts; else it may have some or none. */
  readonly inside: boolean;
}

export function thoughtfulGrammar({ begin, end, inside }: ThoughtMarkers, answer: Grammar): Grammar {
  const blanks = repeat(oneOf(' \t\r\n'), 0, MOST_BLANKS);
  const thoughts = sequence(until(end), blanks);
  const before = inside ? thoughts : optional(sequence(blanks, marker(begin), thoughts));
  return {
    rules: [{ name: 'thoughts and answer', body: sequence(before, rule(1)) }, ...movedRules(answer.rules, 1)],
  };
}

/** Any text up to the first `end`, that included. State i: the last i characters are the first i of `end`. */
function until(end: string): Expression {
  const wanted = Array.from(end);
  const edges: GraphEdge[] = [];
  wanted.forEach((_, from) => {
    const known = new Set(wanted.slice(0, from + 1));
    const ranges = [...known].map((one): CodePointRange => [one.codePointAt(0)!, one.codePointAt(0)!]);
    edges.push({ from, to: 0, item: characters(...otherRanges(ranges)) });
    for (const one of known)
      edges.push({ from, to: overlap([...wanted.slice(0, from), one], wanted), item: text(one) });
    edges.push({ from, to: wanted.length, item: { kind: 'text', bytes: specialBytes(end) } });
  });
  if (wanted.length === 0) return EMPTY;
  return { kind: 'graph', size: wanted.length + 1, edges, ends: [wanted.length] };
}

/** How many characters at the end of `read` are the first ones of `wanted`. */
function overlap(read: readonly string[], wanted: readonly string[]): number {
  let count = Math.min(read.length, wanted.length);
  while (count > 0 && !wanted.slice(0, count).every((one, i) => one === read[read.length - count + i]))
    count--;
  return count;
}

/** The same rules from number `first` on. What is one object stays one. */
export function movedRules(rules: readonly Rule[], first: number): Rule[] {
  const known = new Map<Expression, Expression>();
  const move = (expression: Expression): Expression => {
    const there = known.get(expression);
    if (there) return there;
    const result = moveOne(expression);
    known.set(expression, result);
    return result;
  };
  const moveOne = (expression: Expression): Expression => {
    switch (expression.kind) {
      case 'byte':
      case 'character':
      case 'text':
        return expression;
      case 'sequence':
      case 'choice':
        return { ...expression, items: expression.items.map(move) };
      case 'repeat':
        return { ...expression, item: move(expression.item) };
      case 'graph':
        return { ...expression, edges: expression.edges.map((edge) => ({ ...edge, item: move(edge.item) })) };
      case 'rule':
        return rule(expression.rule + first);
    }
  };
  return rules.map((one) => ({ ...one, body: move(one.body) }));
}
