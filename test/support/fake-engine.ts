/** A transfer engine whose sends and loads end when the test says so. */
import { type Deferred, deferred } from '../../src/deferred.ts';
import { type ErrorData, PdError } from '../../src/errors.ts';
import type { HostPort } from '../../src/net/address.ts';
import type { SendHandle, TransferEngineApi } from '../../src/transfer/engine.ts';
import type {
  LoadRequest,
  LoadResult,
  ProxyPing,
  SendRequest,
  StoredTensor,
} from '../../src/transfer/types.ts';

export interface FakeSend {
  readonly request: SendRequest;
  readonly gathered: Deferred<void>;
  readonly underWay: Deferred<void>;
  readonly sent: Deferred<number>;
}

export interface FakeLoad {
  readonly request: LoadRequest;
  readonly done: Deferred<LoadResult>;
}

export class FakeEngine implements TransferEngineApi {
  readonly address: HostPort = { host: '127.0.0.1', port: 14579 };
  readonly sends: FakeSend[] = [];
  readonly loads: FakeLoad[] = [];
  readonly canceled: string[] = [];
  readonly finished: { readonly id: string; readonly keepSends: boolean }[] = [];
  readonly sendsFailed: { readonly id: string; readonly reason: ErrorData }[] = [];
  readonly pings: ProxyPing[] = [];
  /** There is a pair with whoever is sent to. */
  paired = true;
  /** Settles each send at once. */
  autoSend = false;
  /** Called with each send and load as it comes. */
  onSend: (send: FakeSend) => void = () => {};
  onLoad: (load: FakeLoad) => void = () => {};

  send(request: SendRequest): SendHandle {
    const send: FakeSend = {
      request,
      gathered: deferred<void>(),
      underWay: deferred<void>(),
      sent: deferred<number>(),
    };
    send.underWay.promise.catch(() => {});
    send.gathered.promise.catch(() => {});
    send.sent.promise.catch(() => {});
    this.sends.push(send);
    if (this.paired) send.underWay.resolve();
    if (this.autoSend) {
      send.gathered.resolve();
      send.sent.resolve(1);
    }
    this.onSend(send);
    return {
      gathered: send.gathered.promise,
      underWay: send.underWay.promise,
      sent: send.sent.promise,
    };
  }

  sendAll(requests: readonly SendRequest[]): SendHandle[] {
    return requests.map((request) => this.send(request));
  }

  load(request: LoadRequest): Promise<LoadResult> {
    const load: FakeLoad = { request, done: deferred<LoadResult>() };
    this.loads.push(load);
    this.onLoad(load);
    return load.done.promise;
  }

  /** Ends the load of `requestId` well. */
  loaded(requestId: string): void {
    this.#loadOf(requestId).done.resolve({ requestId, bytes: 100, milliseconds: 1 });
  }

  loadFailed(requestId: string, error: PdError): void {
    this.#loadOf(requestId).done.reject(error);
  }

  prefilled(): void {}

  sendFailed(id: string, reason: ErrorData): void {
    this.sendsFailed.push({ id, reason });
  }

  cancelLoad(requestId: string): void {
    this.canceled.push(requestId);
    this.loadFailed(requestId, new PdError('REQUEST_ABORTED', 'given up'));
  }

  finish(id: string, options: { readonly keepSends?: boolean } = {}): void {
    this.finished.push({ id, keepSends: options.keepSends ?? false });
  }

  receive(): Promise<StoredTensor> {
    throw new PdError('INTERNAL', 'connectors do not receive single tensors');
  }

  startPing(ping: ProxyPing): void {
    this.pings.push(ping);
  }

  stopPing(): void {}
  reportLoad(): void {}

  state(): never {
    throw new PdError('INTERNAL', 'not part of this fake');
  }

  view(): never {
    throw new PdError('INTERNAL', 'not part of this fake');
  }

  async dispose(): Promise<void> {}

  #loadOf(requestId: string): FakeLoad {
    const load = this.loads.find(({ request }) => request.requestId === requestId);
    if (!load) throw new Error(`no load of ${requestId}`);
    return load;
  }
}
