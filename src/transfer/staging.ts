/** Bringing what is to be sent into memory that the transport can send from, once the work that produces it is done. */
import { PdError } from '../errors.ts';
import { blockBytes } from '../kv/layout.ts';
import { tensorBytes } from '../wire/dtype.ts';
import type { TransferContext } from './context.ts';
import type { FormedRequest } from './frozen/form.ts';
import type { Held } from './frozen/store.ts';
import type { SendRequest } from './types.ts';

/** Throws KV_SHAPE_MISMATCH where shape and source have different sizes. Returns the bytes. */
export function checkSource(request: FormedRequest): number {
  const { tensorId, shape, dtype, source, plan } = request;
  const announced = tensorBytes(shape, dtype);
  if (plan) return announced;
  const there =
    source.kind === 'flat' ? source.memory.bytes : blockBytes(source.layer.layout) * source.blockIds.length;
  if (announced !== there) {
    throw new PdError(
      'KV_SHAPE_MISMATCH',
      `${tensorId}: shape [${shape}] of ${dtype} takes ${announced} bytes, the source has ${there}`,
      { tensorId },
    );
  }
  return announced;
}

/** Can the transport send from where the source lies? */
export function sendsInPlace(context: TransferContext, request: SendRequest): boolean {
  const { source } = request;
  return source.kind === 'flat' && (context.device.kind === 'host' || source.memory.kind !== 'host');
}

/** Resolves when the stream has done all that is enqueued on it now. */
export async function passed(context: TransferContext, what: string): Promise<void> {
  const event = context.stream.record();
  try {
    await context.poller.wait(event, context.options.timeouts.transfer, what);
  } finally {
    event.dispose();
  }
}

/** Memory to stage in, waiting in line for it. Throws KV_BUFFER_FULL. */
export async function stagingMemory(
  context: TransferContext,
  request: SendRequest,
  bytes: number,
): Promise<Held> {
  const { memory, options } = context;
  const held = await memory.waitFor(bytes, options.timeouts.transfer);
  if (held) return held;
  throw new PdError(
    'KV_BUFFER_FULL',
    `no memory to gather ${request.tensorId} of ${bytes} bytes within ${options.timeouts.transfer} ms: ` +
      `${memory.bufferUsed} of ${memory.thresholdBytes} bytes of the buffer and ${memory.poolUsed} of ` +
      `${memory.limitBytes} bytes of the host pool are used`,
    { tensorId: request.tensorId },
  );
}
