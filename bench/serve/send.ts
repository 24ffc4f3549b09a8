/** One request, from sending to the end of its answer. */
import { reasonOf } from '../../src/net/resolve.ts';
import type { Clock } from './load.ts';
import type { Endpoint, Failure, PlannedRequest, RequestRecord } from './record.ts';
import { StreamReading, serverError } from './stream-reading.ts';
import { readJson, type Target } from './target.ts';

export interface SendOptions {
  readonly target: Target;
  readonly endpoint: Endpoint;
  /** For the whole answer, milliseconds. */
  readonly timeoutMs: number;
  readonly clock: Pick<Clock, 'now'>;
}

/** Never rejects: failures are in the record. `signal` interrupts it. */
export async function sendRequest(
  { target, endpoint, timeoutMs, clock }: SendOptions,
  request: PlannedRequest,
  startMs: number,
  signal: AbortSignal,
): Promise<RequestRecord> {
  const reading = new StreamReading(endpoint);
  const stop = new AbortController();
  const interrupt = () => stop.abort();
  signal.addEventListener('abort', interrupt);
  if (signal.aborted) interrupt();
  let late = false;
  const deadline = setTimeout(() => {
    late = true;
    stop.abort();
  }, timeoutMs);
  const sentAt = clock.now();
  let endedAt = sentAt;
  let failure: Failure | undefined;
  try {
    const { statusCode, headers, body } = await target.stream(request, stop.signal);
    if (statusCode !== 200) {
      const { code, message } = serverError(await readJson(body));
      failure = {
        code: `${statusCode}${code === undefined || code === String(statusCode) ? '' : ` ${code}`}`,
        message,
      };
    } else if (!String(headers['content-type'] ?? '').startsWith('text/event-stream')) {
      const answer = JSON.stringify(await readJson(body)) ?? '';
      failure = {
        code: 'NOT_A_STREAM',
        message: `the answer is not an event stream: ${answer.slice(0, 200)}`,
      };
    } else {
      for await (const chunk of body as AsyncIterable<Buffer>) {
        endedAt = clock.now();
        reading.push(chunk, endedAt);
      }
      reading.end(endedAt);
      failure = reading.failure;
    }
  } catch (error) {
    failure = late
      ? { code: 'TIMEOUT', message: `not answered in full within ${timeoutMs} ms (--timeout)` }
      : connectionFailure(error);
  } finally {
    clearTimeout(deadline);
    signal.removeEventListener('abort', interrupt);
  }
  if (failure) endedAt = clock.now();
  const interrupted = failure !== undefined && !late && signal.aborted;
  const { usage, textAtMs, ids } = reading;
  const first = textAtMs[0];
  return {
    index: request.index,
    outcome: interrupted ? 'interrupted' : failure ? 'failed' : 'done',
    ...(failure && !interrupted && { failure }),
    sentMs: sentAt - startMs,
    endToEndMs: endedAt - sentAt,
    ...(first !== undefined && { firstTokenMs: first - sentAt }),
    textMs: first === undefined ? 0 : textAtMs[textAtMs.length - 1]! - first,
    gapsMs: textAtMs.slice(1).map((at, i) => at - textAtMs[i]!),
    ...(ids && { ids }),
    ...(usage.promptTokens !== undefined && { promptTokens: usage.promptTokens }),
    outputTokens: usage.outputTokens ?? textAtMs.length,
    countedBy: usage.outputTokens === undefined ? 'events' : 'usage',
    asked: {
      ...(request.promptTokens !== undefined && { promptTokens: request.promptTokens }),
      outputTokens: request.outputTokens,
    },
  };
}

function connectionFailure(error: unknown): Failure {
  const code = error instanceof Error ? (error as NodeJS.ErrnoException).code : undefined;
  return { code: code ?? 'CONNECTION', message: reasonOf(error) };
}
