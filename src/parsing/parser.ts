/** The parser of an answer, from what was found out about the request. */
import { type CallDialect, CallParser, callTokens } from './calls.ts';
import type { PartParser } from './parts.ts';
import { type ReasoningDialect, ReasoningParser, reasoningTokens } from './reasoning.ts';

/** Plain data: it crosses threads. */
export interface Parsing {
  /** Absent: the request has no tools. `names`: theirs; `single`: there may be one call at most. */
  readonly calls?: {
    readonly dialect: CallDialect;
    readonly names: readonly string[];
    readonly single?: boolean;
  };
  /** Absent: the model does not think. `inside`: the prompt has opened the thoughts. */
  readonly reasoning?: { readonly dialect: ReasoningDialect; readonly inside: boolean };
}

const PLAIN: PartParser = {
  push: (text) => (text === '' ? [] : [{ type: 'content', text }]),
  flush: () => [],
  done: false,
};

export function createParser({ calls, reasoning }: Parsing): PartParser {
  const answer = calls ? new CallParser(calls.dialect, calls.names, calls.single) : PLAIN;
  return reasoning ? new ReasoningParser(reasoning.dialect, reasoning.inside, answer) : answer;
}

/** Special tokens that the parser reads: their text must not be left out. */
export function parsedTokens({ calls, reasoning }: Parsing): readonly string[] {
  return [
    ...(calls ? callTokens(calls.dialect) : []),
    ...(reasoning ? reasoningTokens(reasoning.dialect) : []),
  ];
}
