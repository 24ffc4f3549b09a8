/** Who reads clients' bodies (body.ts): the main thread, which relays all streams, where they are short; a thread of its own where long. */
import type { Signal } from '../deferred.ts';
import type { Logger } from '../observability/log.ts';
import { openReader, type ReaderPort, type ReadingLimits, ReadingThread } from '../reading-thread.ts';
import { threadEntry } from '../thread-entry.ts';
import { NO_KEYS, type RequestBody, readBody, type WantedKeys } from './body.ts';

export interface ToBodyThread {
  readonly body: Uint8Array<ArrayBuffer>;
  readonly wanted: WantedKeys;
}

/**
 * Bytes of a body that is read at once. Measured on a 2-core VM, medians: 64 KiB of text take 0.1 ms, of token ids 0.5 ms, of junk up to
 * 1.6 ms (some 10 ms where it is nested as deep as the stack goes), 256 KiB up to 22 ms. So prompts of some ten thousand tokens do not
 * pay the way to the thread.
 */
const SHORT_BODY = 65_536;

export interface BodyReaderOptions extends ReadingLimits {
  /** Bytes up to which a body is read without the thread. */
  readonly shortBody?: number;
  readonly openThread?: () => ReaderPort<ToBodyThread, RequestBody>;
}

/** There is no thread until the first long body. Close it. */
export class BodyReader {
  readonly #thread: ReadingThread<ToBodyThread, RequestBody>;
  readonly #shortBody: number;

  constructor(
    log: Logger,
    { shortBody = SHORT_BODY, openThread: open = openThread, ...limits }: BodyReaderOptions = {},
  ) {
    this.#shortBody = shortBody;
    this.#thread = new ReadingThread({ ...limits, owner: 'proxy', log, open });
  }

  /** `body` is not to be used any more: its memory may move. Throws what `readBody` and `ReadingThread.read` throw. */
  async read(body: Uint8Array<ArrayBuffer>, signal: Signal, wanted = NO_KEYS): Promise<RequestBody> {
    if (body.byteLength <= this.#shortBody) return readBody(body, wanted);
    return await this.#thread.read({ body, wanted }, signal);
  }

  /** Ends the thread; what waits or is being read fails with SERVER_DRAINING. Idempotent. */
  close(): Promise<void> {
    return this.#thread.close();
  }
}

function openThread(): ReaderPort<ToBodyThread, RequestBody> {
  return openReader(threadEntry(import.meta.url, './body-thread.js'));
}
