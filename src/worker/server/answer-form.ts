/** The form of a chat's answer: what `response_format` and `tool_choice` ask for, behind the thoughts of a model that thinks. */
import type { GrammarSpec } from '../../grammar/grammar.ts';
import { callTokens, writtenForm } from '../../parsing/calls.ts';
import type { Parsing } from '../../parsing/parser.ts';
import { thoughtMarkers } from '../../parsing/reasoning.ts';
import { badField, type GrammarWish } from './fields.ts';
import type { ConversationBody } from './messages.ts';

/** `wish`: of the answer without calls. Undefined where any text will do. Throws REQUEST_INVALID. */
export function answerForm(
  { tools = [], tool_choice: choice }: ConversationBody,
  parsing: Parsing,
  wish: GrammarWish | undefined,
): GrammarWish | undefined {
  const calls = callsSpec(tools, choice, parsing);
  const mustCall = choice === 'required' || typeof choice === 'object';
  const form = mustCall
    ? calls && { spec: calls, param: 'tools', unused: wish }
    : wish && besideCalls(wish, calls);
  if (!form || !parsing.reasoning) return form;
  const { dialect, inside } = parsing.reasoning;
  const { begin, end } = thoughtMarkers(dialect);
  return { ...form, spec: { kind: 'thoughtful', begin, end, inside, answer: form.spec } };
}

function besideCalls({ spec, param }: GrammarWish, calls: GrammarSpec | undefined): GrammarWish {
  return calls ? { spec: { kind: 'either', options: [spec, calls] }, param } : { spec, param };
}

function callsSpec(
  tools: NonNullable<ConversationBody['tools']>,
  choice: ConversationBody['tool_choice'],
  { calls }: Parsing,
): GrammarSpec | undefined {
  const named = typeof choice === 'object' ? choice.function.name : undefined;
  const mayCall = named !== undefined || choice === 'required';
  if (!calls) {
    if (mayCall) throw badField('tool_choice', 'asks for a call, and there are no tools');
    return undefined;
  }
  const chosen = tools.filter(({ function: { name } }) => named === undefined || name === named);
  if (chosen.length === 0)
    throw badField(
      'tool_choice',
      `names ${JSON.stringify(named?.slice(0, 200))}, which is none of the tools`,
    );
  return {
    kind: 'calls',
    form: writtenForm(calls.dialect),
    tokens: callTokens(calls.dialect),
    many: !calls.single && named === undefined,
    // A model that may call is held to the names alone, as it is without a form of its answer.
    functions: chosen.map(({ function: { name, parameters } }) => ({
      name,
      parameters: mayCall ? parameters : {},
    })),
  };
}
