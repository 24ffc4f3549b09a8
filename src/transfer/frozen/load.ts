/**
 * One load: the KV of one request, tensor by tensor as they come, into paged blocks. Its promise settles only when no write into the
 * blocks can happen any more.
 */
import { type ErrorContext, PdError } from '../../errors.ts';
import { formOf, isAmbiguous, type WireForm, wireShape } from '../../kv/families.ts';
import { type CopyPlan, planCopy } from '../../kv/reblock.ts';
import { formatHostPort } from '../../net/address.ts';
import type { PortAnswer } from '../../net/knock.ts';
import { type TensorId, type TransferId, tensorIdOf } from '../../wire/ids.ts';
import { logTensor, passed, type TransferContext } from '../context.ts';
import type { LoadRequest, LoadResult, PairState } from '../types.ts';
import type { Claimant } from './claims.ts';
import type { Intake } from './intake.ts';
import { contradicts, type StoreEntry } from './store.ts';

type Layer = LoadRequest['layers'][number];

/** A tensor that has come, and the layer that it goes to. */
interface Taken {
  readonly entry: StoreEntry;
  readonly layer: Layer;
  /** Where it does not lie as the cache does. */
  readonly plan: CopyPlan | undefined;
}

export interface PairsOfPeer {
  /** Why the last pair that this peer had with us is over, if it is and it has not sent NEW since. */
  lostPair(peer: string): PdError | undefined;
  /** Pairs with it, both directions. */
  pairs(peer: string): PairState[];
}

export class Load implements Claimant {
  readonly request: LoadRequest;
  readonly peer: string;
  readonly startedAt: number;
  readonly #context: TransferContext;
  readonly #intake: Intake;
  readonly #missing: Map<string, Layer>;
  readonly #settle: { resolve(result: LoadResult): void; reject(error: PdError): void };
  #taken: Taken[] = [];
  #atPeer: readonly string[] = [];
  #otherPrompt: TensorId | undefined;
  #writes = 0;
  #bytes = 0;
  #failure: PdError | undefined;
  #settled = false;

  constructor(
    context: TransferContext,
    intake: Intake,
    request: LoadRequest,
    settle: { resolve(result: LoadResult): void; reject(error: PdError): void },
  ) {
    this.#context = context;
    this.#intake = intake;
    this.request = request;
    this.peer = formatHostPort(request.peer);
    this.startedAt = context.deadlines.now();
    this.#missing = new Map(request.layers.map((layer) => [layer.name, layer]));
    this.#settle = settle;
  }

  get requestId(): string {
    return this.request.requestId;
  }

  get transferId(): TransferId {
    return this.request.transferId;
  }

  get promptDigest(): string | undefined {
    return this.request.promptDigest;
  }

