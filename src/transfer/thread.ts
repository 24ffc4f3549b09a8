/** Entry of the transfer thread: the service behind a message port. It ends by itself once everything is closed, never by force. */
import { parentPort, workerData } from 'node:worker_threads';
import { PdError, unreachable } from '../errors.ts';
import { MetricsPage } from '../observability/metrics.ts';
import type { FromWire } from './native/channel.ts';
import { TransferService } from './service.ts';
import type { FromTransfer, ToTransfer, TransferInit } from './thread-messages.ts';
import type { LoadResult, StoredTensor } from './types.ts';

const port = parentPort;
if (!port) throw new PdError('INTERNAL', 'transfer/thread.ts runs as a worker thread only');

let said: FromTransfer[] = [];
let soon = false;
/**
 * What is said in one turn (the layers of a request, gathered together) crosses as one message. That a tensor has left is told after the
 * turn: others have too.
 */
const say = (message: FromTransfer): void => {
  said.push(message);
  if (message.type === 'sent') {
    if (said.length === 1) setImmediate(flush);
  } else if (!soon) {
    soon = true;
    queueMicrotask(flush);
  }
};
function flush(): void {
  soon = false;
  const messages = said;
  said = [];
  if (messages.length > 0) port?.postMessage(messages);
}
const { options, metrics, native } = workerData as TransferInit;

try {
  const parts = {
    ...(metrics && { metrics: new MetricsPage(metrics) }),
    ...(native && { native: { init: native, tell: (event: FromWire) => say({ type: 'native', event }) } }),
  };
  serve(await TransferService.create(options, parts));
} catch (error) {
  say({ type: 'not-ready', error: PdError.from(error).toData() });
  flush();
  port.close();
}

function serve(service: TransferService): void {
  port?.on('message', (messages: readonly ToTransfer[]) => {
    for (const message of messages) {
      try {
        handle(service, message);
      } catch (error) {
        if (!('seq' in message)) throw error;
        say({ type: 'failed', seq: message.seq, error: PdError.from(error).toData() });
      }
    }
  });
  say({ type: 'ready', address: service.address });
}

function handle(service: TransferService, message: ToTransfer): void {
  switch (message.type) {
    case 'send': {
      const { seq } = message;
      service.send(message.request, {
        gathered: (underWay) => say({ type: 'gathered', seq, underWay }),
        underWay: () => say({ type: 'under-way', seq }),
        sent: (bytes) => say({ type: 'sent', seq, bytes }),
        failed: (error) => say({ type: 'failed', seq, error: error.toData() }),
      });
      return;
    }
    case 'receive':
      answer(message.seq, service.receive(message.tensorId, message.peer, message.timeoutMs));
      return;
    case 'load':
      answer(message.seq, service.load(message.request));
      return;
    case 'cancel-load':
      service.cancelLoad(message.requestId);
      return;
    case 'prefilled':
      service.prefilled(message.id);
      return;
    case 'send-failed':
      service.sendFailed(message.id, PdError.fromData(message.reason));
      return;
    case 'finish':
      service.finish(message.id, message.keepSends);
      return;
    case 'start-ping':
      service.startPing(message.ping);
      return;
    case 'stop-ping':
      service.stopPing();
      return;
    case 'worker-load':
      service.reportLoad(message.load);
      return;
    case 'native':
      service.native(message.command);
      return;
    case 'state':
      say({ type: 'answer', seq: message.seq, answer: service.state() });
      return;
    case 'shutdown':
      void service.dispose().finally(() => {
        say({ type: 'closed' });
        flush();
        port?.close();
      });
      return;
    default:
      unreachable(message, 'message to the transfer thread');
      return;
  }
}

function answer(seq: number, promise: Promise<StoredTensor | LoadResult>): void {
  promise.then(
    (found) => say({ type: 'answer', seq, answer: found }),
    (error: unknown) => say({ type: 'failed', seq, error: PdError.from(error).toData() }),
  );
}
