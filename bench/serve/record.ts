/** What is sent, and what is known of it afterwards. */

export type Endpoint = 'completions' | 'chat';

export interface PlannedRequest {
  readonly index: number;
  /** Of a chat: what the user says. */
  readonly prompt: string;
  /** As counted by the server's tokenizer or asked for; absent for prompts from a file. */
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
  /** interrupted: the benchmark was stopped before its end. */
  readonly outcome: 'done' | 'failed' | 'interrupted';
  readonly failure?: Failure;
  /** After the start of the run. */
  readonly sentMs: number;
  /** From sending to the end of the answer. */
  readonly endToEndMs: number;
  /** From sending to the first event with text; absent where none had any. */
  readonly firstTokenMs?: number;
  /** From the first event with text to the last. */
  readonly textMs: number;
  /** Between each event with text and the next. */
  readonly gapsMs: readonly number[];
  /** As the server counts; absent where it does not say. */
  readonly promptTokens?: number;
  readonly outputTokens: number;
  /** By the server's usage, or one per event with text. */
  readonly countedBy: 'usage' | 'events';
  readonly asked: { readonly promptTokens?: number; readonly outputTokens: number };
}
