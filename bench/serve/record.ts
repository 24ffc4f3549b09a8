/** A planned request, and what is known about it afterwards. */

export type Endpoint = 'completions' | 'chat';

export interface PlannedRequest {
  readonly index: number;
  /** In a chat: the user's message. Token ids: for completions alone. */
  readonly prompt: string | readonly number[];
  /** As counted by the server's tokenizer, else as requested; absent for prompts from a file. */
  readonly promptTokens?: number;
  readonly outputTokens: number;
}

export interface Failure {
  /**
   * `<HTTP status> <the server's code>`, `stream <the server's code>`, a connection's code such as ECONNREFUSED, or the benchmark's own:
   * TIMEOUT, NOT_A_STREAM, BAD_EVENT, TRUNCATED, NO_TOKENS.
   */
  readonly code: string;
  readonly message: string;
}

/** All times in milliseconds. */
export interface RequestRecord {
  readonly index: number;
  /** interrupted: the benchmark was stopped before it finished. */
  readonly outcome: 'done' | 'failed' | 'interrupted';
  readonly failure?: Failure;
  /** After the start of the run. */
  readonly sentMs: number;
  /** From sending to the end of the answer. */
  readonly endToEndMs: number;
  /** From sending to the first event with text; absent if none had any. */
  readonly firstTokenMs?: number;
  /** From the first event with text to the last. */
  readonly textMs: number;
  /** Between each event with text and the next. */
  readonly gapsMs: readonly number[];
  /** Of each event with text: the tokens that it says it carries. Absent where the server does not say (`return_token_ids`). */
  readonly ids?: readonly (readonly number[])[];
  /** According to the server; absent if it does not say. */
  readonly promptTokens?: number;
  readonly outputTokens: number;
  /** By the server's usage, or one per event with text. */
  readonly countedBy: 'usage' | 'events';
  readonly asked: { readonly promptTokens?: number; readonly outputTokens: number };
}
