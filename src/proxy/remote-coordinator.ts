/** A relay process's side of what all requests share: it asks the process that owns it. */
import { type Deferred, deferred, type Signal } from '../deferred.ts';
import { PdError } from '../errors.ts';
import { NO_KEYS, type WantedKeys } from './body.ts';
import type { Coordinator, Placement, Visit, Wish } from './coordinator.ts';
import type { Instance, InstanceRole } from './registry.ts';
import type { FromRelay, SentPlacement, ToRelay } from './relay-messages.ts';

/** Beyond what a request may wait for its turn: an owner that is this late hangs. */
const ANSWER_MS = 10_000;
const CHECK_MS = 1_000;

interface Answer {
  readonly count: number;
  readonly queuedMs: number;
  readonly placement: Placement;
}

interface Waiting extends Deferred<Answer | undefined> {
  readonly untilMs: number;
}

export class RemoteCoordinator implements Coordinator {
  wanted: WantedKeys = NO_KEYS;
  readonly #send: (message: FromRelay) => void;
  readonly #queueMs: number;
  readonly #instances = new Map<string, Instance>();
  readonly #waiting = new Map<number, Waiting>();
  #ids = 0;

  /** `queueMs`: how long a request may wait for its turn. */
  constructor(send: (message: FromRelay) => void, queueMs: number) {
    this.#send = send;
    this.#queueMs = queueMs;
    setInterval(() => this.#expire(), CHECK_MS).unref();
  }

  async enter(wish: Wish, signal: Signal): Promise<Visit> {
    const id = this.#ids++;
    const { model, prompts, tokens, tokenized, textKeys, blockKeys } = wish.prompt;
    const prompt = { model, prompts, tokens, tokenized, textKeys, blockKeys: [...blockKeys] };
    const placed = this.#answer(id);
    const leave = () => this.#waiting.get(id)?.reject(signal.reason);
    signal.addEventListener('abort', leave, { once: true });
    this.#send({ type: 'enter', id, wish: { ...wish, prompt } });
    try {
      return new RemoteVisit(id, (await placed)!, this.#send, () => this.#answer(id));
    } catch (error) {
      this.#send({ type: 'end', id });
      throw error;
    } finally {
      signal.removeEventListener('abort', leave);
    }
  }

  receive(message: Extract<ToRelay, { type: 'instance' | 'wanted' | 'placed' | 'refused' }>): void {
    if (message.type === 'instance') {
      this.#instances.set(message.instance.httpAddress, message.instance);
    } else if (message.type === 'wanted') {
      this.wanted = message.wanted;
    } else {
      const waiting = this.#waiting.get(message.id);
      if (!waiting) return;
      if (message.type === 'placed')
        waiting.resolve({ ...message, placement: this.#placement(message.placement) });
      else if (message.error) waiting.reject(PdError.fromData(message.error));
      else waiting.resolve(undefined);
    }
  }

  #answer(id: number): Promise<Answer | undefined> {
    const waiting = {
      ...deferred<Answer | undefined>(),
      untilMs: performance.now() + this.#queueMs + ANSWER_MS,
    };
    this.#waiting.set(id, waiting);
    return waiting.promise.finally(() => this.#waiting.delete(id));
  }

  /** One that an instance has been told of before, in the same order. */
  #placement({ pair, ...placement }: SentPlacement): Placement {
    const producer = this.#instances.get(pair.producer)!;
    const consumer = this.#instances.get(pair.consumer)!;
    return { ...placement, pair: { producer, consumer } };
  }

  #expire(): void {
    const now = performance.now();
    for (const { untilMs, reject } of this.#waiting.values())
      if (untilMs < now) reject(new PdError('INTERNAL', 'the process that places requests does not answer'));
  }
}

class RemoteVisit implements Visit {
  readonly count: number;
  readonly queuedMs: number;
  placement: Placement;
  readonly #id: number;
  readonly #send: (message: FromRelay) => void;
  readonly #answer: () => Promise<Answer | undefined>;
  readonly #placements: Placement[];

  constructor(
    id: number,
    { count, queuedMs, placement }: Answer,
    send: (message: FromRelay) => void,
    answer: () => Promise<Answer | undefined>,
  ) {
    this.count = count;
    this.queuedMs = queuedMs;
    this.placement = placement;
    this.#id = id;
    this.#send = send;
    this.#answer = answer;
    this.#placements = [placement];
  }

  prefilled(placement: Placement, tookMs?: number): void {
    this.#send({ type: 'prefilled', id: this.#id, at: this.#placements.indexOf(placement), tookMs });
  }

  judge(placement: Placement, role: InstanceRole, ok: boolean, firstEventMs?: number): void {
    const at = this.#placements.indexOf(placement);
    this.#send({ type: 'judge', id: this.#id, at, role, ok, firstEventMs });
  }

  async retry(refused: InstanceRole): Promise<Placement | undefined> {
    const answer = this.#answer();
    this.#send({ type: 'retry', id: this.#id, refused });
    const placement = (await answer)?.placement;
    if (!placement) return undefined;
    this.placement = placement;
    this.#placements.push(placement);
    return placement;
  }

  end(): void {
    this.#send({ type: 'end', id: this.#id });
  }
}
