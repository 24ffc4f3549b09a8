import { makeNativeErrorsBy } from '../ffi/errors.ts';

const error = (status: number, hint: string) => ({ status, hint }) as const;

/**
 * Every failure the product can report, in one table: a stable code, the HTTP status that clients get, and what to do about it.
 * `docs/errors.md` is generated from it (`scripts/errors-doc.ts`).
 */
export const ERROR_TABLE = {
  // configuration
  CONFIG_INVALID: error(500, 'Fix the value that the message names; --help lists what is allowed.'),
  PORT_IN_USE: error(500, 'Choose another port, or stop the process that holds it.'),
  ADDRESS_INVALID: error(
    500,
    'An address is HOST:PORT, with IPv6 in brackets ([::1]:14579); a name must resolve on this machine (getent hosts NAME), and an address to bind must be one of this machine (ip addr).',
  ),
  // requests
  REQUEST_INVALID: error(400, 'Fix the field that the message names.'),
  METHOD_NOT_ALLOWED: error(405, 'Use one of the methods in the Allow header of the answer.'),
  BODY_ENCODED: error(415, 'Send the body as it is, without Content-Encoding.'),
  MODEL_NOT_FOUND: error(404, 'GET /v1/models lists the models served.'),
  CONTEXT_EXCEEDED: error(
    400,
    'Shorten the prompt or max_tokens, or start the worker with a larger --max-model-len.',
  ),
  BODY_TOO_COSTLY: error(
    413,
    'Parsing, templating and tokenizing this body takes more time or memory than one request is allowed: shorten it. A single very long word costs most.',
  ),
  READER_BUSY: error(
    503,
    'Other long bodies are being parsed and tokenized, or the queue for that is full: retry later, or send it to another worker.',
  ),
  REQUEST_ABORTED: error(499, 'The client disconnected or the request was cancelled; nothing to do.'),
  OVERLOADED: error(
    429,
    'The proxy is at its limit (--max-running, --max-running-tokens) and its queue is full: retry after the number of seconds in Retry-After.',
  ),
  KEY_REFUSED: error(
    401,
    'Send `Authorization: Bearer KEY` with a key of the --api-key-file of that server; the log says which name a key in use belongs to.',
  ),
  KEY_FORBIDDEN: error(403, 'Use a key whose line in the --api-key-file says `admin`.'),
  SERVER_DRAINING: error(503, 'The worker is stopping; send the request to another one.'),
  // wire
  MESSAGE_INVALID: error(502, 'The peer sent something that violates the protocol; see docs/protocol.md.'),
  LIMIT_EXCEEDED: error(502, 'The peer announced more than this end allows; compare both configurations.'),
  DTYPE_UNKNOWN: error(502, 'The peer uses an element type that this version does not support.'),
  // transfer
  PEER_UNREACHABLE: error(
    502,
    'Check that the peer is running, that its KV port is open, and that the address in the request id is the one it binds.',
  ),
  PEER_LOST: error(502, 'The peer died or closed the connection; the next transfer opens a new pair.'),
  PEER_ANSWER_TIMEOUT: error(
    504,
    'The peer is connected but does not answer: it may hang or be overloaded. Look at its log and /debug/state.',
  ),
  PAIR_INIT_TIMEOUT: error(
    504,
    'Check rank, firewall, NCCL version and NCCL_* settings on both ends; pd-doctor --peer tests the address.',
  ),
  TRANSFER_TIMEOUT: error(
    504,
    "The pair was open but the data did not arrive in time; look for the tensor in the peer's log.",
  ),
  FINGERPRINT_MISMATCH: error(
    502,
    "Both ends must serve the same checkpoint, KV dtype and block size; restart one with the other's settings.",
  ),
  SEND_TYPE_MISMATCH: error(502, 'Start both ends with the same --send-type.'),
  KV_BUFFER_FULL: error(
    503,
    'Raise --kv-buffer-size or --mem-pool-size-gb on the receiver, or lower the load.',
  ),
  PROMPT_MISMATCH: error(
    502,
    'The two ends of a pair got different tokens from one request: compare their tokenizers, chat templates and versions. Or two requests have the same id.',
  ),
  TRANSPORT_MISMATCH: error(
    502,
    'The two ends have no transport for KV in common: compare --transport and --device of both.',
  ),
  KV_SHAPE_MISMATCH: error(502, 'Both ends must have the same layers, KV heads, head size and element type.'),
  KV_LOAD_TIMEOUT: error(
    504,
    'The KV of this request never arrived. Message and context give the state of the pair and what came instead; pd-doctor --worker asks either end why.',
  ),
  KV_LOAD_FAILED: error(
    502,
    'The cause says why; with --kv-load-failure recompute the consumer computes the prompt itself.',
  ),
  KV_SEND_FAILED: error(
    502,
    'The cause says why; the consumer recomputes or fails, depending on its --kv-load-failure.',
  ),
  PAIR_CLOSED: error(
    502,
    'The pair was closed while work was queued on it; the next transfer opens a new one.',
  ),
  ENGINE_CLOSED: error(503, 'The transfer engine has been disposed; create a new one.'),
  DIRECT_REFUSED: error(
    502,
    "The two workers cannot write into each other's KV cache, so KV takes another path; the message says why: another user, another geometry, a socket or descriptor that does not match.",
  ),
  SYSTEM_CALL_FAILED: error(500, 'A system call failed; the message names it and the reason.'),
  // model
  CHECKPOINT_INVALID: error(500, 'Download the checkpoint again, or choose another directory with --model.'),
  MODEL_UNSUPPORTED: error(500, 'Choose a checkpoint of a supported architecture.'),
  // device
  DEVICE_UNAVAILABLE: error(500, 'Run pd-doctor; it names what is missing.'),
  LIBRARY_NOT_FOUND: error(
    500,
    'Install the library, or set its path by flag or environment variable; pd-doctor lists what was tried.',
  ),
  LIBRARY_TOO_OLD: error(500, 'Install the version that the message names.'),
  OUT_OF_DEVICE_MEMORY: error(500, 'Lower --num-blocks, --kv-buffer-size or --gpu-memory-utilization.'),
  CUDA_ERROR: error(500, "A CUDA call failed; the message includes the library's own text."),
  NCCL_ERROR: error(500, 'An NCCL call failed; run with NCCL_DEBUG=INFO for its own log.'),
  // proxy
  NO_INSTANCE: error(
    503,
    'No instance of that role pings this proxy, or those that do are drained; GET /health lists them.',
  ),
  REGISTRY_FAILED: error(
    502,
    'Check that etcd runs at the address of --registry and that its JSON gateway (/v3) can be reached. Instances known so far are kept meanwhile.',
  ),
  UPSTREAM_FAILED: error(502, 'The instance named in the message refused or dropped the connection.'),
  UPSTREAM_TIMEOUT: error(
    504,
    'The instance named in the message is connected but too slow: look at its log, or raise the deadline that the message names.',
  ),
  // launch
  PROGRAM_FAILED: error(500, 'The last lines of the program that the message names say why.'),
  LOG_UNWRITABLE: error(
    500,
    'Set --log-dir to a directory that this user can write to, on a file system with free space.',
  ),
  // bugs
  INTERNAL: error(500, 'This is a bug; please report it with the log around it.'),
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
  /** Found while generating: the field that the request's grammar came from is wrong, which only its reader knows by name. */
  readonly grammar?: boolean;
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
