/** A native hand-over that writes down what it is told; its loads end, and leases of what has not failed, when the test says so. */
import type {
  Drawn,
  HandOverApi,
  HandOverUser,
  WantRequest,
} from '../../src/transfer/native/hand-over-api.ts';
import type { TransferId } from '../../src/wire/ids.ts';

export class FakeHandOver implements HandOverApi {
  readonly wants: WantRequest[] = [];
  /** In order: `begin`, `progress 8`, `layer 0`, `finish 100`, `fail` and so on. */
  readonly told: string[] = [];
  /** Called with each want as it comes. */
  onWant: () => void = () => {};
  #user: HandOverUser | undefined;

  serve(user: HandOverUser): void {
    this.#user = user;
  }

  get user(): HandOverUser {
    if (!this.#user) throw new Error('it serves nobody');
    return this.#user;
  }

  want(request: WantRequest): void {
    this.wants.push(request);
    this.onWant();
  }

  cancel(): void {
    this.told.push('cancel');
  }

  unwanted(): void {
    this.told.push('unwanted');
  }

  prefilled(): void {}

  sendFailed(): void {}

  begin(): void {
    this.told.push('begin');
  }

  progress(_transferId: TransferId, computed: number): void {
    this.told.push(`progress ${computed}`);
  }

  layer(index: number): void {
    this.told.push(`layer ${index}`);
  }

  stepEnded(): Promise<void> {
    this.told.push('stepEnded');
    return Promise.resolve();
  }

  /** Nobody has asked yet: its blocks are leased. */
  finish(transferId: TransferId, { tokens }: Drawn): void {
    this.told.push(`finish ${tokens}`);
    this.user.books.lease(transferId);
  }

  /** What `consumerWaits` answers. */
  waits = 0;

  consumerWaits(): number {
    return this.waits;
  }

  fail(transferId: TransferId): void {
    this.told.push('fail');
    this.user.books.endLease(transferId);
  }
}
