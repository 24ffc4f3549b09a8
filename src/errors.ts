import { makeNativeErrorsBy } from '../ffi/errors.ts';

/**
 * Every failure the product can report, in one table: a stable code, the HTTP status that clients get, and what to do about it.
 * `docs/errors.md` is generated from it (`scripts/errors-doc.ts`).
 */
export const ERROR_TABLE = {
  // configuration
  CONFIG_INVALID: {
    status: 500,
    hint: 'Fix the value that the message names; --help lists what is allowed.',
  },
  PORT_IN_USE: { status: 500, hint: 'Choose another port, or stop the process that holds it.' },
  ADDRESS_INVALID: {
    status: 500,
    hint: 'An address is HOST:PORT, with IPv6 in brackets ([::1]:14579); a name must resolve on this machine (getent hosts NAME), and an address to bind must be one of this machine (ip addr).',
  },
  // requests
  REQUEST_INVALID: { status: 400, hint: 'Fix the field that the message names.' },
  MODEL_NOT_FOUND: { status: 404, hint: 'GET /v1/models lists the models served.' },
  CONTEXT_EXCEEDED: {
    status: 400,
    hint: 'Shorten the prompt or max_tokens, or start the worker with a larger --max-model-len.',
  },
  BODY_TOO_COSTLY: {
    status: 413,
    hint: 'Parsing, templating and tokenizing this body takes more time or memory than one request is allowed: shorten it. A single very long word costs most.',
  },
  READER_BUSY: {
    status: 503,
    hint: 'Other long bodies are being parsed and tokenized, or the queue for that is full: retry later, or send it to another worker.',
  },
  REQUEST_ABORTED: {
    status: 499,
    hint: 'The client disconnected or the request was cancelled; nothing to do.',
  },
  OVERLOADED: {
    status: 429,
    hint: 'The proxy is at its limit (--max-running, --max-running-tokens) and its queue is full: retry after the number of seconds in Retry-After.',
  },
  KEY_REFUSED: {
    status: 401,
    hint: 'Send `Authorization: Bearer KEY` with a key of the --api-key-file of that server; the log says which name a key in use belongs to.',
  },
  KEY_FORBIDDEN: {
    status: 403,
    hint: 'Use a key whose line in the --api-key-file says `admin`.',
  },
  SERVER_DRAINING: { status: 503, hint: 'The worker is stopping; send the request to another one.' },
  // wire
  MESSAGE_INVALID: {
    status: 502,
    hint: 'The peer sent something that violates the protocol; see docs/protocol.md.',
  },
  LIMIT_EXCEEDED: {
    status: 502,
    hint: 'The peer announced more than this end allows; compare both configurations.',
  },
  DTYPE_UNKNOWN: { status: 502, hint: 'The peer uses an element type that this version does not support.' },
  // transfer
  PEER_UNREACHABLE: {
    status: 502,
    hint: 'Check that the peer is running, that its KV port is open, and that the address in the request id is the one it binds.',
  },
  PEER_LOST: {
    status: 502,
    hint: 'The peer died or closed the connection; the next transfer opens a new pair.',
  },
  PEER_ANSWER_TIMEOUT: {
    status: 504,
    hint: 'The peer is connected but does not answer: it may hang or be overloaded. Look at its log and /debug/state.',
  },
  PAIR_INIT_TIMEOUT: {
    status: 504,
    hint: 'Check rank, firewall, NCCL version and NCCL_* settings on both ends; pd-doctor --peer tests the address.',
  },
  TRANSFER_TIMEOUT: {
    status: 504,
    hint: "The pair was open but the data did not arrive in time; look for the tensor in the peer's log.",
  },
  FINGERPRINT_MISMATCH: {
    status: 502,
    hint: "Both ends must serve the same checkpoint, KV dtype and block size; restart one with the other's settings.",
  },
  SEND_TYPE_MISMATCH: { status: 502, hint: 'Start both ends with the same --send-type.' },
  KV_BUFFER_FULL: {
    status: 503,
    hint: 'Raise --kv-buffer-size or --mem-pool-size-gb on the receiver, or lower the load.',
  },
  PROMPT_MISMATCH: {
    status: 502,
    hint: 'The two ends of a pair got different tokens from one request: compare their tokenizers, chat templates and versions. Or two requests have the same id.',
  },
  TRANSPORT_MISMATCH: {
    status: 502,
    hint: 'The two ends have no transport for KV in common: compare --transport and --device of both.',
  },
  KV_SHAPE_MISMATCH: {
    status: 502,
    hint: 'Both ends must have the same layers, KV heads, head size and element type.',
  },
  KV_LOAD_TIMEOUT: {
    status: 504,
    hint: 'The KV of this request never arrived. Message and context give the state of the pair and what came instead; pd-doctor --worker asks either end why.',
  },
  KV_LOAD_FAILED: {
    status: 502,
    hint: 'The cause says why; with --kv-load-failure recompute the consumer computes the prompt itself.',
  },
  KV_SEND_FAILED: {
    status: 502,
    hint: 'The cause says why; the consumer recomputes or fails, depending on its --kv-load-failure.',
  },
  PAIR_CLOSED: {
    status: 502,
    hint: 'The pair was closed while work was queued on it; the next transfer opens a new one.',
  },
  ENGINE_CLOSED: { status: 503, hint: 'The transfer engine has been disposed; create a new one.' },
  DIRECT_REFUSED: {
    status: 502,
    hint: "The two workers cannot write into each other's KV cache, so KV takes another path; the message says why: another user, another geometry, a socket or descriptor that does not match.",
  },
  SYSTEM_CALL_FAILED: {
    status: 500,
    hint: 'A system call failed; the message names it and the reason.',
  },
  // model
  CHECKPOINT_INVALID: {
    status: 500,
    hint: 'Download the checkpoint again, or choose another directory with --model.',
  },
  MODEL_UNSUPPORTED: { status: 500, hint: 'Choose a checkpoint of a supported architecture.' },
  // device
  DEVICE_UNAVAILABLE: { status: 500, hint: 'Run pd-doctor; it names what is missing.' },
  LIBRARY_NOT_FOUND: {
    status: 500,
    hint: 'Install the library, or set its path by flag or environment variable; pd-doctor lists what was tried.',
  },
  LIBRARY_TOO_OLD: { status: 500, hint: 'Install the version that the message names.' },
  OUT_OF_DEVICE_MEMORY: {
    status: 500,
    hint: 'Lower --num-blocks, --kv-buffer-size or --gpu-memory-utilization.',
  },
  CUDA_ERROR: { status: 500, hint: "A CUDA call failed; the message includes the library's own text." },
  NCCL_ERROR: { status: 500, hint: 'An NCCL call failed; run with NCCL_DEBUG=INFO for its own log.' },
  // proxy
  NO_INSTANCE: {
    status: 503,
    hint: 'No instance of that role pings this proxy; GET /health lists those that do.',
  },
  UPSTREAM_FAILED: {
    status: 502,
    hint: 'The instance named in the message refused or dropped the connection.',
  },
  UPSTREAM_TIMEOUT: {
    status: 504,
    hint: 'The instance named in the message is connected but too slow: look at its log, or raise the deadline that the message names.',
  },
  // launch
  PROGRAM_FAILED: {
    status: 500,
    hint: 'The last lines of the program that the message names say why.',
  },
  LOG_UNWRITABLE: {
    status: 500,
    hint: 'Set --log-dir to a directory that this user can write to, on a file system with free space.',
  },
  // bugs
  INTERNAL: { status: 500, hint: 'This is a bug; please report it with the log around it.' },
} as const satisfies Record<string, { status: number; hint: string }>;