  get missing(): readonly string[] {
    return [...this.#missing.keys()];
  }

  /** Failed, or everything has come. */
  get decided(): boolean {
    return this.#failure !== undefined || this.#missing.size === 0;
  }

  /** Under which the tensor of a layer is asked for, and looked for in messages. */
  tensorId(layerName: string): TensorId {
    return tensorIdOf(this.transferId, layerName);
  }

  wants(layerName: string): boolean {
    return !this.#failure && this.#missing.has(layerName);
  }

  take(entry: StoreEntry): void {
    const layer = this.#missing.get(entry.layerName);
    if (!layer || this.#failure) {
      this.#intake.store.release(entry);
      return;
    }
    this.#intake.store.claim(entry, 'claimed');
    let plan: CopyPlan | undefined;
    try {
      if (contradicts(this, entry)) {
        const message = 'it is KV of another prompt than this request has: two requests were given one id';
        throw new PdError('KV_LOAD_FAILED', message);
      }
      plan = planOf(entry, layer, this.request);
    } catch (error) {
      const { tensorId, peer } = entry;
      const { code, message } = PdError.from(error);
      this.#intake.store.release(entry);
      this.fail(
        new PdError(code, `${tensorId} from ${peer}: ${message}`, {
          requestId: this.requestId,
          tensorId,
          peer,
        }),
      );
      return;
    }
    this.#missing.delete(entry.layerName);
    this.#taken.push({ entry, layer, plan });
    // What comes in one turn of the event loop goes into the cache together.
    if (this.#taken.length === 1) queueMicrotask(() => void this.#scatter());
  }

  seenAtPeer(tensorIds: readonly string[]): void {
    this.#atPeer = tensorIds;
  }

  /** The same request under another id, here or at the producer. */
  nearMisses(): string[] {
    const there = this.#atPeer.map((id) => `${id} (at ${this.peer})`);
    return [...this.#intake.store.nearMisses(this.transferId), ...there];
  }

  otherPrompt({ tensorId }: StoreEntry): void {
    this.#otherPrompt ??= tensorId;
  }

  /** What it has been waiting beside, for messages. */
  get #instead(): string {
    const held = heldInstead(this.#intake.store.nearMisses(this.transferId), this.#atPeer, this.peer);
    if (this.#otherPrompt === undefined) return held;
    return `${this.#otherPrompt} came and was dropped, being KV of another prompt: two requests were given one id; ${held}`;
  }

  /** A layer that this end does not have: the other runs another model. Twice the same layer is told elsewhere. */
  stray({ tensorId, layerName, peer, shape, dtype }: StoreEntry): void {
    const { layers } = this.request;
    if (layers.length === 0 || layers.some(({ name }) => name === layerName)) return;
    const [first, last] = [layers[0], layers.at(-1)].map((layer) => layer?.name);
    const message =
      `${tensorId} from ${peer}, [${shape.join(', ')}] ${dtype}: there is no layer of that name here, ` +
      `the ${layers.length} are ${first} to ${last}`;
    this.fail(new PdError('KV_SHAPE_MISMATCH', message, { requestId: this.requestId, tensorId, peer }));
  }

  /** No more tensors are taken. Ignored once everything has come. */
  fail(reason: PdError): void {
    if (this.decided) return;
    this.#failure = this.#asLoadError(reason);
    this.#finishIfQuiet();
  }

  /** Given up, even where only the last copies are under way. */
  cancel(reason: PdError): void {
    if (this.#settled) return;
    this.#failure ??= this.#asLoadError(reason);
    this.#finishIfQuiet();
  }

  /** Half of its time has passed: whoever reads this then can still look at the other end. */
  warnLate(peers: PairsOfPeer, timeoutMs: number): void {
    if (this.decided) return;
    const { memory, log } = this.#context;
    const { requestId, transferId, peer, missing } = this;
    const nearMisses = this.nearMisses();
    const pairs = peers.pairs(peer);
    log.warn(
      {
        requestId,
        transferId,
        peer,
        missing: missing.length,
        layers: this.request.layers.length,
        nearMisses,
        lostPair: peers.lostPair(peer)?.message,
        held: this.#intake.store.size,
        pairs,
        bufferUsed: memory.bufferUsed,
        bufferThreshold: memory.thresholdBytes,
        poolUsed: memory.poolUsed,
        poolLimit: memory.limitBytes,
      },
      `KV of ${requestId} from ${peer} is not here after half of its ${timeoutMs} ms: waiting for ` +
        `${this.tensorId(missing[0] ?? '')}; ${pairWords(pairs)}; ` +
        (nearMisses.length > 0
          ? `held instead: ${nearMisses.join(', ')}`
          : 'nothing of a similar id is held'),
    );
  }

  /**
   * The deadline has passed: says what is missing, from whom, what is there instead, and what tells apart the ways in which that happens.
   * `port`: what the producer's KV port did when it was last tried. `roomless`: why it was not asked.
   */
  timeOut(
    timeoutMs: number,
    peers: PairsOfPeer,
    port: PortAnswer | undefined,
    roomless: PdError | undefined,
  ): void {
    const [first] = this.#missing.keys();
    if (first === undefined) return;
    const { requestId, transferId, peer } = this;
    const total = this.request.layers.length;
    const { bringing, told } = this.#pairNow(peers);
    const [nearMiss] = this.nearMisses();
    const context = { requestId, transferId, peer, ...told, ...(nearMiss !== undefined && { nearMiss }) };
    const lost = told.pair === 'open' ? undefined : peers.lostPair(peer);
    this.fail(
      new PdError(
        'KV_LOAD_TIMEOUT',
        `KV of ${requestId} from ${peer} did not come within ${timeoutMs} ms: waited for ` +
          `${this.tensorId(first)}, ${total - this.#missing.size} of ${total} layers are here; ` +
          `${this.#instead}; ${pairWords(bringing)}`,
        { ...context, ...(port && { peerPort: port }) },
        { cause: roomless ?? lost },
      ),
    );
  }

  /** The pair that is to bring it. The end that announces opens it: who asks in GET, who sends otherwise. */
  #pairNow(peers: PairsOfPeer): {
    readonly bringing: readonly PairState[];
    readonly told: Pick<ErrorContext, 'announced' | 'pair' | 'kvKey' | 'peerIsOurs'>;
  } {
    const { options, self } = this.#context;
    const { sendType, kvKey } = options;
    const way = sendType === 'GET' ? 'outgoing' : 'incoming';
    const bringing = peers.pairs(this.peer).filter(({ direction }) => direction === way);
    const found = (['open', 'opening', 'connecting'] as const).find((state) =>
      bringing.some((one) => one.state === state),
    );
    const pair = found ?? (peers.lostPair(this.peer) ? 'lost' : 'none');
    const open = bringing.find(({ state }) => state === 'open');
    return {
      bringing,
      told: {
        pair,
        kvKey,
        ...(sendType !== 'GET' && { announced: self }),
        ...(open && { peerIsOurs: open.native }),
      },
    };
  }

  #asLoadError(reason: PdError): PdError {
    const { requestId, transferId, peer } = this;
    switch (reason.code) {
      case 'KV_LOAD_TIMEOUT':
      case 'KV_LOAD_FAILED':
      case 'KV_SHAPE_MISMATCH':
      case 'REQUEST_ABORTED':
      case 'ENGINE_CLOSED':
        return reason;
      default: {
        const total = this.request.layers.length;
        return new PdError(
          'KV_LOAD_FAILED',
          `KV of ${requestId} from ${peer} (${total - this.#missing.size} of ${total} layers here): ` +
            `${reason.code}: ${reason.message}`,
          { requestId, transferId, peer, cause: reason.code },
          { cause: reason },
        );
      }
    }
  }

  async #scatter(): Promise<void> {
    const { device, stream } = this.#context;
    const { blockIds, skipBlocks } = this.request;
    const taken = this.#taken;
    this.#taken = [];
    this.#writes++;
    try {
      // A load that was given up meanwhile writes no more.
      if (!this.#failure) {
        for (const { entry } of taken) logTensor(this.#context, 'scatter', entry, entry.peer);
        const parts = taken
          .filter(({ plan }) => !plan)
          .map(({ entry, layer }) => ({ layer: layer.target, tensor: entry.held.memory }));
        if (parts.length > 0) device.scatterLayers(parts, blockIds, stream, skipBlocks);
        for (const { entry, layer, plan } of taken) {
          if (plan) device.reblock('scatter', layer.target.memory, entry.held.memory, plan, stream);
        }
        await passed(this.#context, `scatter of ${taken[0]?.entry.tensorId} and ${taken.length - 1} more`);
        for (const { entry } of taken) this.#bytes += entry.held.bytes;
      }
    } catch (error) {
      this.#failure ??= this.#asLoadError(PdError.from(error));
    }
    this.#writes--;
    for (const { entry } of taken) this.#intake.store.release(entry);
    this.#finishIfQuiet();
  }

  #finishIfQuiet(): void {
    if (this.#settled || this.#writes > 0 || this.#taken.length > 0 || !this.decided) return;
    this.#settled = true;
    if (this.#failure) {
      this.#settle.reject(this.#failure);
      return;
    }
    const milliseconds = this.#context.deadlines.now() - this.startedAt;
    this.#settle.resolve({ requestId: this.requestId, bytes: this.#bytes, milliseconds });
  }
}

/** How a tensor goes into the blocks of a layer; undefined where it lies as they do. Throws KV_SHAPE_MISMATCH, naming both shapes. */
function planOf(entry: StoreEntry, { target }: Layer, request: LoadRequest): CopyPlan | undefined {
  const { layout } = target;
  const { blockIds, skipBlocks } = request;
  const asOurs =
    entry.twoBlocks === undefined || entry.twoBlocks === layout.family || !isAmbiguous(entry.shape);
  const exact = entry.dtype === layout.dtype && sameShape(entry.shape, wireShape(layout, blockIds.length));
  if (exact && asOurs) return undefined;
  const tokens = request.numTokens ?? blockIds.length * layout.blockSize;
  const own = layout.family === 'blocks-first' ? 'blocks-first' : 'kv-first';
  const takes = `this request takes [${wireShape(layout, blockIds.length).join(', ')}] ${layout.dtype}`;
  let form: WireForm;
  try {
    form = formOf(entry, { layout, tokens, twoBlocks: entry.twoBlocks ?? own });
  } catch (error) {
    const { code, message, context } = PdError.from(error);
    throw new PdError(code, `${message}; ${takes}`, context);
  }
  // Between ours another number of blocks is another prompt.
  const likeOurs = entry.twoBlocks === undefined && form.family === layout.family;
  if (likeOurs && form.blockSize === layout.blockSize && form.blocks !== blockIds.length) {
    throw new PdError('KV_SHAPE_MISMATCH', `tensor [${entry.shape.join(', ')}] ${entry.dtype}; ${takes}`);
  }
  return planCopy(layout, blockIds, form, { tokens, skipBlocks });
}

/** For messages of what never came. */
export function heldInstead(here: readonly string[], atPeer: readonly string[], peer: string): string {
  if (here.length > 0) return `held instead: ${here.join(', ')}`;
  if (atPeer.length > 0) return `held instead: ${atPeer.join(', ')} (at ${peer})`;
  return 'nothing of a similar id is held';
}

function sameShape(a: readonly number[], b: readonly number[]): boolean {
  return a.length === b.length && a.every((dim, at) => dim === b[at]);
}

function pairWords(pairs: readonly PairState[]): string {
  if (pairs.length === 0) return 'there is no pair with it';
  return pairs
    .map(
      ({ direction, state, sinceMs, queued, outstanding }) =>
        `${direction} pair ${state} since ${sinceMs} ms, ${queued} queued, ${outstanding} outstanding`,
    )
    .join(', ');
}
