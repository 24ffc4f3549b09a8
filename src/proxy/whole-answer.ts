/** Answers of instances that are read to their end before the client hears of them: errors, and what prefill says. */
import type { ServerResponse } from 'node:http';
import { answerHeaders, type UpstreamResponse } from './upstream.ts';

export interface WholeAnswer {
  readonly response: UpstreamResponse;
  readonly body: Buffer;
}

/** Reads to the end, keeping at most so many bytes. */
export async function wholeAnswer(response: UpstreamResponse, keepBytes: number): Promise<WholeAnswer> {
  const chunks: Buffer[] = [];
  let kept = 0;
  for await (const chunk of response.body as AsyncIterable<Buffer>) {
    const part = chunk.subarray(0, keepBytes - kept);
    kept += part.length;
    if (part.length > 0) chunks.push(part);
  }
  return { response, body: Buffer.concat(chunks) };
}

/** A worker of ours that got SIGTERM: as good as a refused connection. */
export function isDraining({ response, body }: WholeAnswer): boolean {
  if (response.statusCode !== 503) return false;
  try {
    const { error } = JSON.parse(body.toString('utf8')) as { error?: { code?: unknown } };
    return error?.code === 'SERVER_DRAINING';
  } catch {
    return false;
  }
}

export function answerWith({ response, body }: WholeAnswer, out: ServerResponse, requestId: string): void {
  out.writeHead(response.statusCode, {
    ...answerHeaders(response),
    'content-length': body.length,
    'x-request-id': requestId,
  });
  out.end(body);
}
