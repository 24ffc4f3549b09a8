/** What a request may ask its text to be, and from there to the tables of a matcher. */
import { PdError } from '../errors.ts';
import { Budget } from './budget.ts';
import { type CallSpec, callGrammar } from './calls.ts';
import { type CompiledGrammar, compileGrammar } from './compile.ts';
import { ebnfGrammar } from './ebnf.ts';
import { choice, type Expression, type Grammar, text } from './expression.ts';
import { anyObject } from './json.ts';
import { jsonSchemaGrammar } from './json-schema.ts';
import { regexExpression } from './regex.ts';
import { eitherGrammar, type ThoughtMarkers, thoughtfulGrammar } from './whole.ts';

export type GrammarSpec =
  | { readonly kind: 'json-object' }
  | { readonly kind: 'json-schema'; readonly schema: unknown }
  /** The whole text matches. */
  | { readonly kind: 'regex'; readonly source: string }
  | { readonly kind: 'choice'; readonly texts: readonly string[] }
  | ({ readonly kind: 'calls' } & CallSpec)
  | { readonly kind: 'either'; readonly options: readonly GrammarSpec[] }
  /** Thoughts, and behind them an answer of that form. */
  | ({ readonly kind: 'thoughtful'; readonly answer: GrammarSpec } & ThoughtMarkers)
  /** Begun in rule `root`. */
  | { readonly kind: 'ebnf'; readonly source: string };

/** Tables for texts of `spec`. Takes under a second of CPU time; `now` and `cpu` as `Budget` has them. Throws REQUEST_INVALID, saying what is wrong or not supported. */
export function compileSpec(
  spec: GrammarSpec,
  now: () => number,
  cpu: () => number | undefined = now,
): CompiledGrammar {
  const budget = new Budget(now, cpu);
  return compileGrammar(grammarOf(spec, budget), budget);
}

function grammarOf(spec: GrammarSpec, budget: Budget): Grammar {
  switch (spec.kind) {
    case 'json-object':
      return anyObject();
    case 'json-schema':
      return jsonSchemaGrammar(spec.schema, budget);
    case 'regex':
      return only('regex', regexExpression(spec.source, 'whole'));
    case 'choice':
      if (spec.texts.length === 0) throw new PdError('REQUEST_INVALID', 'a choice needs at least one text');
      return only('choice', choice(...spec.texts.map(text)));
    case 'calls':
      return callGrammar(spec, budget);
    case 'either':
      return eitherGrammar(spec.options.map((option) => grammarOf(option, budget)));
    case 'thoughtful':
      return thoughtfulGrammar(spec, grammarOf(spec.answer, budget));
    case 'ebnf':
      return ebnfGrammar(spec.source);
  }
}

function only(name: string, body: Expression): Grammar {
  return { rules: [{ name, body }] };
}