export type ErrorCode = keyof typeof ERROR_TABLE;

/** What was being done, to what and with which peer: part of the message, and kept for logs and `/debug/state`. */
export interface ErrorContext {
  readonly requestId?: string;
  readonly transferId?: string;
  readonly tensorId?: string;
  readonly peer?: string;
  /** A pair was being opened: the connection that carries data failed, not the KV listener. */
  readonly stage?: 'pair-init';
  /** For KV that never arrived: the state of the pair that should have carried it. */
  readonly pair?: 'none' | 'connecting' | 'opening' | 'open' | 'lost';
  /** For KV that never arrived in PUT: the KV address that this end announces. */
  readonly announced?: string;
  /** For KV that never arrived: a tensor of the same request that is held under another id. */
  readonly nearMiss?: string;
  /** For KV that never arrived: the id by which this end keys KV. */
  readonly kvKey?: 'transfer' | 'engine';
  /** For KV that never arrived: whether its producer is native; absent if unknown. */
  readonly peerIsOurs?: boolean;
  /** For KV that never arrived: what its producer's KV port did when last tried. */
  readonly peerPort?: 'answers' | 'refuses' | 'silent';
  readonly [key: string]: string | number | boolean | undefined;
}

/** An error as it crosses threads and as HTTP responses carry it: structured clone drops classes, so it travels as data. */
export interface ErrorData {
  readonly code: ErrorCode;
  readonly message: string;
  readonly context: ErrorContext;
  /** What caused it, if that is a PdError too. */
  readonly cause?: ErrorData;
}

/** How many causes travel with an error; none of our chains is that long. */
const MOST_CAUSES = 8;

/** The product's one error class. `message` says what was being done and what went wrong; `hint` what to do about it. */
export class PdError extends Error {
  readonly code: ErrorCode;
  readonly context: ErrorContext;

  constructor(code: ErrorCode, message: string, context: ErrorContext = {}, options?: { cause?: unknown }) {
    super(message, options);
    this.name = 'PdError';
    this.code = code;
    this.context = context;
  }

  get hint(): string {
    return ERROR_TABLE[this.code].hint;
  }

  get status(): number {
    return ERROR_TABLE[this.code].status;
  }

  toData(most = MOST_CAUSES): ErrorData {
    const { code, message, context, cause } = this;
    const data = { code, message, context };
    return cause instanceof PdError && most > 0 ? { ...data, cause: cause.toData(most - 1) } : data;
  }

  static fromData({ code, message, context, cause }: ErrorData): PdError {
    return new PdError(code, message, context, cause && { cause: PdError.fromData(cause) });
  }

  /** Any thrown value as a PdError; one that is not becomes `INTERNAL` (or `code`) with the original as cause. */
  static from(error: unknown, code: ErrorCode = 'INTERNAL', context: ErrorContext = {}): PdError {
    if (error instanceof PdError) return error;
    const message = error instanceof Error ? error.message : String(error);
    return new PdError(code, message, context, { cause: error });
  }

  /**
   * `what` failed, in the words of its cause.
   * @internal
   */
  static because(code: ErrorCode, what: string, cause: unknown, context: ErrorContext = {}): PdError {
    return new PdError(code, `${what}: ${PdError.from(cause).message}`, context, { cause });
  }
}

// ffi/ imports nothing of src/; this makes what it throws a PdError too
makeNativeErrorsBy((...what) => new PdError(...what));

/** For the default branch of an exhaustive switch. */
export function unreachable(value: never, what: string): never {
  throw new PdError('INTERNAL', `unknown ${what}: ${JSON.stringify(value)}`);
}
