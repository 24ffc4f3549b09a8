/** A core thread that follows a script, and a tokenizer whose tokens are bytes: what the server needs, without model or threads. */

import type { TextModel } from '../../src/model/tokenizer.ts';
import type { CoreRequest, RequestOutput } from '../../src/scheduler/types.ts';
import { CoreClient, type CoreClientOptions, type CorePort } from '../../src/worker/core-client.ts';
import type { CoreInfo, CoreState, FromCore, ToCore } from '../../src/worker/core-messages.ts';
import { type RequestBodyReader, readRequestBody } from '../../src/worker/request-body-reader.ts';

export const EOS = 256;
const VOCAB = 300;
/** Tokens above EOS: several bytes each, cut wherever it hurts. */
const PIECES: Readonly<Record<number, readonly number[]>> = {
  257: [...new TextEncoder().encode('the ')],
  258: [0xf0, 0x9f],
  259: [0x90, 0x89],
};

const INFO: CoreInfo = {
  kvAddress: '127.0.0.1:8084',
  maxModelLen: 256,
  numBlocks: 64,
  blockSize: 16,
  vocabSize: VOCAB,
  fingerprint: {
    digest: 'd'.repeat(64),
    model: 'demo',
    weights: 'w'.repeat(64),
    dtype: 'float32',
    blockSize: 16,
    layers: 1,
    heads: 1,
    headDim: 2,
  },
};

const STATE: CoreState = {
  running: 0,
  waiting: 0,
  loading: 0,
  blocks: { used: 0, cached: 0, total: 64 },
  integrity: [],
};

export type Emit = (output: Omit<RequestOutput, 'requestId'>) => void;
export type Script = (request: CoreRequest, emit: Emit) => void;

/** Bytes of a text as tokens. */
export function bytesOf(text: string): number[] {
  return [...new TextEncoder().encode(text)];
}

/** Emits `text` one token a step, then end of sequence, for each of n completions. */
export function saying(text: string): Script {
  return (request, emit) => {
    for (let index = 0; index < request.n; index++) {
      for (const token of bytesOf(text)) emit({ index, tokens: [token] });
      emit({ index, tokens: [EOS], finishReason: 'stop' });
    }
  };
}

export class FakeCore implements CorePort {
  readonly received: ToCore[] = [];
  script: Script;
  answersState = true;
  /** Of an instance of a pair: what it pings. */
  ping: CoreState['ping'];
  terminated = false;
  readonly #heard = new Set<() => void>();
  #message: (message: FromCore) => void = () => {};
  #exit: (error: Error | undefined) => void = () => {};

  constructor(script: Script = saying('hello')) {
    this.script = script;
  }

  get added(): CoreRequest[] {
    return this.received.flatMap((message) => (message.type === 'add' ? [message.request] : []));
  }

  get aborted(): Extract<ToCore, { type: 'abort' }>[] {
    return this.received.flatMap((message) => (message.type === 'abort' ? [message] : []));
  }

  connect(options?: CoreClientOptions): Promise<CoreClient> {
    queueMicrotask(() => this.emit({ type: 'ready', info: INFO }));
    return CoreClient.connect(this, options);
  }

  emit(message: FromCore): void {
    this.#message(message);
  }

  die(error?: Error): void {
    this.#exit(error);
  }

  /** Resolves when a message for which `test` holds has been received. */
  async until(test: (message: ToCore) => boolean): Promise<void> {
    while (!this.received.some(test)) await new Promise<void>((resolve) => this.#heard.add(resolve));
  }

  post(message: ToCore): void {
    this.received.push(message);
    for (const resolve of this.#heard) resolve();
    this.#heard.clear();
    switch (message.type) {
      case 'add': {
        const { requestId } = message.request;
        // As from another thread: never within the call.
        setImmediate(() =>
          this.script(message.request, (output) =>
            this.emit({ type: 'outputs', outputs: [{ requestId, ...output }] }),
          ),
        );
        return;
      }
      case 'state':
        if (this.answersState)
          this.emit({
            type: 'state',
            seq: message.seq,
            state: { ...STATE, ...(this.ping && { ping: this.ping }) },
          });
        return;
      case 'shutdown':
        setImmediate(() => this.emit({ type: 'closed' }));
        return;
      case 'abort':
      case 'kv-failed':
      case 'prefilled':
      case 'release':
      case 'serve':
      case 'drain':
        return;
    }
  }

  onMessage(listener: (message: FromCore) => void): void {
    this.#message = listener;
  }

  onExit(listener: (error: Error | undefined) => void): void {
    this.#exit = listener;
  }

  async terminate(): Promise<void> {
    this.terminated = true;
  }
}

function piece(token: number): readonly number[] {
  return token < EOS ? [token] : (PIECES[token] ?? []);
}

export const BYTE_MODEL: TextModel = {
  digest: 'bytes',
  eosTokenIds: [EOS],
  eosTokenId: EOS,
  chatTemplate: '{{ tools }}<tool_call></tool_call><think></think>{{ messages }}',
  // One that is encoded stands for a byte; the longest of those that are only decoded for four.
  charactersPerToken: 4,
  encode: (text) => bytesOf(text),
  decode: (tokens) =>
    new TextDecoder().decode(Uint8Array.from([...tokens].flatMap((token) => [...piece(token)]))),
  tokenString: (token) => BYTE_MODEL.decode([token]),
  tokenBytes: (token) => Uint8Array.from(piece(token)),
  applyChatTemplate: (messages, { addGenerationPrompt = true, tools, variables } = {}) => {
    if (messages.some(({ role }) => role === 'pirate')) throw new Error('no pirates');
    const declared = tools ? `tools:${JSON.stringify(tools)};` : '';
    const text = messages.map(({ role, content, tool_calls: calls, reasoning_content: thoughts }) => {
      const said = [thoughts && `<think>${thoughts}</think>`, content, calls && JSON.stringify(calls)];
      return `${role}:${said.filter(Boolean).join('')};`;
    });
    const begun = addGenerationPrompt ? 'assistant:' : '';
    return declared + text.join('') + begun + (variables?.['thinking'] === true ? '<think>' : '');
  },
  decoder: () => {
    const decoder = new TextDecoder();
    return {
      push: (token) => decoder.decode(Uint8Array.from(piece(token)), { stream: true }),
      flush: () => decoder.decode(),
    };
  },
};

/** Reads every body at once, as a RequestBodyReader does short ones. */
export const BYTE_READER: Pick<RequestBodyReader, 'model' | 'read' | 'close'> = {
  model: BYTE_MODEL,
  read: async (served, route, body) => readRequestBody(served, BYTE_MODEL, route, body),
  close: async () => {},
};
