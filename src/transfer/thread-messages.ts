/** What the façade and the transfer thread say to each other, in lists. Plain data: structured clone. `seq` joins an answer to its question. */

import type { TransferOptions } from '../config/transfer-options.ts';
import type { ErrorData } from '../errors.ts';
import type { HostPort } from '../net/address.ts';
import type { TensorId, TransferId } from '../wire/ids.ts';
import type { WorkerLoad } from '../wire/messages.ts';
import type { FromWire, NativeInit, ToWire } from './native/channel.ts';
import type {
  LoadRequest,
  LoadResult,
  ProxyPing,
  SendRequest,
  StoredTensor,
  TransferState,
} from './types.ts';

/** `workerData` of the transfer thread. */
export interface TransferInit {
  readonly options: TransferOptions;
  /** Metrics page (observability/metrics.ts) that the thread writes; absent where nobody reads one. */
  readonly metrics?: SharedArrayBuffer;
  /** Absent: the frozen wire alone is spoken. */
  readonly native?: NativeInit;
}

export type ToTransfer =
  | { readonly type: 'send'; readonly seq: number; readonly request: SendRequest }
  | {
      readonly type: 'receive';
      readonly seq: number;
      readonly tensorId: TensorId;
      readonly peer: HostPort;
      readonly timeoutMs: number | undefined;
    }
  | { readonly type: 'load'; readonly seq: number; readonly request: LoadRequest }
  | { readonly type: 'cancel-load'; readonly requestId: string }
  | { readonly type: 'prefilled'; readonly id: TransferId }
  | { readonly type: 'send-failed'; readonly id: TransferId; readonly reason: ErrorData }
  | { readonly type: 'finish'; readonly id: TransferId; readonly keepSends: boolean }
  | { readonly type: 'start-ping'; readonly ping: ProxyPing }
  | { readonly type: 'stop-ping' }
  | { readonly type: 'worker-load'; readonly load: WorkerLoad }
  | { readonly type: 'native'; readonly command: ToWire }
  | { readonly type: 'state'; readonly seq: number }
  | { readonly type: 'shutdown' };

export type FromTransfer =
  | { readonly type: 'ready'; readonly address: HostPort }
  /** The engine could not be made; the thread ends. */
  | { readonly type: 'not-ready'; readonly error: ErrorData }
  /** `underWay`: there is a pair with the peer; where not, the other message follows. */
  | { readonly type: 'gathered'; readonly seq: number; readonly underWay: boolean }
  | { readonly type: 'under-way'; readonly seq: number }
  | { readonly type: 'sent'; readonly seq: number; readonly bytes: number }
  /** To a receive, a load or a question about the state. */
  | {
      readonly type: 'answer';
      readonly seq: number;
      readonly answer: StoredTensor | LoadResult | TransferState;
    }
  | { readonly type: 'native'; readonly event: FromWire }
  /** Of a send, a receive or a load. */
  | { readonly type: 'failed'; readonly seq: number; readonly error: ErrorData }
  | { readonly type: 'closed' };
