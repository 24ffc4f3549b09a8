/** Calls of tools as a grammar: a model under it calls what there is, with arguments that satisfy the function's schema. */
import type { Budget } from './budget.ts';
import {
  choice,
  type Expression,
  type Grammar,
  type Rule,
  repeat,
  rule,
  sequence,
  text,
} from './expression.ts';
import { jsonSchemaGrammar } from './json-schema.ts';

/** How a model writes calls. */
export interface CallForm {
  /** Before the first of them and behind the last. */
  readonly before: string;
  readonly after: string;
  /** Between two. */
  readonly between: string;
  /** Around name and arguments. */
  readonly open: string;
  readonly middle: string;
  readonly close: string;
}

export interface CallSpec {
  readonly form: CallForm;
  /** One or more, or exactly one. */
  readonly many: boolean;
  /** Absent parameters: it takes none. */
  readonly functions: readonly { readonly name: string; readonly parameters?: object | undefined }[];
}

/** Throws REQUEST_INVALID for a schema that is none or is not supported, by the name of its function. */
export function callGrammar({ form, many, functions }: CallSpec, budget: Budget): Grammar {
  const rules: Rule[] = [];
  const calls = functions.map(({ name, parameters }) => {
    const start = [text(form.open), text(name), text(form.middle)];
    if (!parameters) return sequence(...start, text(`{}${form.close}`));
    const grammar = jsonSchemaGrammar({ type: 'object', ...parameters }, budget);
    const first = rules.length + 1;
    rules.push(...moved(grammar.rules, first));
    return sequence(...start, rule(first), text(form.close));
  });
  const call = choice(...calls);
  const more = repeat(sequence(text(form.between), call), 0, many ? Number.POSITIVE_INFINITY : 0);
  const body = sequence(text(form.before), call, more, text(form.after));
  return { rules: [{ name: 'calls', body }, ...rules] };
}

/** The same rules from number `first` on. What is one object stays one. */
function moved(rules: readonly Rule[], first: number): Rule[] {
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
  return rules.map(({ name, body }) => ({ name, body: move(body) }));
}
