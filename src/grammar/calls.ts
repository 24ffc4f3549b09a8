/** Calls of tools as a grammar: a model under it calls what there is, with arguments that satisfy the function's schema. */
import { PdError } from '../errors.ts';
import type { Budget } from './budget.ts';
import { choice, type Grammar, type Rule, repeat, rule, sequence, text } from './expression.ts';
import { jsonSchemaGrammar } from './json-schema.ts';
import { movedRules, textWithTokens } from './whole.ts';

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
  /** Of what the form says: these may be special tokens of the model. */
  readonly tokens?: readonly string[];
  /** One or more, or exactly one. */
  readonly many: boolean;
  /** Absent parameters: it takes none. */
  readonly functions: readonly { readonly name: string; readonly parameters?: object | undefined }[];
}

/** Throws REQUEST_INVALID for a schema that is none or is not supported, by the name of its function. */
export function callGrammar({ form, tokens = [], many, functions }: CallSpec, budget: Budget): Grammar {
  const written = (part: keyof CallForm) => textWithTokens(form[part], tokens);
  const rules: Rule[] = [];
  const calls = functions.map(({ name, parameters }) => {
    const start = [written('open'), text(name), written('middle')];
    if (!parameters) return sequence(...start, text('{}'), written('close'));
    const { type = 'object' } = parameters as { readonly type?: unknown };
    if (![type].flat().includes('object')) {
      throw new PdError(
        'REQUEST_INVALID',
        `parameters of function ${name} are no object, as those of a call are`,
      );
    }
    const grammar = jsonSchemaGrammar({ ...parameters, type: 'object' }, budget);
    const first = rules.length + 1;
    rules.push(...movedRules(grammar.rules, first));
    return sequence(...start, rule(first), written('close'));
  });
  const call = choice(...calls);
  const more = repeat(sequence(written('between'), call), 0, many ? Number.POSITIVE_INFINITY : 0);
  const body = sequence(written('before'), call, more, written('after'));
  return { rules: [{ name: 'calls', body }, ...rules] };
}
